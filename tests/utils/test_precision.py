"""What a loss scale, of which only GPUs make use, does on a CPU."""

import pytest
import torch
from torch import nn

from utils.precision import Precision


def test_after_a_step_that_is_left_out_the_loss_scaler_goes_on():
    precision, net = Precision("fp32", torch.device("cpu")), nn.Linear(3, 1)
    precision._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]

    precision.backward(net(torch.full((1, 3), float("nan"))).sum())
    assert precision.gradient_norm(optimizer).isnan()
    precision.leave_out_step()
    optimizer.zero_grad()
    assert precision.state_dict()["scale"] == 512.0
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))

    precision.backward(net(torch.ones(1, 3)).sum())
    assert precision.gradient_norm(optimizer).item() == 2.0  # unscaled: four gradients of 1
    precision.step(optimizer)
    assert all(torch.allclose(p, old - 0.1) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_stays_in_float32_is_not_rounded_to_tf32(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    Precision(name, torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
