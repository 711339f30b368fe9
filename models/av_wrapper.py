"""Audio-visual model for cross-modal instance discrimination (xID): two backbones, two projection heads."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.network_blocks import check_widths, init_weights
from utils.errors import UserError


class Projection(nn.Module):
    """Head of linear layers with ReLU between them: `(N, in_dim)` to `(N, proj_dim[-1])`.

    `proj_norm` "bn" adds a BN without affine parameters after the last layer: each dimension then has zero mean and
    unit variance over the batch, which keeps a direction common to all embeddings from growing. None (the default) adds
    nothing. Raises `UserError` for any other `proj_norm`, or if `proj_dim` is not a list of widths.
    """

    def __init__(self, in_dim: int, proj_dim: Sequence[int], proj_norm: str | None = None) -> None:
        super().__init__()
        check_widths("proj_dim", proj_dim)
        if proj_norm not in (None, "bn"):
            raise UserError(f"model.args.proj_norm: unknown {proj_norm!r}; use null or bn")
        layers = []
        for width in proj_dim:
            layers += [nn.Linear(in_dim, width), nn.ReLU(inplace=True)]
            in_dim = width
        layers.pop()
        if proj_norm == "bn":
            layers.append(nn.BatchNorm1d(in_dim, affine=False))
        self.projection = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features `(N, in_dim)` to embeddings `(N, proj_dim[-1])`, not normalised to unit length."""
        return self.projection(x)


class AVWrapper(nn.Module):
    """Video and audio backbones, each with a projection head; `out_dim` is the embedding dimension."""

    backbone_init = "he"

    def __init__(
        self, video_model: nn.Module, audio_model: nn.Module, proj_dim: Sequence[int], proj_norm: str | None = None
    ) -> None:
        super().__init__()
        self.video_model = video_model
        self.audio_model = audio_model
        self.video_proj = Projection(video_model.out_dim, proj_dim, proj_norm)
        self.audio_proj = Projection(audio_model.out_dim, proj_dim, proj_norm)
        self.out_dim = proj_dim[-1]

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            video: `(N, 3, T, H, W)` normalised frames.
            audio: `(N, 1, n_mels, frames)` normalised log-mel spectrograms.

        Returns:
            The video and the audio embeddings, `(N, out_dim)` each. The criterion normalises them.
        """
        video_emb = self.video_proj(self.video_model(video).flatten(1))
        audio_emb = self.audio_proj(self.audio_model(audio).flatten(1))
        return video_emb, audio_emb
