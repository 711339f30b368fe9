"""Video backbone: R(2+1)D."""

import torch
from torch import Tensor, nn

from models.network_blocks import R2Plus1dBlock, SpatialMaxPool, Stem, StemConv, global_max, init_backbone
from utils.errors import UserError

BLOCKS_PER_STAGE = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class R2Plus1d(nn.Module):
    """R(2+1)D video network (Tran et al. 2018, "A closer look at spatiotemporal convolutions"), `out_dim` 512.

    A 3x7x7 stem and four stages of 64, 128, 256 and 512 channels; the last three halve time, height and width. `depth`
    is 10, 18 or 34; depth 10 has one block per stage and no block index in names. `init` names the first weights
    (`network_blocks.init_backbone`). Raises `UserError` for another depth or `init`.
    """

    strides = (8, 32, 32)  # in time, height and width, up to the last stage

    def __init__(self, depth: int = 18, init: str = "he") -> None:
        super().__init__()
        if depth not in list(BLOCKS_PER_STAGE):
            allowed = ", ".join(map(str, BLOCKS_PER_STAGE))
            raise UserError(f"model.args.video_backbone_args.depth: unknown depth {depth!r} of R2Plus1d; use {allowed}")
        self.out_dim = 512
        blocks = BLOCKS_PER_STAGE[depth]
        self.conv1 = Stem(StemConv(3, 64, kernel_size=7, stride=2), nn.BatchNorm3d(64), SpatialMaxPool())
        self.conv2x = _stage(64, 64, blocks[0], stride=1)
        self.conv3x = _stage(64, 128, blocks[1], stride=2)
        self.conv4x = _stage(128, 256, blocks[2], stride=2)
        self.conv5x = _stage(256, 512, blocks[3], stride=2)
        init_backbone(self, init)

    def forward(self, video: Tensor, return_embs: bool = False) -> Tensor | dict[str, Tensor]:
        """Map clips `(N, 3, T, H, W)` to the global maximum `(N, 512, 1, 1, 1)` of the last stage.

        With `return_embs`, returns a dict of `(N, C, T, H, W)` features: `conv1` (after the max-pool), `conv2x`,
        `conv3x`, `conv4x`, `conv5x` and `pool`. Input in channels_last_3d memory is used as is; other input is
        converted once.
        """
        x = video.contiguous(memory_format=torch.channels_last_3d)
        embs = {}
        for name in ("conv1", "conv2x", "conv3x", "conv4x", "conv5x"):
            x = embs[name] = getattr(self, name)(x)
        embs["pool"] = global_max(x)
        return embs if return_embs else embs["pool"]


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Module:
    first = R2Plus1dBlock(in_channels, out_channels, stride)
    if num_blocks == 1:
        return first
    return nn.Sequential(first, *(R2Plus1dBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))
