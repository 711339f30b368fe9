"""Statistics for the training log that distinguish a collapse from learning when the loss alone does not."""

import torch


@torch.no_grad()
def spread(unit: torch.Tensor) -> torch.Tensor:
    """Spread of unit rows `(N, D)`: 0 if all are the same (collapse), near 1 if uniform on the sphere.

    The mean over dimensions of the standard deviation (N - 1) over rows, times sqrt(D); a 0-dim tensor. NaN for a
    single row.
    """
    if len(unit) < 2:
        return unit.new_full((), torch.nan)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


@torch.no_grad()
def effective_dims(unit: torch.Tensor) -> torch.Tensor:
    """Number of directions in which unit rows `(N, D)` differ: 1 on a line, at most min(N - 1, D), 0 if all are equal.

    The participation ratio of the covariance's eigenvalues l, (sum of l)^2 / (sum of l^2); a 0-dim tensor. For rows
    that differ only by rounding it describes the rounding: look at `spread` first.
    """
    centred = unit - unit.mean(dim=0)
    gram = centred @ centred.T  # has the covariance's eigenvalues, up to a factor
    tiny = torch.finfo(gram.dtype).tiny
    return gram.diagonal().sum().square() / gram.square().sum().clamp_min(tiny)


def spread_and_dims(video: torch.Tensor, audio: torch.Tensor) -> dict[str, torch.Tensor]:
    """`spread` and `effective_dims` of unit video and audio embeddings `(N, D)`, named as in a criterion's `stats`."""
    return {
        "video_spread": spread(video),
        "audio_spread": spread(audio),
        "video_dims": effective_dims(video),
        "audio_dims": effective_dims(audio),
    }
