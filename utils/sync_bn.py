"""BN over the batches of all processes, on any device: PyTorch's own needs GPUs and a sample on every rank."""

import logging

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.compiling import compiles
from utils.distributed import all_reduce_sum, gather, rank, world_size

log = logging.getLogger("avssrl")


class _SharedMoments(torch.autograd.Function):
    """Mean and variance (C,) of the samples of all ranks, and their number, from each rank's own.

    One gather forward and one sum backward, both of which torch.compile takes into its graph.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, own_mean: Tensor, own_var: Tensor, own_count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shares = gather(torch.stack([own_mean, own_var, own_count.expand_as(own_mean)])[None])  # (W, 3, C)
        means, variances, counts = shares.unbind(1)
        weights = counts / counts.sum(0)
        mean = (weights * means).sum(0)
        var = (weights * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(weights[rank()], own_mean - mean)
        return mean, var, counts.sum(0)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, d_mean: Tensor, d_var: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        weight, offset = ctx.saved_tensors
        d_mean, d_var = all_reduce_sum(torch.stack([d_mean, d_var]))
        return weight * (d_mean + 2 * offset * d_var), weight * d_var, None


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of float32 `x` (N, C, ...); on a CPU float64, which hides the order of a sum."""
    others = [0, *range(2, x.dim())]
    if x.is_cuda:
        var, mean = torch.var_mean(x, others, correction=0)
        return mean, var
    count = x.numel() // x.shape[1]
    mean, square = (part.sum(others, dtype=torch.float64) / count for part in (x, x.square()))
    return mean, square - mean.square()


class SharedBatchNorm(_BatchNorm):
    """A BN of (N, C, ...) whose mean and variance, in training, are those of the batches of all ranks together.

    A rank that `count_rank` leaves out adds nothing to them: it passes a dummy because it has no sample of this batch.
    """

    def __init__(self, num_features: int, eps: float, momentum: float, affine: bool) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.register_buffer("counted", torch.ones(()), persistent=False)  # a tensor: a number would be compiled in

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), found {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float()
        own_mean, own_var = _moments(x)
        own_count = self.counted.to(own_mean.dtype) * (x.numel() // x.shape[1])
        mean, var, count = _SharedMoments.apply(own_mean, own_var, own_count)
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * count / (count - 1).clamp_min(1)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(unbiased.float(), self.momentum)
        scale = torch.rsqrt(var + self.eps).float() * (self.weight if self.affine else 1)
        y = (x - mean.float().view(shape)) * scale.view(shape)
        return (y + self.bias.view(shape) if self.affine else y).to(input.dtype)


def synchronise_bn(model: nn.Module, device: torch.device, compiled: bool | None) -> nn.Module:
    """Let BN take its statistics over all processes: on GPUs only, a run on CPUs says that it does not.

    PyTorch's SyncBatchNorm has kernels of its own, and torch.compile, which cannot look into it, cuts its graph at
    each: a model to be compiled (`compiled` as `compiles` takes it) gets `SharedBatchNorm`.
    """
    if world_size() == 1:
        return model
    if device.type != "cuda":
        log.warning("BN is not synchronised: PyTorch's SyncBatchNorm needs GPUs; each process uses its own statistics")
        return model
    return share_bn(model) if compiles(compiled, device) else nn.SyncBatchNorm.convert_sync_batchnorm(model)


def share_bn(model: nn.Module) -> nn.Module:
    """Replace every BN of `model`, in place, by a `SharedBatchNorm` with the same parameters.

    One process on a GPU keeps the faster one. On a CPU one process, too, gets these, so that it rounds as many do: BN
    of the few values of a small batch magnifies rounding until it can be seen in an accuracy.
    """
    if world_size() == 1 and next(model.parameters()).is_cuda:
        return model
    for parent in list(model.modules()):
        for name, bn in list(parent.named_children()):
            if isinstance(bn, _BatchNorm) and not isinstance(bn, SharedBatchNorm):
                shared = SharedBatchNorm(bn.num_features, bn.eps, bn.momentum, bn.affine)
                shared.load_state_dict(bn.state_dict())
                if bn.affine:
                    shared.weight, shared.bias = bn.weight, bn.bias
                setattr(parent, name, shared.to(bn.running_mean.device))
    return model


def count_rank(model: nn.Module, counted: bool) -> None:
    """Say whether this rank's next batch counts in the statistics of the `SharedBatchNorm` in `model`."""
    for module in model.modules():
        if isinstance(module, SharedBatchNorm):
            module.counted.fill_(counted)
