"""A frozen encoder: features of clips, and a check that the encoder did not change."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from utils.distributed import rank, world_size
from utils.logger import log
from utils.sync_bn import convert_sync_bn, count_rank
from utils.trial import attempt


class FrozenEncoder:
    """A feature extractor that is never trained.

    Args:
        extractor: maps clips (N, 3, T, H, W) to a dict of features (N, D); frozen here and put into eval mode.
        prepare: maps frames (N, T, H, W, 3) and their augmentation (N, 5) or None, on the device, to clips.
        autocast: the context of a forward pass.
        device: where it runs.
        drifts: let `training_features` use batch statistics in BN, and update the running ones, as in the thesis.
        compiled_size: number of clips in the batches that run compiled, as a compiled network is for one shape; of a
            training batch, that of all ranks' shares together. Others run eagerly. None: nothing is compiled. Set to
            None, with a warning, if compilation fails.
    """

    def __init__(
        self,
        extractor: nn.Module,
        prepare: nn.Module,
        autocast: Callable[[], contextlib.AbstractContextManager],
        device: torch.device,
        drifts: bool = False,
        compiled_size: int | None = None,
    ) -> None:
        self.extractor = extractor.to(device).requires_grad_(False).eval()
        self.prepare, self.autocast, self.device, self.drifts = prepare, autocast, device, drifts
        self.hash = self.hash_now()
        self._weights_hash = tensor_hash(dict(self.extractor.named_parameters()))
        self._start = {name: value.clone() for name, value in self.extractor.state_dict().items()}
        if drifts:
            convert_sync_bn(self.extractor)
        self.compiled_size = compiled_size
        if compiled_size is not None:
            self.extractor.compile(dynamic=False)
            self.prepare.compile(dynamic=False)

    def __call__(self, frames: Tensor, augmentation: Tensor | None = None) -> dict[str, Tensor]:
        """Map frames, uint8 (N, T, H, W, 3), and their augmentation (N, 5) to float32 features (N, D) by name."""
        return self._run(frames, augmentation, compiled=len(frames) == self.compiled_size)

    @torch.no_grad()
    def _run(self, frames: Tensor, augmentation: Tensor | None, compiled: bool) -> dict[str, Tensor]:
        on_device = [None if x is None else x.to(self.device, non_blocking=True) for x in (frames, augmentation)]
        if compiled:
            features, reason = attempt(lambda: self._features(self.extractor, self.prepare, on_device))
            if reason is None:
                return features
            log.warning("compile: failed, going on without: %s", reason)
            self.compiled_size = None
        return self._features(self.extractor.forward, self.prepare.forward, on_device)

    def _features(self, extractor: Callable, prepare: Callable, on_device: list) -> dict[str, Tensor]:
        with self.autocast():
            features = extractor(prepare(*on_device))
        return {name: value.float() for name, value in features.items()}

    def training_features(self, batch: Mapping, clip_shape: Iterable[int]) -> dict[str, Tensor]:
        """Features of this rank's share of a training batch, on the CPU; empty for an empty share.

        Every rank must call it for every batch. `clip_shape` is (T, H, W, 3).
        """
        has_clips = "frames" in batch
        if not has_clips and (not self.drifts or world_size() == 1):
            return {}
        self.extractor.train(self.drifts)
        count_rank(self.extractor, has_clips)  # an empty share passes a dummy: the other ranks' BN waits for it
        frames = batch["frames"] if has_clips else torch.zeros(1, *clip_shape, dtype=torch.uint8)
        features = self._run(frames, batch.get("video_aug"), compiled=len(frames) == self._share())
        self.extractor.eval()
        return {name: value.cpu() for name, value in features.items()} if has_clips else {}

    def _share(self) -> int | None:
        """The size of this rank's share of a whole training batch (`datasets.evaluation.SharedBatches`), to compile."""
        if self.compiled_size is None:
            return None
        begin, end = (self.compiled_size * other // world_size() for other in (rank(), rank() + 1))
        return end - begin

    def reset(self, drift: Mapping[str, Tensor] | None = None) -> None:
        """Restore the initial state, with stored BN statistics if given."""
        self.extractor.load_state_dict(self._start | dict(drift or {}))

    def drift(self) -> dict[str, Tensor]:
        """The BN statistics if they drift, else an empty dict."""
        if not self.drifts:
            return {}
        weights = {name for name, _ in self.extractor.named_parameters()}
        state = self.extractor.state_dict()
        return {name: x.detach().cpu().clone() for name, x in state.items() if name not in weights}

    def hash_now(self) -> str:
        """SHA-256 of weights and BN statistics (16 hexadecimal digits)."""
        return tensor_hash(self.extractor.state_dict())

    def check(self) -> str:
        """Return `hash_now()`. Raises RuntimeError if weights, or BN statistics that do not drift, have changed."""
        after = self.hash_now()
        weights = tensor_hash(dict(self.extractor.named_parameters()))
        if weights != self._weights_hash or (after != self.hash and not self.drifts):
            raise RuntimeError(f"the frozen encoder has changed: its hash was {self.hash} and is now {after}")
        return after


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors (16 hexadecimal digits)."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
