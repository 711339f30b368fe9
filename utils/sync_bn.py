"""Synchronised BN on any device: PyTorch's SyncBatchNorm needs GPUs and a sample on every rank."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.compiling import compiles
from utils.distributed import all_reduce_sum, gather, world_size
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.video_dataset import EpochBatches


class _Normalise(torch.autograd.Function):
    """BN (Ioffe and Szegedy 2015, algorithm 1) with the mean and variance of the counted samples of all ranks.

    If no sample counts, they are the running ones. Also returns them, and the number of values counted in a channel.
    `x` is the only tensor of its size kept for the backward pass. The communication is one gather forward and one sum
    backward, which torch.compile includes in its graph. On a CPU channel sums are float64, to hide their order.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        counted: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own_mean, own_var = _moments(x)
        own_count = counted.to(own_mean.dtype) * (x.numel() // x.shape[1])
        shares = gather(torch.stack([own_mean, own_var, own_count.expand_as(own_mean)])[None])  # (W, 3, C)
        means, variances, counts = shares.unbind(1)
        found = counts.sum(0)
        count = found.clamp_min(1)
        mean = torch.where(found > 0, (counts * means).sum(0) / count, running_mean)
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        var = torch.where(found > 0, var, running_var)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, counted, mean, rstd, count)
        ctx.mark_non_differentiable(mean, var, found)
        scale = rstd * weight  # not (x - mean) * scale: torch.compile would save x - mean in float32 for the backward
        y = _wide(x) * _channels(scale, x) + _channels(bias - mean * scale, x)
        # a no-op cast would lose all gradients under torch.compile in PyTorch 2.11
        return y if y.dtype == x.dtype else y.to(x.dtype), mean, var, found

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, d_y: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        x, weight, counted, mean, rstd, count = ctx.saved_tensors
        d_y, centred = _wide(d_y), _wide(x) - _channels(mean, x)
        sums = torch.stack([_sum(d_y, mean.dtype), _sum(d_y * centred, mean.dtype)])
        d_mean, d_var = all_reduce_sum(sums) * counted / count
        d_x = (d_y - _channels(d_mean, x) - centred * _channels(d_var * rstd.square(), x)) * _channels(rstd * weight, x)
        d_weight, d_bias = (values.to(weight.dtype) for values in (sums[1] * rstd, sums[0]))
        return d_x.to(x.dtype), d_weight, d_bias, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) in the compute dtype of `x`, reshaped to broadcast over `x` (N, C, ...)."""
    return values.to(torch.promote_types(x.dtype, torch.float32)).view(1, -1, *[1] * (x.dim() - 2))


def _sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.sum([0, *range(2, x.dim())], dtype=dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of `x` (N, C, ...), in float32 on a GPU, float64 on a CPU."""
    x = _wide(x)
    if x.is_cuda:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return mean, var
    count, x = x.numel() // x.shape[1], x.double()  # before squaring: rounding could make E[x^2] less than mean^2
    mean = _sum(x, torch.float64) / count
    return mean, (_sum(x.square(), torch.float64) / count - mean.square()).clamp_min(0)


class SyncBN(_BatchNorm):
    """BN of (N, C, ...) that in training uses the mean and variance of the batches of all ranks together.

    A rank excluded by `count_rank` does not contribute: it has no sample of this batch and passes a dummy. If that is
    so on all ranks, the running statistics are used, and left as they are.
    """

    def __init__(self, num_features: int, eps: float, momentum: float, affine: bool) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.register_buffer("counted", torch.ones(()), persistent=False)  # a tensor, as a number would be compiled in

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), found {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        weight = self.weight if self.affine else torch.ones_like(self.running_mean)
        bias = self.bias if self.affine else torch.zeros_like(self.running_mean)
        running = self.running_mean, self.running_var
        y, mean, var, count = _Normalise.apply(input, weight, bias, self.counted, *running, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += count.any()
            unbiased = var * count.clamp_min(1) / (count - 1).clamp_min(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return y


def synchronise_bn(model: nn.Module, device: torch.device, compiled: bool | None) -> nn.Module:
    """Compute BN statistics over all processes; a single process keeps its BN.

    PyTorch's SyncBatchNorm needs GPUs, and has its own kernels, at each of which torch.compile breaks its graph: on a
    CPU, and in a model to be compiled (for `compiled` see `compiles`), BN becomes `SyncBN` instead.
    """
    if world_size() == 1:
        return model
    if device.type == "cuda" and not compiles(compiled, device):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return convert_sync_bn(model)


def convert_sync_bn(model: nn.Module) -> nn.Module:
    """Replace every BN of `model`, in place, by a `SyncBN` with the same parameters.

    A single process on a GPU keeps the faster original. On a CPU even a single process gets `SyncBN`, to round in the
    same way as several: BN over the few values of a small batch amplifies rounding until it affects accuracies.
    """
    if world_size() == 1 and next(model.parameters()).is_cuda:
        return model
    for parent in list(model.modules()):
        for name, bn in list(parent.named_children()):
            if isinstance(bn, _BatchNorm) and not isinstance(bn, SyncBN):
                shared = SyncBN(bn.num_features, bn.eps, bn.momentum, bn.affine)
                shared.load_state_dict(bn.state_dict())
                if bn.affine:
                    shared.weight, shared.bias = bn.weight, bn.bias
                setattr(parent, name, shared.to(bn.running_mean).train(bn.training))
    return model


def convert_head_sync_bn(model: nn.Module) -> None:
    """With several processes, synchronise the BN of xID's heads (`proj_norm: bn`), on any device.

    This BN removes what all embeddings have in common, which a rank's few clips alone would estimate poorly. The
    backbones' BN stays local to each rank, as in the thesis.
    """
    if world_size() > 1:
        convert_sync_bn(model.video_proj)
        convert_sync_bn(model.audio_proj)


def check_bn_batch(model: nn.Module, batches: "EpochBatches", clip_shape: tuple[int, ...]) -> None:
    """Raise UserError if a BN would get a single value per channel, which has no variance.

    BN in heads is over single vectors, BN at the end of a backbone over the positions that its strides leave of a clip
    with `clip_shape` (T, H, W, 3).
    """
    smallest = min(batches.sizes) // (batches.accumulate * batches.world_size)
    if smallest > 1:
        return
    strides = getattr(model.video_model, "strides", ())
    places = math.prod(-(-size // stride) for size, stride in zip(clip_shape, strides, strict=False))
    found = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)]
    if strides and places == 1:
        found.append("the video backbone's last norm, for such small clips,")
    if found:
        raise UserError(
            f"dataset.batch_size: a forward pass would be of one clip, and {found[0]} is a BN, which needs more; raise "
            "it, lower accumulate or run fewer processes; dataset.train.drop_last: true drops a small last batch"
        )


def count_rank(model: nn.Module, counted: bool) -> None:
    """Set whether this rank's next batch counts in the statistics of every `SyncBN` in `model`."""
    for module in model.modules():
        if isinstance(module, SyncBN):
            module.counted.fill_(counted)
