"""BN and ReLU as one are the two in float64, forward, backward and in what BN keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.fused_norm import bn_relu

SHAPES = [(3, 8, 4, 6, 5), (4, 8, 7, 9)]


def batch_norm(shape, training):
    torch.manual_seed(0)
    bn = (nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm2d)(shape[1])
    with torch.no_grad():
        bn.weight.normal_(), bn.bias.normal_(), bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    return bn.train(training)


def forward_and_backward(function, x, bn):
    x = x.clone().requires_grad_()
    y = function(x, bn)
    change = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y)
    return y.detach(), *torch.autograd.grad(y, [x, bn.weight, bn.bias], change)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_one_is_the_two(shape, training):
    bn, expected_bn = batch_norm(shape, training), batch_norm(shape, training).double()
    x = 3 + 2 * torch.randn(shape)
    found = forward_and_backward(bn_relu, x, bn)
    expected = forward_and_backward(lambda x, bn: F.relu(bn(x)), x.double(), expected_bn)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    for name, value in expected_bn.state_dict().items():
        torch.testing.assert_close(bn.state_dict()[name], value, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_one_in_bf16():
    bn, expected_bn = batch_norm(SHAPES[0], True), batch_norm(SHAPES[0], True).double()
    x = (3 + 2 * torch.randn(SHAPES[0])).bfloat16()
    found = forward_and_backward(bn_relu, x, bn)
    expected = forward_and_backward(lambda x, bn: F.relu(bn(x)), x.double(), expected_bn)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for mine, other in zip(found, expected, strict=True):
        assert F.cosine_similarity(mine.double().flatten(), other.flatten(), dim=0) > 0.9999
