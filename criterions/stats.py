"""Numbers for the training log that tell a collapse from learning, where the loss alone does not."""

import torch


@torch.no_grad()
def spread(unit: torch.Tensor) -> torch.Tensor:
    """How widely unit rows `(N, D)` lie: 0 where all are the same (collapse), near 1 where uniform on the sphere.

    It is the mean over dimensions of the standard deviation (N - 1) over rows, times sqrt(D); a 0-dim tensor. NaN of a
    single row, which tells nothing.
    """
    if len(unit) < 2:
        return unit.new_full((), torch.nan)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


@torch.no_grad()
def effective_dims(unit: torch.Tensor) -> torch.Tensor:
    """Along how many directions unit rows `(N, D)` differ: 1 on a line, at most min(N - 1, D), 0 where all are one.

    It is the participation ratio of the covariance's eigenvalues l, (sum of l)^2 / (sum of l^2); a 0-dim tensor. Of
    rows that differ by rounding alone it is that of the rounding: look at `spread` first.
    """
    centred = unit - unit.mean(dim=0)
    gram = centred @ centred.T  # has the covariance's eigenvalues but for a factor
    tiny = torch.finfo(gram.dtype).tiny
    return gram.diagonal().sum().square() / gram.square().sum().clamp_min(tiny)


def spread_and_dims(video: torch.Tensor, audio: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both of unit video and audio embeddings `(N, D)`, by the names of the log: what a criterion's `stats` hold."""
    return {
        "video_spread": spread(video),
        "audio_spread": spread(audio),
        "video_dims": effective_dims(video),
        "audio_dims": effective_dims(audio),
    }
