"""Linear classifiers at several learning rates, trained side by side on the same frozen features."""

import contextlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifiers import MOSTWrapper
from utils.checkpoint import load_weights
from utils.optim import build_optimizer, learning_rate, set_learning_rate


class LinearProbe:
    """One `MOSTWrapper` and optimizer per learning rate (`base_lr`, `other_lrs`), each trained as it would be alone.

    All have the same initial weights and in each step the same dropout, drawn from PyTorch's global stream.

    Args:
        cfg: configuration of an evaluation.
        names: feature names.
        n_classes: width of the logits.
        device: device of the classifiers.
    """

    def __init__(self, cfg: Mapping, names: Sequence[str], n_classes: int, device: torch.device) -> None:
        optimizer, args = cfg["optimizer"], cfg["model"]["args"]
        self.device, self.epoch = device, 0
        self.heads: dict[float, MOSTWrapper] = {}
        self.optimizers: dict[float, torch.optim.Optimizer] = {}
        self.recipes: dict[float, dict] = {}
        options = {key: args[key] for key in ("feat_dims", "use_bn", "l2_norm", "use_dropout", "dropout")}
        for rate in dict.fromkeys([optimizer["lr"]["base_lr"], *optimizer["other_lrs"]]):
            torch.manual_seed(cfg["seed"])
            self.heads[rate] = MOSTWrapper(names, n_classes, **options).to(device)
            self.recipes[rate] = {**optimizer, "lr": {**optimizer["lr"], "base_lr": rate}}
            self.optimizers[rate] = build_optimizer(self.recipes[rate], self.heads[rate])

    def step(self, features: Mapping[str, Tensor], labels: Tensor, epoch: int, progress: float) -> dict[str, Tensor]:
        """Train each classifier for one step on features (N, D) by name and labels (N,); return their losses.

        `progress` is the fraction of the epoch completed, 0 to 1.
        """
        losses = {}
        for rate, head in self.heads.items():
            with self._stream_of(rate):
                by_feature = {name: F.cross_entropy(x, labels) for name, x in head.train()(features).items()}
            set_learning_rate(self.optimizers[rate], learning_rate(self.recipes[rate], epoch, progress))
            self.optimizers[rate].zero_grad()
            sum(by_feature.values()).backward()
            self.optimizers[rate].step()
            losses |= {f"loss {name} {rate:g}": loss.detach() for name, loss in by_feature.items()}
        return losses

    def _stream_of(self, rate: float) -> contextlib.AbstractContextManager:
        """The context of a head's dropout: all draw from the same place of the stream, which only the last advances."""
        if rate == list(self.heads)[-1]:
            return contextlib.nullcontext()
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def state_dict(self) -> dict:
        """Return plain data for a checkpoint."""
        return {
            "epoch": self.epoch,
            "heads": {rate: head.state_dict() for rate, head in self.heads.items()},
            "optimizers": {rate: optimizer.state_dict() for rate, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: Mapping, source: str) -> None:
        """Resume from a checkpoint; `source` names it in errors."""
        self.epoch = state["epoch"]
        for rate, head in self.heads.items():
            load_weights(head, state["heads"][rate], source)
            self.optimizers[rate].load_state_dict(state["optimizers"][rate])

    @torch.no_grad()
    def logits(self, features: Mapping[str, Tensor]) -> dict[float, dict[str, Tensor]]:
        """Map features (videos, clips, D) to logits (videos, clips, classes) on the CPU, by rate and feature."""
        flat = {name: value.flatten(0, 1).to(self.device) for name, value in features.items()}
        shape = next(iter(features.values())).shape[:2]
        logits = {}
        for rate, head in self.heads.items():
            head.eval()
            logits[rate] = {name: value.cpu().view(*shape, -1) for name, value in head(flat).items()}
        return logits


def mean_losses(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each loss over steps that have the same names."""
    if not losses:
        return {}
    return {name: torch.stack([step[name] for step in losses]).mean().item() for name in losses[0]}
