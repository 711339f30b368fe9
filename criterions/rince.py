"""RINCE, the robust contrastive loss of Chuang et al., "Robust Contrastive Learning against Noisy Views", CVPR 2022."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


class RINCE(nn.Module):
    """Mean over queries of the following, with p = exp(positive score) and S = p + sum of exp(negative scores).

        q = 0:      -log(p / S)                      (InfoNCE)
        0 < q <= 1: (-p^q + (lam S)^q) / q           (the larger q, the more robust to false positives)

    As q approaches 0, the second tends to -log(p / S) + log(lam), so the value jumps by log(lam) at q = 0; the gradient
    is continuous.

    The scores are logits (cosine / temperature). Half-precision scores are converted to float32; float64 stays float64.
    In float32 the value is finite as long as q times the largest score is below 88.

    Args:
        q: 0 to 1; a call may override it.
        lam: the weight of S, above 0.

    Raises:
        UserError: `q` or `lam` is out of its range.
    """

    def __init__(self, q: float, lam: float) -> None:
        super().__init__()
        if not 0 <= q <= 1:
            raise UserError(f"RINCE: q: expected a number from 0 to 1, found {q}; correct loss.args.q")
        if not lam > 0:
            raise UserError(f"RINCE: lam: expected a number above 0, found {lam}; correct loss.args.lam")
        self.q = q
        self.lam = lam

    def extra_repr(self) -> str:
        """Text shown by `print`."""
        return f"q={self.q:g}, lam={self.lam:g}"

    def forward(self, scores_pos: torch.Tensor, scores_neg: torch.Tensor, q: float | None = None) -> torch.Tensor:
        """Return the scalar loss of positive scores (N, 1) and negative scores (N, K); `q` None: the constructor's."""
        q = self.q if q is None else q
        dtype = torch.promote_types(scores_pos.dtype, torch.float32)
        log_p, scores_neg = scores_pos.to(dtype), scores_neg.to(dtype)
        log_sum_neg = scores_neg.logsumexp(dim=1, keepdim=True)
        info_nce = -F.logsigmoid(log_p - log_sum_neg)  # -log(p / S)
        if q == 0:
            return info_nce.mean()
        # (y^q - p^q) / q with y = lam S, from log(y / p). The larger of y^q and p^q is factored out, so that nothing
        # overflows before the result does, and expm1 avoids cancellation at small q.
        log_lam = math.log(self.lam)
        log_ratio = info_nce + log_lam
        log_larger = torch.maximum(log_p, torch.logaddexp(log_p, log_sum_neg) + log_lam)
        sign = torch.where(log_ratio > 0, -1.0, 1.0).to(dtype)
        return (sign * torch.exp(q * log_larger) * torch.expm1(q * sign * log_ratio) / q).mean()
