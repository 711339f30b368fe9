"""VICReg: Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization", ICLR 2022."""

import torch
import torch.nn.functional as F
from torch import nn

from criterions.stats import spread_and_dims
from utils.distributed import gather_with_grad, world_size
from utils.errors import UserError


class VICLoss(nn.Module):
    """The loss sim_coeff * sim + std_coeff * std + cov_coeff * cov (eq. 6 of the paper), with

        sim: the mean squared difference of x and y, of the rank's batch                  (eq. 5, divided by D)
        std: the mean over dimensions of relu(1 - sqrt(var + 1e-4)), averaged over x and y    (eq. 1, halved)
        cov: the sum of squared off-diagonal covariances / D, of x plus y                     (eqs. 3 and 4)

    sim and std are scaled as in the authors' code, for which the coefficients are meant. Variances and covariances are
    those of the batch over all ranks, by n - 1. Every rank counts them in full: the mean over ranks of the loss, and of
    its gradients as DDP averages them, are those of one process with the whole batch. Computed in float32 regardless of
    autocast; float64 stays float64.

    Each call sets `stats`, 0-dim tensors on the device: the terms `sim`, `std`, `cov` without coefficients; for the
    batch over all ranks `pos_cos` and `neg_cos` (mean cosine of x with its own y and with the others'; alike until
    something is learned), `video_spread` and `audio_spread` of x and y (0 collapsed, 1 uniform on the sphere),
    `video_dims` and `audio_dims` (number of directions used).

    While nothing is learned yet, cov_coeff's weight beside sim_coeff's grows with D (notebooks/xid-on-grid.md).
    """

    def __init__(self, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0) -> None:
        super().__init__()
        self.sim_coeff = sim_coeff
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.stats: dict[str, torch.Tensor] = {}

    def extra_repr(self) -> str:
        """Text shown by `print`."""
        return f"sim {self.sim_coeff:g}, std {self.std_coeff:g}, cov {self.cov_coeff:g}"

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the rank's scalar loss of embeddings x and y (N, D). Every rank must pass the same N.

        Raises:
            UserError: there is only one row over all ranks, which has no variance.
        """
        if len(x) * world_size() < 2:
            raise UserError(
                "VICLoss: expected a batch of at least 2 over all processes, found 1; raise dataset.batch_size"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.to(dtype), y.to(dtype)
            all_x, all_y = gather_with_grad(x), gather_with_grad(y)
            std_x, cov_x = _variance_and_covariance_terms(all_x)
            std_y, cov_y = _variance_and_covariance_terms(all_y)
            sim, std, cov = F.mse_loss(x, y), (std_x + std_y) / 2, cov_x + cov_y
            self.stats = {"sim": sim.detach(), "std": std.detach(), "cov": cov.detach(), **_measure(all_x, all_y)}
            return self.sim_coeff * sim + self.std_coeff * std + self.cov_coeff * cov


def _variance_and_covariance_terms(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hinge on standard deviations, and the sum of squared off-diagonal covariances / D, of a batch (n, D)."""
    n, dim = z.shape
    z = z - z.mean(dim=0)
    variance = z.square().sum(dim=0) / (n - 1)
    hinge = F.relu(1 - torch.sqrt(variance + 1e-4)).mean()
    if n < dim:
        # Z'Z and ZZ' have the same sum of squares: n x n numbers instead of D x D. With at most n - 1 nonzero
        # eigenvalues, the covariance is large enough off its diagonal for the difference not to lose digits.
        off_diagonal = (z @ z.T / (n - 1)).square().sum() - variance.square().sum()
    else:
        covariance = z.T @ z / (n - 1)
        covariance.diagonal().zero_()
        off_diagonal = covariance.square().sum()
    return hinge, off_diagonal / dim


@torch.no_grad()
def _measure(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean cosines, spread and effective dimensions of the embeddings x and y (N, D), named as in `stats`."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    n, positive = len(x), (x * y).sum(dim=1).mean()
    negative = ((x.sum(dim=0) * y.sum(dim=0)).sum() - n * positive) / (n * max(1, n - 1))
    return {
        "pos_cos": positive,
        "neg_cos": negative,
        **spread_and_dims(x, y),
    }
