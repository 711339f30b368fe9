"""Classifiers on top of a video backbone: linear ones on frozen features, and one fine-tuned with the backbone."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from utils.config import FEATURES
from utils.errors import UserError

POOLINGS = {
    "AdaptiveMaxPool3d": nn.AdaptiveMaxPool3d,
    "AdaptiveAvgPool3d": nn.AdaptiveAvgPool3d,
    "MaxPool3d": nn.MaxPool3d,
    "AvgPool3d": nn.AvgPool3d,
}


def build_pooling(text: str | None) -> nn.Module:
    """Build the pooling that a YAML's `pooling_op` names, such as `AdaptiveMaxPool3d((1, 1, 1))`; None: identity.

    Its argument is one integer or three. Raises UserError for anything else.
    """
    if text is None:
        return nn.Identity()
    match = re.fullmatch(r"(?:(?:torch\.)?nn\.)?(\w+)\((?:(\d+)|\((\d+), ?(\d+), ?(\d+)\))\)", text.strip())
    if match is None or match[1] not in POOLINGS:
        raise UserError(
            f"model.args: pooling {text!r}: expected null or one of {', '.join(POOLINGS)} with one integer or "
            "three, such as AdaptiveMaxPool3d((1, 1, 1))"
        )
    size = int(match[2]) if match[2] else tuple(int(match[i]) for i in (3, 4, 5))
    if size == 0 or (isinstance(size, tuple) and 0 in size):
        raise UserError(f"model.args: pooling {text!r}: expected sizes above 0")
    return POOLINGS[match[1]](size)


class FeatureExtractor(nn.Module):
    """Pooled features of a video backbone, by name: clips (N, 3, T, H, W) to a dict of (N, feat_dim).

    The names are `feat_names`; a repeated one, with different pooling, gets a number: `pool-2`.

    Args:
        video_model: a backbone whose `forward(video, return_embs=True)` returns a dict of features.
        feat_names, pooling_ops, feat_dims: one value per feature, or a single one for all.

    Raises:
        UserError: lists differ in length, or a pooling is unknown; in `forward`, an unknown feature or another width.
    """

    def __init__(
        self,
        video_model: nn.Module,
        feat_names: Sequence[str],
        pooling_ops: Sequence[str | None] = (None,),
        feat_dims: Sequence[int] = (512,),
    ) -> None:
        super().__init__()
        self.video_model = video_model
        count = len(feat_names)
        self.sources = list(feat_names)
        self.names = unique_names(feat_names)
        self.pools = nn.ModuleList(map(build_pooling, one_each("pooling_ops", pooling_ops, count)))
        self.widths = one_each("feat_dims", feat_dims, count)

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        embs = self.video_model(video, return_embs=True)
        features = {}
        for name, source, pool, width in zip(self.names, self.sources, self.pools, self.widths, strict=True):
            features[name] = _pooled(embs, source, pool, width)
        return features

    @torch.no_grad()
    def check(self, clip_shape: Sequence[int]) -> None:
        """Pass an empty clip of shape (T, H, W, 3) through the backbone, so that a mistake shows before any work.

        Leaves the backbone in eval mode. Raises UserError for an unknown feature or another width.
        """
        frames, height, width, channels = clip_shape
        self.eval()(torch.zeros(1, channels, frames, height, width))


class MOSTWrapper(nn.Module):
    """Linear classifiers, one for each feature: a dict of (N, feat_dim) to a dict of logits (N, n_classes).

    Before its linear layer a feature is optionally scaled to unit length (`l2_norm`), normalised by a BN without affine
    parameters (`use_bn`) and passed through dropout (`use_dropout`, with rate `dropout`).

    Args:
        names: feature names, from `FeatureExtractor.names`.
        feat_dims, use_bn, l2_norm: one value per feature, or a single one for all.
    """

    def __init__(
        self,
        names: Sequence[str],
        n_classes: int,
        feat_dims: Sequence[int] = (512,),
        use_bn: Sequence[bool] = (False,),
        l2_norm: Sequence[bool | None] = (False,),
        use_dropout: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        rate = dropout if use_dropout else 0.0
        options = [one_each("feat_dims", feat_dims, len(names)), one_each("use_bn", use_bn, len(names))]
        options.append(one_each("l2_norm", l2_norm, len(names)))
        heads = [LinearClassifier(width, n_classes, bn, bool(l2), rate) for width, bn, l2 in zip(*options, strict=True)]
        self.classifiers = nn.ModuleDict(dict(zip(names, heads, strict=True)))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: classifier(features[name]) for name, classifier in self.classifiers.items()}


class LinearClassifier(nn.Module):
    """Features (N, in_dim) to logits (N, n_classes), in float32 regardless of autocast."""

    def __init__(
        self, in_dim: int, n_classes: int, use_bn: bool = False, l2_norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.l2_norm = l2_norm
        self.bn = nn.BatchNorm1d(in_dim, affine=False) if use_bn else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(in_dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.l2_norm:
                x = nn.functional.normalize(x, dim=1)
            if self.bn is not None:
                x = self._normalised(x)
            return self.classifier(self.dropout(x))

    def _normalised(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:  # one has no variance: use the running statistics
            return nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var)
        return self.bn(x)


class ClassificationWrapper(nn.Module):
    """A backbone and a classifier, trained together: clips (N, 3, T, H, W) to logits (N, n_classes).

    Args:
        video_model: a backbone whose `forward(video, return_embs=True)` returns a dict of features.
        n_classes: width of the logits.
        feat_name, pooling_op, feat_dim: the feature, its pooling, and its width after pooling.
        use_dropout, dropout: whether to apply dropout before the linear layer, and its rate.
    """

    def __init__(
        self,
        video_model: nn.Module,
        n_classes: int,
        feat_name: str = "pool",
        pooling_op: str | None = None,
        feat_dim: int = 512,
        use_dropout: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.video_model = video_model
        self.feat_name, self.feat_dim = feat_name, feat_dim
        self.pooling = build_pooling(pooling_op)
        self.dropout = nn.Dropout(dropout if use_dropout else 0.0)
        self.head = LinearClassifier(feat_dim, n_classes)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits (N, n_classes). `keep` (N, feat_dim) scales the features in place of the module's dropout."""
        embs = self.video_model(video, return_embs=True)
        features = _pooled(embs, self.feat_name, self.pooling, self.feat_dim)
        if keep is None:
            return self.head(self.dropout(features))
        return self.head(features * keep)

    def let_backbone_learn(self, learn: bool) -> None:
        """Set whether the backbone is trained: its parameters on the way to the feature.

        DDP would wait in vain for gradients of the stages after it.
        """
        self.video_model.requires_grad_(learn)
        for name in FEATURES[FEATURES.index(self.feat_name) + 1 :]:
            if hasattr(self.video_model, name):
                getattr(self.video_model, name).requires_grad_(False)

    def draw_dropout(self, batch_size: int, key: Sequence[int]) -> Tensor:
        """Draw a batch's dropout mask (batch_size, feat_dim): 0 where dropped, else 1 / (1 - rate).

        It depends only on `key`, so that every rank can draw the whole batch's mask and take its own rows.
        """
        rate = self.dropout.p
        uniform = np.random.default_rng(tuple(key)).random((batch_size, self.feat_dim), dtype=np.float32)
        return torch.from_numpy((uniform >= rate) / np.float32(max(1 - rate, 1e-6)))


def one_each(key: str, values: Sequence, count: int) -> list:
    """Return one value per feature; a single one is repeated. UserError if the counts differ."""
    values = list(values)
    if len(values) not in (1, count):
        raise UserError(f"model.args.{key}: {len(values)} values for {count} feat_names; give one each, or one for all")
    return values * count if len(values) == 1 else values


def unique_names(names: Sequence[str]) -> list[str]:
    """Number repeated names: pool, pool-2."""
    counts = [list(names[:i]).count(name) for i, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, counts, strict=True)]


def _pooled(embs: dict[str, Tensor], name: str, pool: nn.Module, width: int) -> Tensor:
    if name not in embs:
        raise UserError(f"model.args: the backbone has no feature {name!r}; it has {', '.join(embs)}")
    try:
        feature = pool(embs[name]).flatten(1)
    except torch.OutOfMemoryError:  # a RuntimeError
        raise
    except RuntimeError as error:  # e.g. a kernel larger than the feature
        raise UserError(f"model.args: {pool} of feature {name}, {tuple(embs[name].shape)}: {error}") from None
    if feature.shape[1] != width:
        raise UserError(
            f"model.args.feat_dims (feat_dim in fine-tuning): {width} for feature {name}, which has {feature.shape[1]} "
            f"values a clip; set it to that, or pool: AdaptiveMaxPool3d((1, 1, 1)) leaves {embs[name].shape[1]}"
        )
    return feature
