"""BN, ReLU and max-pool in one: equal to the three in float64, ties and what is no number included."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from models.stem_kernels import bn_relu_pool, max_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton's interpreter runs the kernels (conftest.py)
SIZES = [(6, 8), (7, 5), (1, 2), (3, 3)]


def batch_norm(channels):
    torch.manual_seed(0)
    bn = nn.BatchNorm3d(channels).to(DEVICE)
    with torch.no_grad():
        bn.weight.normal_(), bn.bias.normal_(), bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    return bn


def three_operators(frames, bn):
    return F.max_pool2d(bn(frames[:, :, None])[:, :, 0].relu(), 3, stride=2, padding=1)


def forward_and_backward(function, frames, *parameters):
    frames = frames.contiguous(memory_format=torch.channels_last).clone().requires_grad_()
    pooled = function(frames)
    change = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(pooled)
    return pooled.detach(), *torch.autograd.grad(pooled, [frames, *parameters], change)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [12, 80])
@pytest.mark.parametrize("training", [True, False])
def test_one_pass_is_the_three_operators(size, channels, training):
    bn, expected_bn = batch_norm(channels).train(training), batch_norm(channels).double().train(training)
    frames = torch.randn(5, channels, *size).to(DEVICE)
    found = forward_and_backward(lambda x: bn_relu_pool(x, bn), frames, bn.weight, bn.bias)
    expected = forward_and_backward(
        lambda x: three_operators(x, expected_bn), frames.double(), expected_bn.weight, expected_bn.bias
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    for name, value in expected_bn.state_dict().items():
        torch.testing.assert_close(bn.state_dict()[name], value, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_one_pass_in_bf16():
    bn, expected_bn = batch_norm(16), batch_norm(16).double()
    frames = torch.randn(4, 16, 10, 12).bfloat16().to(DEVICE)
    found = forward_and_backward(lambda x: bn_relu_pool(x, bn), frames, bn.weight, bn.bias)
    expected = forward_and_backward(
        lambda x: three_operators(x, expected_bn), frames.double(), expected_bn.weight, expected_bn.bias
    )
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for mine, other in zip(found, expected, strict=True):
        assert F.cosine_similarity(mine.double().flatten(), other.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_alone_is_that_of_pytorch(size, dtype):
    frames = torch.randint(-2, 3, (6, 3, *size), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)  # ties
    found = forward_and_backward(max_pool, frames)
    expected = forward_and_backward(lambda x: F.max_pool2d(x, 3, stride=2, padding=1), frames)
    assert torch.equal(found[0], expected[0])
    tolerance = 1e-6 if dtype == torch.float32 else 0.02  # up to four gradients are added
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


def test_what_is_no_number_is_not_lost():
    frames = torch.randn(2, 4, 6, 6).to(DEVICE)
    frames[1, 2, 3, 3] = float("nan")
    assert max_pool(frames).isnan().nonzero().tolist() == [[1, 2, 1, 1], [1, 2, 1, 2], [1, 2, 2, 1], [1, 2, 2, 2]]
    assert bn_relu_pool(frames, batch_norm(4))[:, 2].isnan().all()
