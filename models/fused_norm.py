"""Fused BN and ReLU for torch.compile on a GPU: the backward pass recomputes ReLU's mask from BN's input.

PyTorch's own two, compiled, store that mask with one byte per element in the forward pass and read it twice in the
backward pass, in addition to that input. All arithmetic is in float32.
"""

import torch
from torch import Tensor, nn


def bn_relu(x: Tensor, bn: nn.BatchNorm3d) -> Tensor:
    """Apply `bn`, then ReLU, to `x` (N, C, ...)."""
    return _NormalisedReLU.apply(x, bn.weight, bn.bias, *statistics(x, bn), bn.training)


def statistics(x: Tensor, bn: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Return the mean and reciprocal standard deviation (C,) with which `bn` normalises `x` (N, C, ...).

    In training mode they are the batch's, and the running statistics are updated (Ioffe and Szegedy 2015, algorithm 1).
    """
    if not bn.training:
        return bn.running_mean, torch.rsqrt(bn.running_var + bn.eps)
    with torch.no_grad():
        var, mean = torch.var_mean(x.float(), all_but_channels(x), correction=0)
        count = x.numel() // x.shape[1]
        bn.num_batches_tracked.add_(1)
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var * (count / (count - 1)), bn.momentum)
        return mean, torch.rsqrt(var + bn.eps)


def gradient_of_input(
    x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, d_weight: Tensor, d_bias: Tensor, of_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficients a, b, c (C,) of BN's input gradient, a * (output gradient) + b * x + c.

    Args:
        scale: rstd * weight.
        d_weight, d_bias: the gradients of BN's parameters.
        of_batch: whether mean and rstd are computed from `x`, and so depend on it.
    """
    if not of_batch:
        return scale, torch.zeros_like(scale), torch.zeros_like(scale)
    count = x.numel() // x.shape[1]
    slope = scale * rstd * d_weight / count
    # c is not computed from b: Triton 3.6 fails on some kernels that store b and compute c from it
    return scale, -slope, slope * mean - scale * d_bias / count


def all_but_channels(x: Tensor) -> list[int]:
    """All dimensions of (N, C, ...) except C."""
    return [0, *range(2, x.dim())]


def of_channels(values: Tensor, x: Tensor) -> Tensor:
    """View `values` (C,) so that they broadcast over `x` (N, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


class _NormalisedReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        of_batch: bool,
    ) -> Tensor:
        scale = rstd * weight
        shift = bias - mean * scale
        ctx.save_for_backward(x, mean, rstd, scale, shift)
        ctx.of_batch = of_batch
        y = (x * of_channels(scale, x) + of_channels(shift, x)).relu()
        return y if y.dtype == x.dtype else y.to(x.dtype)  # as in utils/sync_bn.py

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift = ctx.saved_tensors
        passed = torch.where(x * of_channels(scale, x) + of_channels(shift, x) > 0, d_y, 0)
        d_bias = passed.float().sum(all_but_channels(x))
        d_weight = (passed * (x - of_channels(mean, x))).sum(all_but_channels(x)) * rstd
        a, b, c = gradient_of_input(x, mean, rstd, scale, d_weight, d_bias, ctx.of_batch)
        d_x = passed * of_channels(a, x) + x * of_channels(b, x) + of_channels(c, x)
        return d_x if d_x.dtype == x.dtype else d_x.to(x.dtype), d_weight, d_bias, None, None, None
