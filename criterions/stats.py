"""Numbers for the training log that tell a collapse from learning, where the loss alone does not."""

import torch


@torch.no_grad()
def spread(unit: torch.Tensor) -> torch.Tensor:
    """How widely unit rows `(N, D)` lie: 0 where all are the same (collapse), near 1 where uniform on the sphere.

    It is the mean over dimensions of the standard deviation over rows, times sqrt(D); a 0-dim tensor.
    """
    return unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
