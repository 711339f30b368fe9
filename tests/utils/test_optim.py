"""utils.optim: the fused optimizers against formulas written out in float64."""

import pytest
import torch
from torch import nn

from utils.optim import build_optimizer

RATE, DECAY, BETAS, EPS = 0.03, 0.1, (0.9, 0.99), 1e-8


def steps_by_hand(name: str, weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019), SGD with Nesterov's momentum."""
    weight, mean, square = weight.double(), 0, 0
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        if name == "adamw":
            weight = weight - RATE * DECAY * weight
        else:
            gradient = gradient + DECAY * weight
        if name == "sgd":
            mean = BETAS[0] * mean + gradient
            weight = weight - RATE * (gradient + BETAS[0] * mean)
            continue
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        step = (mean / (1 - BETAS[0] ** t)) / ((square / (1 - BETAS[1] ** t)).sqrt() + EPS)
        weight = weight - RATE * step
    return weight


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_steps_are_those_of_the_papers(name):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(7, 5, bias=False)
    gradients = [torch.randn(5, 7, generator=generator) for _ in range(4)]
    expected = steps_by_hand(name, layer.weight.detach(), gradients)
    cfg = {"name": name, "lr": {"base_lr": RATE}, "weight_decay": DECAY, "betas": BETAS}
    optimizer = build_optimizer(cfg, layer)
    assert optimizer.defaults["fused"]
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
