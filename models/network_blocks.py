"""Convolutions, residual blocks and weight initialisation for the backbones and heads.

Activations of the video network are `(N, C, T, H, W)` tensors in `channels_last_3d` memory, i.e. `(N, T, H, W, C)` in
memory order. In this layout a spatial convolution is a 2D convolution of `(N*T, C, H, W)` and a temporal one a 2D
convolution of `(N, C, T, H*W)`. Both are views, so nothing is copied, and 2D kernels are faster (and free of problems
in bf16). The weights keep the shapes and names of the 3D convolutions they replace.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import fused_norm
from utils.errors import UserError

try:
    from models import stem_kernels
except ImportError:  # no Triton, so nothing is compiled for a GPU
    stem_kernels = None


def frames_as_batch(x: Tensor) -> Tensor:
    """View `(N, C, T, H, W)` in channels_last_3d memory as `(N*T, C, H, W)` in channels_last memory."""
    return x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def batch_as_frames(x: Tensor, batch_size: int) -> Tensor:
    """View `(N*T, C, H, W)` in channels_last memory as `(N, C, T, H, W)`; the inverse of `frames_as_batch`."""
    return x.permute(0, 2, 3, 1).unflatten(0, (batch_size, -1)).permute(0, 4, 1, 2, 3)


def places_as_width(x: Tensor) -> Tensor:
    """View `(N, C, T, H, W)` in channels_last_3d memory as `(N, C, T, H*W)` in channels_last memory."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3).permute(0, 3, 1, 2)


def width_as_places(x: Tensor, height_width: Sequence[int]) -> Tensor:
    """View `(N, C, T, H*W)` in channels_last memory as `(N, C, T, H, W)`; the inverse of `places_as_width`."""
    return x.permute(0, 2, 3, 1).unflatten(2, height_width).permute(0, 4, 1, 2, 3)


class _Conv3dIn2D(nn.Conv3d):
    """A bias-free `Conv3d` with "same" padding; subclasses compute it with `conv2d`.

    The weight has the 5D shape in channels_last_3d memory and is viewed as 2D like its input. The 2D kernels and their
    gradients then have the weight's layout, and nothing is converted in a step.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        padding = tuple(k // 2 for k in kernel)
        super().__init__(in_channels, out_channels, tuple(kernel), tuple(stride), padding, bias=False)
        self.weight = nn.Parameter(self.weight.detach().clone(memory_format=torch.channels_last_3d))


class SpatialConv(_Conv3dIn2D):
    """A `(1, k, k)` convolution of `(N, C, T, H, W)`, frame by frame."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, (1, kernel_size, kernel_size), (1, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        weight = frames_as_batch(self.weight)
        frames = F.conv2d(frames_as_batch(x), weight, stride=self.stride[1:], padding=self.padding[1:])
        return batch_as_frames(frames, x.shape[0])


class TemporalConv(_Conv3dIn2D):
    """A `(k, 1, 1)` convolution of `(N, C, T, H, W)`, along time at every position."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, (kernel_size, 1, 1), (stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = places_as_width(self.weight)
        places = F.conv2d(places_as_width(x), weight, stride=self.stride[:2], padding=self.padding[:2])
        return width_as_places(places, x.shape[3:])


class PointwiseConv(_Conv3dIn2D):
    """A 1x1x1 convolution of `(N, C, T, H, W)` with the same stride in time and space: the residual connection.

    Frames that the stride skips are dropped first. With an even number of frames this is a view; with an odd number
    the remaining frames are copied.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, (1, 1, 1), (stride, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        kept = frames_as_batch(x[:, :, :: self.stride[0]])
        return batch_as_frames(F.conv2d(kept, frames_as_batch(self.weight), stride=self.stride[1:]), x.shape[0])


class StemConv(_Conv3dIn2D):
    """A `(3, k, k)` convolution of stride `(1, s, s)`, in 2D: previous, current and next frame as channels.

    GPU matrix units take 16-bit channels in groups of eight. There, the copy that stacks the frames also appends zero
    channels; otherwise cuDNN would copy everything again, forward and backward.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, (3, kernel_size, kernel_size), (1, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):  # before it is tripled
            x = x.to(torch.get_autocast_dtype(x.device.type))
        padded = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, 1, 1))
        taps = [padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]
        weight = self.weight.permute(0, 3, 4, 2, 1).flatten(3)  # (out, k, k, 3 * in)
        missing = -weight.shape[3] % self._channel_group(x)
        if missing:
            taps.append(x.new_zeros(1).expand(*taps[0].shape[:4], missing))
            weight = F.pad(weight, (0, missing))
        frames, weight = torch.cat(taps, dim=4).flatten(0, 1).permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
        return batch_as_frames(F.conv2d(frames, weight, stride=self.stride[1:], padding=self.padding[1:]), x.shape[0])

    @staticmethod
    def _channel_group(x: Tensor) -> int:
        """The number of channels should be a multiple of this."""
        return 8 if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else 1


class SpatialMaxPool(nn.MaxPool3d):
    """A `(1, 3, 3)` max-pool of stride `(1, 2, 2)` on `(N, C, T, H, W)`, frame by frame.

    Compiled for a GPU, it uses our own kernel (`models/stem_kernels.py`): torch.compile's backward pass adds gradients
    with atomics, in no fixed order, to a zeroed float32 tensor that is not in channels_last memory.
    """

    def __init__(self) -> None:
        super().__init__((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        frames = frames_as_batch(x)
        if compiled_for_a_gpu(x):
            pooled = stem_kernels.max_pool(frames)
        else:
            pooled = F.max_pool2d(frames, self.kernel_size[1:], self.stride[1:], self.padding[1:])
        return batch_as_frames(pooled, x.shape[0])


class Stem(nn.Sequential):
    """`StemConv`, BN, `SpatialMaxPool` and ReLU, which after the pool gives the same bits for a quarter of the work.

    Compiled for a GPU, the last three are fused (`models/stem_kernels.py`), unless BN is SyncBN (`utils/sync_bn.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        conv, bn, pool = self
        x = conv(x)
        if compiled_for_a_gpu(x) and type(bn) is nn.BatchNorm3d:
            return batch_as_frames(stem_kernels.bn_relu_pool(frames_as_batch(x), bn), x.shape[0])
        return F.relu(pool(bn(x)))  # the result of `pool` is a view: in place it would be copied


def compiled_for_a_gpu(x: Tensor) -> bool:
    """Whether this call is being compiled for a tensor on a GPU."""
    return torch.compiler.is_compiling() and x.is_cuda


def global_max(x: Tensor) -> Tensor:
    """Map `(N, C, ...)` to the maxima over all positions, `(N, C, 1, ...)`; the first of equal ones gets the gradient.

    Uses indices, because the backward pass of `amax` compares all positions with the maximum. Compiled for a GPU, it
    recomputes the values in float32; none then equals a maximum rounded to bf16, and the gradient, divided among
    none, is NaN.
    """
    places = x.movedim(1, -1).flatten(1, -2)
    return places.max(dim=1).values.view(*x.shape[:2], *(1 for _ in x.shape[2:]))


class R2Plus1dBlock(nn.Module):
    """Residual block of two (spatial, temporal) pairs of convolutions (Tran et al. 2018, "R(2+1)D").

    Spatial - BN - ReLU - temporal - BN - ReLU - spatial - BN - ReLU - temporal, plus the input, then `out_bn` and ReLU.
    The first pair applies `stride` in time and space; temporal convolutions keep the number of channels. If the shape
    changes, the input passes through a strided 1x1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.spatial_conv1 = SpatialConv(in_channels, out_channels, stride=stride)
        self.spatial_bn1 = nn.BatchNorm3d(out_channels)
        self.temporal_conv1 = TemporalConv(out_channels, out_channels, stride=stride)
        self.temporal_bn1 = nn.BatchNorm3d(out_channels)
        self.spatial_conv2 = SpatialConv(out_channels, out_channels)
        self.spatial_bn2 = nn.BatchNorm3d(out_channels)
        self.temporal_conv2 = TemporalConv(out_channels, out_channels)
        self.out_bn = nn.BatchNorm3d(out_channels)
        self.res_conv = None
        if stride != 1 or in_channels != out_channels:
            self.res_conv = PointwiseConv(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C_in, T, H, W)` to `(N, C_out, ceil(T/s), ceil(H/s), ceil(W/s))`."""
        residual = x if self.res_conv is None else self.res_conv(x)
        x = bn_relu(self.spatial_conv1(x), self.spatial_bn1)
        x = bn_relu(self.temporal_conv1(x), self.temporal_bn1)
        x = bn_relu(self.spatial_conv2(x), self.spatial_bn2)
        return bn_relu(self.temporal_conv2(x) + residual, self.out_bn)


def bn_relu(x: Tensor, bn: nn.Module) -> Tensor:
    """Apply `bn`, then ReLU; fused if compiled for a GPU (`models/fused_norm.py`), unless `bn` is SyncBN."""
    if compiled_for_a_gpu(x) and type(bn) is nn.BatchNorm3d:
        return fused_norm.bn_relu(x, bn)
    return relu(bn(x))


def relu(x: Tensor) -> Tensor:
    """ReLU, in place except in bf16, which PyTorch's CPU kernel does three times as fast out of place."""
    return F.relu(x, inplace=x.dtype != torch.bfloat16)


class Conv2DBlock(nn.Module):
    """Two 3x3 convolutions, each with BN and ReLU; the first has the stride. No residual connection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, C_in, H, W)` to `(N, C_out, ceil(H/s), ceil(W/s))`."""
        x = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(x)))


def init_backbone(backbone: nn.Module, init: str) -> None:
    """Give a newly built backbone its first weights, in place.

    Args:
        backbone: A network that has PyTorch's own first weights.
        init: `"he"` for `init_weights`, or `"pytorch"` to keep those it has: uniform and about 2.4 times smaller. BN
            undoes this scale, except where a block adds its input to its last convolution; and Adam's steps turn
            smaller weights further. VICReg learns more with the second; xID does on GRID at full size, but not on the
            demo set (notebooks/xid-on-grid.md).

    Raises:
        UserError: `init` is neither.
    """
    if init not in ("he", "pytorch"):
        raise UserError(f"model.args.backbone_init: unknown {init!r}; use he or pytorch")
    if init == "he":
        backbone.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """Initialise one module in place; for `network.apply(init_weights)`.

    He normal (He et al. 2015) for ReLU: fan-out in convolutions, fan-in in linear layers, zero biases. In xID's heads
    this preserves the signal's scale from layer to layer, so that no bias drowns the differences between clips. BN
    keeps weight one and bias zero.
    """
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(module.bias)


def check_widths(key: str, widths: Sequence[int]) -> None:
    """Raise `UserError` unless `widths`, the YAML's `model.args.<key>`, is a non-empty list of positive integers."""
    is_list = isinstance(widths, (list, tuple)) and len(widths) > 0
    if not is_list or not all(type(width) is int and width > 0 for width in widths):
        raise UserError(f"model.args.{key}: expected a list of layer widths such as [512, 512, 128], found {widths!r}")
