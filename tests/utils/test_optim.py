"""utils.optim: the fused optimizers against formulas written out in float64."""

import math

import pytest
import torch
from torch import nn

from utils.optim import build_optimizer, learning_rate

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


def test_sgd_without_momentum():
    layer = nn.Linear(1, 1, bias=False)
    cfg = {"name": "sgd", "lr": {"base_lr": RATE}, "weight_decay": 0.0, "betas": (0.0, 0.99)}
    expected = layer.weight.detach() - 2 * RATE
    optimizer = build_optimizer(cfg, layer)
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def schedule(name, **lr):
    return {"num_epochs": 10, "lr": {"name": name, "base_lr": 2.0, "gamma": 0.1, "milestones": [3, 5], **lr}}


def test_a_multistep_rate_falls_at_its_milestones():
    steps = schedule("multistep", warmup_epochs=0)
    assert [learning_rate(steps, epoch, 0.9) for epoch in range(7)] == pytest.approx([2, 2, 2, 0.2, 0.2, 0.02, 0.02])


def test_a_cosine_rate_falls_to_zero():
    cosine = schedule("cosine", warmup_epochs=0)
    for epoch, progress in ((0, 0.0), (2, 0.5), (5, 0.0), (9, 0.99)):
        expected = 1 + math.cos(math.pi * (epoch + progress) / 10)
        assert learning_rate(cosine, epoch, progress) == pytest.approx(expected)
    assert learning_rate(cosine, 9, 0.99) < 1e-3


@pytest.mark.parametrize("name", ["multistep", "cosine"])
def test_a_rate_rises_over_the_warm_up_and_is_never_zero(name):
    warm, plain = schedule(name, warmup_epochs=2), schedule(name, warmup_epochs=0)
    assert 0 < learning_rate(warm, 0, 0.0) < 2e-3
    assert learning_rate(warm, 1, 0.0) == pytest.approx(learning_rate(plain, 1, 0.0) / 2, rel=1e-2)
    assert learning_rate(warm, 2, 0.0) == learning_rate(plain, 2, 0.0)
