"""Audio backbone: a 2D convolutional network on log-mel spectrograms."""

import torch
from torch import Tensor, nn

from models.network_blocks import Conv2DBlock, global_max, init_backbone
from utils.errors import UserError


class Conv2DNet(nn.Module):
    """Audio network of nine 2D convolutions (Morgado et al. 2021, "AVID"), `out_dim` 512.

    A 7x7 stem of stride 2 and four blocks of 64, 128, 256 and 512 channels; the first three halve both axes. `init`
    names the first weights (`network_blocks.init_backbone`). The only `depth` is 10, AVID's name for it. Raises
    `UserError` for another, or for an unknown `init`.
    """

    def __init__(self, depth: int = 10, init: str = "he") -> None:
        super().__init__()
        if depth != 10:
            raise UserError(f"model.args.audio_backbone_args.depth: unknown depth {depth!r} of Conv2DNet; use 10")
        self.out_dim = 512
        self.conv1 = nn.Sequential(
            nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
        self.block1 = Conv2DBlock(64, 64, stride=2)
        self.block2 = Conv2DBlock(64, 128, stride=2)
        self.block3 = Conv2DBlock(128, 256, stride=2)
        self.block4 = Conv2DBlock(256, 512, stride=1)
        init_backbone(self, init)
        self.to(memory_format=torch.channels_last)

    def forward(self, audio: Tensor, return_embs: bool = False) -> Tensor | dict[str, Tensor]:
        """Map spectrograms `(N, 1, n_mels, frames)` to the global maximum `(N, 512, 1, 1)` of the last block.

        With `return_embs`, returns a dict of `(N, C, H, W)` features: `conv1`, `block1`, `block2`, `block3`,
        `block4` and `pool`.
        """
        # With one channel all memory formats coincide; these strides mark the tensor as channels_last to the kernels.
        x = audio.squeeze(1).contiguous().unsqueeze(-1).permute(0, 3, 1, 2)
        embs = {}
        for name in ("conv1", "block1", "block2", "block3", "block4"):
            x = embs[name] = getattr(self, name)(x)
        embs["pool"] = global_max(x)
        return embs if return_embs else embs["pool"]
