"""BN over the batches of all processes, on any device: PyTorch's own needs GPUs and a sample on every rank."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.distributed import gather_with_grad, world_size


class SharedBatchNorm(_BatchNorm):
    """A BN of (N, C, ...) whose mean and variance, in training, are those of the batches of all ranks together.

    A rank whose `counted` is False adds nothing to them: it passes a dummy because it has no sample of this batch.
    """

    counted = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), found {tuple(input.shape)}")

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        others = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        exact = torch.float32 if input.is_cuda else torch.float64  # on CPUs the order of a sum then makes no difference
        x, share = input.float(), float(self.counted)
        own = torch.full((1,), share * input.numel() / input.shape[1], dtype=exact, device=input.device)
        count = gather_with_grad(own).sum()
        mean = gather_with_grad(share * x.sum(others, dtype=exact).unsqueeze(0)).sum(0) / count
        centred = x - mean.float().view(shape)
        var = gather_with_grad(share * centred.square().sum(others, dtype=exact).unsqueeze(0)).sum(0) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * count / (count - 1).clamp_min(1)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(unbiased.float(), self.momentum)
        scale = torch.rsqrt(var + self.eps).float() * (self.weight if self.affine else 1)
        y = centred * scale.view(shape)
        return (y + self.bias.view(shape) if self.affine else y).to(input.dtype)


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
            module.counted = counted
