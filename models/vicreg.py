"""Models for VICReg (Bardes et al. 2022): backbones with expander heads, audio-visual or video only."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.network_blocks import check_widths


class Expander(nn.Module):
    """Head of linear layers with BN and ReLU between them: `(N, in_dim)` to `(N, exp_dim[-1])`.

    Layers keep PyTorch's initialisation, which gives embeddings an initial standard deviation of 0.3. He initialisation
    gives 0.8, closer to the variance term's target, but then learning took twice as long to start
    (notebooks/xid-on-grid.md). Raises `UserError` if `exp_dim` is not a list of widths.
    """

    def __init__(self, in_dim: int, exp_dim: Sequence[int]) -> None:
        super().__init__()
        check_widths("exp_dim", exp_dim)
        layers = []
        for width in exp_dim[:-1]:
            layers += [nn.Linear(in_dim, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            in_dim = width
        self.expansion = nn.Sequential(*layers, nn.Linear(in_dim, exp_dim[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features `(N, in_dim)` to embeddings `(N, exp_dim[-1])`."""
        return self.expansion(x)


class VICRegWrapper(nn.Module):
    """Video and audio backbones, each with an expander; `out_dim` is the embedding dimension."""

    backbone_init = "pytorch"

    def __init__(self, video_model: nn.Module, audio_model: nn.Module, exp_dim: Sequence[int]) -> None:
        super().__init__()
        self.video_model = video_model
        self.audio_model = audio_model
        self.video_exp = Expander(video_model.out_dim, exp_dim)
        self.audio_exp = Expander(audio_model.out_dim, exp_dim)
        self.out_dim = exp_dim[-1]

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            video: `(N, 3, T, H, W)` normalised frames.
            audio: `(N, 1, n_mels, frames)` normalised log-mel spectrograms.

        Returns:
            The video and the audio embeddings, `(N, out_dim)` each.
        """
        video_emb = self.video_exp(self.video_model(video).flatten(1))
        audio_emb = self.audio_exp(self.audio_model(audio).flatten(1))
        return video_emb, audio_emb


class VICRegVideoWrapper(nn.Module):
    """One video backbone and one expander for two clips of the same video; `out_dim` is the embedding dimension."""

    backbone_init = "pytorch"

    def __init__(self, video_model: nn.Module, exp_dim: Sequence[int]) -> None:
        super().__init__()
        self.video_model = video_model
        self.video_exp = Expander(video_model.out_dim, exp_dim)
        self.out_dim = exp_dim[-1]

    def forward(self, clip1: Tensor, clip2: Tensor) -> tuple[Tensor, Tensor]:
        """Embed two clips `(N, 3, T, H, W)` of each video: `(N, out_dim)` each.

        The clips are embedded one after the other, so that BN computes statistics of each batch separately.
        """
        return self._embed(clip1), self._embed(clip2)

    def _embed(self, clip: Tensor) -> Tensor:
        return self.video_exp(self.video_model(clip).flatten(1))
