"""Triton kernels for BN, ReLU and max-pool of the video stem: one pass over its output forward, one backward.

That output is the largest of a step, and a step is limited by memory. Compiled as separate operators, they make two
passes over it forward (after the statistics) and three backward; here it is one each:

* Forward: the pool normalises elements on the fly. For each window it stores the winning element (as output by the
  convolution) and its position.
* Backward: only elements that won a window receive a gradient. The sums in BN's gradient therefore run over windows,
  and an element's gradient is a * (sum of its windows' gradients) + b * x + c, with a, b and c per channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from models.fused_norm import gradient_of_input, of_channels, statistics

CELLS = 32  # windows per program


def bn_relu_pool(x: Tensor, bn: nn.BatchNorm3d) -> Tensor:
    """`bn`, ReLU and the 3x3 max-pool of stride 2: frames (M, C, H, W) to (M, C, ceil(H/2), ceil(W/2)).

    All frames are in channels_last memory.
    """
    return _NormalisedPool.apply(x, bn.weight, bn.bias, *statistics(x, bn), bn.training)


def max_pool(x: Tensor) -> Tensor:
    """The 3x3 max-pool of stride 2: frames (M, C, H, W) to (M, C, ceil(H/2), ceil(W/2))."""
    return _MaxPool.apply(x)


class _NormalisedPool(torch.autograd.Function):
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
        y, winners, places = pool_normalised(x, mean, rstd, weight, bias, relu=True)
        ctx.save_for_backward(x, weight, mean, rstd, winners, places)
        ctx.of_batch = of_batch
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, winners, places = ctx.saved_tensors
        passed = torch.where(places >= 0, d_y, 0)
        d_bias = passed.float().sum((0, 2, 3))
        d_weight = (passed * (winners - of_channels(mean, x))).sum((0, 2, 3)) * rstd
        parts = gradient_of_input(x, mean, rstd, rstd * weight, d_weight, d_bias, ctx.of_batch)
        return unpool_scaled(d_y, places, x, *parts), d_weight, d_bias, None, None, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1], device=x.device)
        zeros = torch.zeros_like(ones)
        y, _, places = pool_normalised(x, zeros, ones, ones, zeros, relu=False)
        ctx.save_for_backward(x, ones, places)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> Tensor:
        x, ones, places = ctx.saved_tensors
        zeros = torch.zeros_like(ones)
        return unpool_scaled(d_y, places, x, ones, zeros, zeros)


@torch.library.custom_op("avssrl::pool_normalised", mutates_args=())
def pool_normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Find in each 3x3 window (stride 2, padding 1) the element with the largest (x - mean) * rstd * weight + bias.

    A single operator, so that torch.compile neither stores float32 intermediates nor recomputes them.

    Args:
        x: frames (M, C, H, W).
        mean, rstd, weight, bias: float32 (C,).

    Returns:
        The largest values (with `relu`, ReLU of them), (M, C, ceil(H/2), ceil(W/2)); the elements of `x` that they
        come from; these elements' int8 positions in the windows, 3 * row + column, or -1 where ReLU blocks them.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y, winners, places = _pooled(x, mean, rstd, weight, bias, relu)
    _pool[_grid(y)](x, mean, rstd, weight, bias, y, winners, places, y.numel(), *_sizes(x), relu)
    return y, winners, places


@torch.library.custom_op("avssrl::unpool_scaled", mutates_args=())
def unpool_scaled(d_y: Tensor, places: Tensor, x: Tensor, scale: Tensor, times: Tensor, plus: Tensor) -> Tensor:
    """Return scale * (sum of gradients of the windows that an element of `x` won) + times * x + plus, (M, C, H, W).

    Args:
        d_y: the windows' gradients (M, C, ceil(H/2), ceil(W/2)).
        places: positions of the winning elements, from `pool_normalised`.
        x: frames (M, C, H, W).
        scale, times, plus: float32 (C,).
    """
    d_y, places, x = (t.contiguous(memory_format=torch.channels_last) for t in (d_y, places, x))
    d_x = torch.empty_like(x)
    _unpool[_grid(d_y)](d_y, places, x, scale, times, plus, d_x, d_y.numel(), *_sizes(x))
    return d_x


@pool_normalised.register_fake
def _pooled(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    frames, channels, height, width = x.shape
    shape = (frames, channels, -(-height // 2), -(-width // 2))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y), torch.empty_like(y, dtype=torch.int8)


@unpool_scaled.register_fake
def _(d_y: Tensor, places: Tensor, x: Tensor, scale: Tensor, times: Tensor, plus: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _sizes(x: Tensor) -> tuple[int, ...]:
    """Kernel arguments for frames (M, C, H, W): H, W, C, and windows and channels per program."""
    return *x.shape[2:], x.shape[1], CELLS, min(64, triton.next_power_of_2(x.shape[1]))


def _grid(pooled: Tensor) -> tuple[int, int]:
    """Launch grid over all windows and channels."""
    channels, cells, block = _sizes(pooled)[2:]
    return triton.cdiv(pooled.numel() // channels, cells), triton.cdiv(channels, block)


@triton.jit
def _pool(
    x,
    mean,
    rstd,
    weight,
    bias,
    y,
    winners,
    places,
    elements,
    height,
    width,
    channels,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    RELU: tl.constexpr,
):
    cell, channel, there, frame, row, column = _cells(elements, height, width, channels, CELLS, BLOCK)
    known = channel < channels
    scale = tl.load(rstd + channel, known) * tl.load(weight + channel, known)
    shift = tl.load(bias + channel, known) - tl.load(mean + channel, known) * scale
    best = tl.full((CELLS, BLOCK), float("-inf"), tl.float32)
    winner = tl.zeros((CELLS, BLOCK), tl.float32)
    won = tl.zeros((CELLS, BLOCK), tl.int8)
    for place in tl.static_range(9):
        top, left = 2 * row + place // 3 - 1, 2 * column + place % 3 - 1
        inside = there & ((top >= 0) & (top < height) & (left >= 0) & (left < width))[:, None]
        at = ((frame * height + top) * width + left) * channels
        element = tl.load(x + at[:, None] + channel[None, :], mask=inside, other=0).to(tl.float32)
        value = element * scale[None, :] + shift[None, :]
        better = inside & ((value > best) | (value != value))  # NaN wins: it must not be lost
        best = tl.where(better, value, best)
        winner = tl.where(better, element, winner)
        won = tl.where(better, place, won).to(tl.int8)
    at = cell[:, None] * channels + channel[None, :]
    if RELU:
        won = tl.where(best > 0, won, -1).to(tl.int8)
        best = tl.where(best < 0, 0, best)  # NaN stays
    tl.store(y + at, best.to(y.dtype.element_ty), mask=there)
    tl.store(winners + at, winner.to(winners.dtype.element_ty), mask=there)
    tl.store(places + at, won, mask=there)


@triton.jit
def _unpool(
    d_y, places, x, scale, times, plus, d_x, elements, height, width, channels, CELLS: tl.constexpr, BLOCK: tl.constexpr
):
    # Rows 2i and 2i + 1 lie only in windows i and i + 1, likewise columns: each 2x2 block needs four windows.
    cell, channel, there, frame, row, column = _cells(elements, height, width, channels, CELLS, BLOCK)
    high, wide = (height + 1) // 2, (width + 1) // 2
    below, beside = there & (row + 1 < high)[:, None], there & (column + 1 < wide)[:, None]
    at = cell[:, None] * channels + channel[None, :]
    d_here, won_here = _window(d_y, places, at, there)
    d_beside, won_beside = _window(d_y, places, at + channels, beside)
    d_below, won_below = _window(d_y, places, at + wide * channels, below)
    d_across, won_across = _window(d_y, places, at + (wide + 1) * channels, below & beside)

    known = channel < channels
    a, b, c = tl.load(scale + channel, known), tl.load(times + channel, known), tl.load(plus + channel, known)
    at = (((frame * height + 2 * row) * width + 2 * column) * channels)[:, None] + channel[None, :]
    total = tl.where(won_here == 4, d_here, 0)
    _place(x, d_x, at, there, total, a, b, c)
    right = there & (2 * column + 1 < width)[:, None]
    total = tl.where(won_here == 5, d_here, 0) + tl.where(won_beside == 3, d_beside, 0)
    _place(x, d_x, at + channels, right, total, a, b, c)
    lower = there & (2 * row + 1 < height)[:, None]
    total = tl.where(won_here == 7, d_here, 0) + tl.where(won_below == 1, d_below, 0)
    _place(x, d_x, at + width * channels, lower, total, a, b, c)
    total = tl.where(won_here == 8, d_here, 0) + tl.where(won_beside == 6, d_beside, 0)
    total += tl.where(won_below == 2, d_below, 0) + tl.where(won_across == 0, d_across, 0)
    _place(x, d_x, at + (width + 1) * channels, right & lower, total, a, b, c)


@triton.jit
def _cells(elements, height, width, channels, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's windows and channels, a mask of those that exist, and the windows' frame, row and column."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (cell < elements // channels)[:, None] & (channel < channels)[None, :]
    high, wide = (height + 1) // 2, (width + 1) // 2
    return cell, channel, there, cell // (high * wide), cell // wide % high, cell % wide


@triton.jit
def _window(d_y, places, at, there):
    return tl.load(d_y + at, mask=there, other=0).to(tl.float32), tl.load(places + at, mask=there, other=-1)


@triton.jit
def _place(x, d_x, at, there, total, a, b, c):
    element = tl.load(x + at, mask=there, other=0).to(tl.float32)
    gradient = a[None, :] * total + b[None, :] * element + c[None, :]
    tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=there)
