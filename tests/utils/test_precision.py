"""What a loss scale, of which only GPUs make use, does on a CPU."""

import pytest
import torch
from torch import nn

from utils import precision
from utils.errors import UserError
from utils.precision import Precision


def test_after_a_step_that_is_left_out_the_loss_scaler_goes_on():
    fp32, net = Precision("fp32", torch.device("cpu")), nn.Linear(3, 1)
    fp32._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]

    fp32.backward(net(torch.full((1, 3), float("nan"))).sum())
    assert fp32.gradient_norm(optimizer).isnan()
    fp32.leave_out_step()
    optimizer.zero_grad()
    assert fp32.state_dict()["scale"] == 512.0
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))

    fp32.backward(net(torch.ones(1, 3)).sum())
    assert fp32.gradient_norm(optimizer).item() == 2.0  # unscaled: four gradients of 1
    fp32.step(optimizer)
    assert all(torch.allclose(p, old - 0.1) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_stays_in_float32_is_not_rounded_to_tf32(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    Precision(name, torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


@pytest.fixture
def gpu_of(monkeypatch):
    """A function that gives this machine's GPU a compute capability."""

    def set_capability(*capability):
        precision._default.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # restored at the end
    yield set_capability
    torch.set_float32_matmul_precision("highest")
    precision._default.cache_clear()


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_a_gpu_older_than_a_precision_is_a_mistake(gpu_of, name):
    gpu_of(7, 5)
    with pytest.raises(UserError, match=f"precision: {name} needs .* 8.0 or more, found 7.5; use fp16 or fp32"):
        Precision(name, torch.device("cuda"))
    assert Precision("fp16", torch.device("cuda")).name == "fp16"
    gpu_of(8, 0)
    assert Precision(name, torch.device("cuda")).name == name


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_the_default_of_an_older_gpu_is_fp16_which_the_log_says_once(gpu_of, caplog):
    caplog.set_level("INFO", "avssrl")
    gpu_of(9, 0)
    assert Precision(None, torch.device("cuda")).name == "bf16" and caplog.text == ""
    gpu_of(7, 0)
    assert [Precision(None, torch.device("cuda")).name for _ in range(2)] == ["fp16", "fp16"]
    assert caplog.text.count("precision: fp16, since this GPU (compute capability 7.0)") == 1
    assert Precision(None, torch.device("cpu")).name == "fp32"
