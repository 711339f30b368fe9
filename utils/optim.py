"""Optimizers and learning-rate schedules. A schedule is a pure function of the epoch: resuming needs no state."""

import math

import torch
from torch import nn


def build_optimizer(optimizer: dict, model: nn.Module) -> torch.optim.Optimizer:
    """Build the fused optimizer of a configuration's `optimizer` section.

    `sgd` uses Nesterov momentum, given by the first of `betas`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": optimizer["lr"]["base_lr"], "weight_decay": optimizer["weight_decay"], "fused": True}
    if optimizer["name"] == "sgd":
        momentum = optimizer["betas"][0]
        return torch.optim.SGD(parameters, momentum=momentum, nesterov=momentum > 0, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer["name"]]
    return kind(parameters, betas=tuple(optimizer["betas"]), **options)


def learning_rate(optimizer: dict, epoch: int, progress: float = 0.0) -> float:
    """The learning rate at a fraction `progress` (0 to 1) of an epoch.

    `multistep`: base_lr times gamma for each milestone reached. `cosine`: half a cosine from base_lr to 0 over
    num_epochs. Both warm up linearly over the first `warmup_epochs`, from a thousandth of an epoch's rise, not 0.
    """
    lr, now = optimizer["lr"], epoch + progress
    if lr["name"] == "multistep":
        rate = lr["base_lr"] * lr["gamma"] ** sum(epoch >= milestone for milestone in lr["milestones"])
    else:
        rate = lr["base_lr"] * 0.5 * (1 + math.cos(math.pi * now / optimizer["num_epochs"]))
    return rate * min(1.0, (now + 1e-3) / lr["warmup_epochs"]) if lr["warmup_epochs"] else rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
