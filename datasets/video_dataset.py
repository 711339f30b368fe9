"""Samples from a list of videos: the order of clips, how they are cut, and how bad files are handled."""

import gc
import hashlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from datasets import sampling
from datasets.decoded import DecodedFile, DecodedVideos
from datasets.decoding import DecodeError, VideoFile
from datasets.preprocessing import (
    crop_and_resize,
    draw_audio_augmentation,
    draw_video_augmentation,
    no_video_augmentation,
    num_spectrogram_frames,
)
from datasets.staging import StagedLoader, Staging
from utils.errors import UserError
from utils.memory import give_back_freed_memory, keep_freed_memory
from utils.processes import cores

log = logging.getLogger("avssrl")

MAX_ATTEMPTS = 10  # places tried for one sample; a video that comes again is skipped


class VideoList:
    """Videos below one root, with optional labels. Names are stored in one block of shared memory.

    A Python list of names would be copied page by page into every worker, since reading changes reference counts.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.root = Path(root)
        self.classes = tuple(classes)
        encoded = np.array([os.fsencode(name) for name in names], dtype=bytes)
        block = encoded.view(np.uint8).reshape(len(names), encoded.dtype.itemsize)
        self._names = torch.from_numpy(block.copy()).share_memory_()
        labels = np.full(len(names), -1) if labels is None else np.asarray(labels)
        self.labels = torch.from_numpy(labels.astype(np.int64)).share_memory_()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return a video's path relative to the root."""
        return os.fsdecode(self._names[index].numpy().tobytes().rstrip(b"\0"))

    def names(self) -> list[str]:
        """Return all names in order."""
        return [self.name(index) for index in range(len(self))]

    def path(self, index: int) -> Path:
        """Return a video's path."""
        return self.root / self.name(index)

    def subset(self, rows: Sequence[int]) -> "VideoList":
        """Return a new list of the videos in `rows`."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        names = [self.name(row) for row in rows.tolist()]
        return VideoList(self.root, names, self.labels[rows].numpy(), self.classes)

    @property
    def fingerprint(self) -> str:
        """Hash of all names in order, without the root, to compare the lists of two runs."""
        digest = hashlib.sha256(str(tuple(self._names.shape)).encode())
        digest.update(self._names.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"{len(self)} videos{classes} below {self.root} (list {self.fingerprint})"


@dataclass(frozen=True)
class ClipRecipe:
    """How a sample is cut from a video. Durations in seconds, rates in Hz, sizes in pixels; see `from_config`."""

    video_seconds: float
    video_fps: float
    crop_size: int
    frame_size: int
    transforms: str
    resize: str
    area: tuple[float, float]
    aspect: tuple[float, float]
    color: tuple[float, ...]
    augment: bool
    audio_seconds: float = 0.0  # 0: no sound
    sample_rate: int = 0
    spec_params: dict = field(default_factory=dict, hash=False)
    tfmask_params: dict = field(default_factory=dict, hash=False)

    @classmethod
    def from_config(cls, dataset: dict, augment: bool) -> "ClipRecipe":
        """Create the recipe from a configuration's `dataset` section; an evaluation's has no sound."""
        sound = {}
        if "audio_srate" in dataset:
            sound = {
                "audio_seconds": dataset["audio_clip_duration"],
                "sample_rate": dataset["audio_srate"],
                "spec_params": dict(dataset["spec_params"]),
                "tfmask_params": dict(dataset["tfmask_params"]),
            }
        return cls(
            video_seconds=dataset["video_clip_duration"],
            video_fps=dataset["video_fps"],
            crop_size=dataset["crop_size"],
            frame_size=dataset["frame_size"] or round(dataset["crop_size"] * 8 / 7),
            transforms=dataset["transforms"],
            resize=dataset["resize"],
            area=(dataset["min_area"], 1.0),
            aspect=tuple(dataset["aspect_ratio"]),
            color=tuple(dataset["color"]),
            augment=augment,
            **sound,
        )

    @property
    def num_frames(self) -> int:
        """Number of frames in a clip."""
        return max(1, round(self.video_seconds * self.video_fps))

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape of a clip's frames: (T, crop_size, crop_size, 3)."""
        return self.num_frames, self.crop_size, self.crop_size, 3

    @property
    def test_scale(self) -> float:
        """Side of a centre crop, as a share of the frame's."""
        return self.crop_size / self.frame_size

    @property
    def mean_scale(self) -> float:
        """Side of a training crop, as a share of the frame's: the mean over areas that are drawn uniformly.

        Exact for square frames and boxes. Otherwise large boxes are drawn again if they do not fit: crops are smaller.
        """
        if not self.augment or self.transforms != "msc+color":
            return self.test_scale
        low, high = self.area
        return 2 / 3 * (high**1.5 - low**1.5) / (high - low) if low < high else high**0.5

    @property
    def num_bytes(self) -> int:
        """The most that a clip and its sound take in a batch, in bytes."""
        size = math.prod(self.clip_shape) + 4096  # index, label, augmentation, alignment
        if self.sample_rate:
            samples = round(self.audio_seconds * self.sample_rate)
            size += 4 * samples + self.spec_params["n_mels"] + self.num_spectrogram_frames
        return size

    @property
    def num_spectrogram_frames(self) -> int:
        """Number of time frames in a clip's spectrogram."""
        samples = round(self.audio_seconds * self.sample_rate)
        return num_spectrogram_frames(samples, self.spec_params["n_fft"], self.spec_params["hop_length"])


def epoch_order(num_videos: int, clips_per_video: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the video at each position of an epoch, each equally often: int64 (num_videos * clips_per_video,)."""
    order = np.tile(np.arange(num_videos), clips_per_video)
    return np.random.default_rng((seed, epoch)).permutation(order) if shuffle else order


class TrainingClips(Dataset):
    """Random clips for training. Keys are (epoch, position); the sample of a key depends only on the seed.

    A sample is a clip and its sound or, with `pairs`, two clips of a video without sound (VICReg-Video). A video that
    cannot be decoded is replaced by another one about half an epoch later and listed in the sample's `failures`; one of
    the rows `without_sound`, which is known to have none, is replaced without being listed. With `decoded`, each video
    is decoded only once. From epoch `plain_from` on (the first is 0), nothing is augmented: frames are as in a test.
    """

    def __init__(
        self,
        videos: VideoList,
        recipe: ClipRecipe,
        clips_per_video: int,
        seed: int,
        pairs: bool = False,
        decoded: DecodedVideos | None = None,
        without_sound: Sequence[int] = (),
        plain_from: int | None = None,
    ) -> None:
        self.videos, self.recipe, self.pairs, self.decoded = videos, recipe, pairs, decoded
        self.clips_per_video, self.seed, self.plain_from = clips_per_video, seed, plain_from
        self._left_out = np.zeros(len(videos), dtype=bool)
        self._left_out[list(without_sound)] = True
        self._order = (None, None)

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def order(self, epoch: int) -> np.ndarray:
        """Return the video at each position of this epoch."""
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.videos), self.clips_per_video, self.seed, epoch)
        return self._order[1]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, position = key
        order, tried, failures = self.order(epoch), set(), []
        augment = self.recipe.augment and (self.plain_from is None or epoch < self.plain_from)
        for attempt, video in enumerate(islice(self._candidates(order, position), MAX_ATTEMPTS)):
            if video in tried:
                continue
            tried.add(video)
            rng = np.random.default_rng((self.seed, epoch, position, attempt))
            try:
                return self._load(video, rng, augment) | {"failures": failures}
            except DecodeError as error:
                failures.append((self.videos.name(video), str(error)))
        return {"failures": failures}

    def _candidates(self, order: np.ndarray, position: int) -> Iterator[int]:
        """Yield the video at a position of the order, and those from half an epoch later on."""
        for place in range(len(order) + 1):
            step = len(order) // 2 + place if place else 0
            video = int(order[(position + step) % len(order)])
            if not self._left_out[video]:
                yield video

    def _load(self, video: int, rng: np.random.Generator, augment: bool) -> dict:
        sample = {"index": video, "label": int(self.videos.labels[video])}
        with open_video(self.videos, video, self.decoded) as file:
            if self.pairs:
                span = file.span("video")
                for name, start in zip(
                    ("", "_2"), sampling.two_apart(span, self.recipe.video_seconds, rng), strict=True
                ):
                    sample["frames" + name], sample["video_aug" + name] = self._frames(file, start, rng, augment)
            else:
                lengths = self.recipe.video_seconds, self.recipe.audio_seconds
                starts = sampling.audio_visual(*both_spans(file), *lengths, rng)
                # sound first: it mostly begins earlier, and only an unread file is still at its first packet
                sample["waveform"] = read_waveform(file, starts[1], self.recipe)
                sample["frames"], sample["video_aug"] = self._frames(file, starts[0], rng, augment)
                sample["gain"], sample["mel_mask"], sample["time_mask"] = self._audio_augmentation(rng, augment)
        return sample

    def _frames(
        self, file: VideoFile | DecodedFile, start: float, rng: np.random.Generator, augment: bool
    ) -> tuple[torch.Tensor, np.ndarray]:
        if not augment:
            return read_frames(file, start, self.recipe), no_video_augmentation()
        frames = read_frames(file, start, self.recipe, rng)
        return frames, draw_video_augmentation(list(self.recipe.color), rng)

    def _audio_augmentation(self, rng: np.random.Generator, augment: bool) -> tuple[np.float32, np.ndarray, np.ndarray]:
        mels, times = self.recipe.spec_params["n_mels"], self.recipe.num_spectrogram_frames
        if not augment:
            return np.float32(1), np.zeros(mels, dtype=bool), np.zeros(times, dtype=bool)
        return draw_audio_augmentation(mels, times, self.recipe.tfmask_params, rng)


class EvenClips(Dataset):
    """Evaluation clips: `windows` per video, evenly spaced, each centred in its audio clip.

    A sample holds frames (windows, T, H, W, 3) and waveforms (windows, L); a video that cannot be decoded gives only
    `index` and `failures`. With `decoded`, each video is decoded only once.
    """

    def __init__(
        self, videos: VideoList, recipe: ClipRecipe, windows: int, decoded: DecodedVideos | None = None
    ) -> None:
        self.videos, self.recipe, self.windows, self.decoded = videos, recipe, windows, decoded

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        try:
            return self._load(index) | {"failures": []}
        except DecodeError as error:
            return {"index": index, "failures": [(self.videos.name(index), str(error))]}

    def _load(self, index: int) -> dict:
        recipe = self.recipe
        sample = {"index": index, "label": int(self.videos.labels[index])}
        with open_video(self.videos, index, self.decoded) as file:
            lengths = recipe.video_seconds, recipe.audio_seconds
            starts = sampling.audio_visual_evenly(*both_spans(file), *lengths, self.windows)
            sample["waveform"] = torch.stack([read_waveform(file, audio, recipe) for _, audio in starts])
            sample["frames"] = torch.stack([read_frames(file, video, recipe) for video, _ in starts])
        return sample


def open_video(videos: VideoList, index: int, decoded: DecodedVideos | None) -> VideoFile | DecodedFile:
    """Open a video for reading clips, as a context manager. Raises DecodeError if it cannot be opened."""
    return VideoFile(videos.path(index)) if decoded is None else decoded.open(videos.root, videos.name(index))


def both_spans(file: VideoFile | DecodedFile) -> tuple[sampling.Span, sampling.Span]:
    """Return the spans of a file's video and of its sound.

    Raises:
        DecodeError: one of the streams is missing, or has ended when the other begins: they are not of one scene.
    """
    video, audio = file.span("video"), file.span("audio")
    if min(video[1], audio[1]) <= max(video[0], audio[0]) and video[1] > video[0]:
        raise DecodeError(
            f"{file.path}: expected video and sound at the same time, found video from {video[0]:.3f} to "
            f"{video[1]:.3f} s and sound from {audio[0]:.3f} to {audio[1]:.3f} s"
        )
    return video, audio


def read_frames(
    file: VideoFile | DecodedFile, start: float, recipe: ClipRecipe, rng: np.random.Generator | None = None
) -> torch.Tensor:
    """Read a clip's frames, cropped and resized: uint8 (T, crop_size, crop_size, 3).

    With `rng`, the crop is random as set by `transforms`. Otherwise, the frames are resized to frame_size x frame_size
    (without keeping the aspect ratio) and centre-cropped.
    """
    window = {"video_start": start, "video_seconds": recipe.video_seconds, "fps": recipe.video_fps}
    if rng is None or recipe.transforms != "msc+color":
        return cut_out(torch.from_numpy(file.read(**window).frames), recipe, rng)
    box = _random_box(file.info.video.height, file.info.video.width, recipe, rng)
    frames = torch.from_numpy(file.read(**window, crop=box).frames)
    return crop_and_resize(frames, (0, 0, *box[2:]), recipe.crop_size, _mode(recipe))


def cut_out(frames: torch.Tensor, recipe: ClipRecipe, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Crop and resize decoded frames (T, H, W, 3) as `read_frames` does."""
    size = recipe.crop_size
    height, width = frames.shape[1:3]
    if rng is not None and recipe.transforms == "msc+color":
        return crop_and_resize(frames, _random_box(height, width, recipe, rng), size, _mode(recipe))
    frames = crop_and_resize(frames, (0, 0, height, width), recipe.frame_size, recipe.resize)
    room = recipe.frame_size - size
    top, left = (room // 2, room // 2) if rng is None else rng.integers(room + 1, size=2).tolist()
    return crop_and_resize(frames, (top, left, size, size), size)


def _random_box(height: int, width: int, recipe: ClipRecipe, rng: np.random.Generator) -> tuple[int, int, int, int]:
    return sampling.random_resized_crop(height, width, recipe.area, recipe.aspect, rng)


def _mode(recipe: ClipRecipe) -> str:
    """Return the resizing mode for random resized crops."""
    return "bilinear" if recipe.resize == "bilinear" else "bilinear-plain"


def read_waveform(file: VideoFile | DecodedFile, start: float, recipe: ClipRecipe) -> torch.Tensor:
    """Read a clip's sound: float32 (audio_seconds * sample_rate,), mono, in [-1, 1]."""
    clip = file.read(audio_start=start, audio_seconds=recipe.audio_seconds, sample_rate=recipe.sample_rate)
    return torch.from_numpy(clip.waveform)


def read_list(file: Path, help_text: str) -> list[str]:
    """Read the non-blank lines of a published list. Bytes that are not UTF-8 are kept, as in file names.

    Raises:
        UserError: the file does not exist or cannot be read; `help_text` says what was expected.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")  # names may hold other breaks
    except FileNotFoundError:
        raise UserError(f"{file}: no such list; {help_text}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; {help_text}") from None
    return [line for line in lines if line.strip()]


def each_once(file: Path, names: list[str]) -> list[str]:
    """Return the names of a published list without repetitions, of which it warns: a sample counts once."""
    once = list(dict.fromkeys(names))
    if len(once) < len(names):
        log.warning(
            "%s: %d lines name a video that an earlier line names, and are left out", file, len(names) - len(once)
        )
    return once


class EpochBatches(Sampler):
    """Batches of (epoch, position) keys for one rank, over one or more epochs, starting anywhere in the first.

    A global batch is `batch_size` consecutive positions, cut into `accumulate` micro-batches that are each split among
    the ranks. So W processes together see exactly the batches of a single process, except for the smaller last batch
    without `drop_last`, which is truncated to divide evenly.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.length, self.batch_size, self.accumulate = length, batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        pieces = accumulate * world_size
        self.sizes = [batch_size] * (length // batch_size)
        rest = length % batch_size // pieces * pieces
        if rest and not drop_last:
            self.sizes.append(rest)
        self.epoch, self.first_step, self.epochs = 0, 0, 1

    @property
    def steps(self) -> int:
        """Number of global batches in an epoch."""
        return len(self.sizes)

    @property
    def micro_batch_size(self) -> int:
        """Clips per forward pass and rank; fewer in a short last batch."""
        return self.sizes[0] // (self.accumulate * self.world_size)

    def start_at(self, epoch: int, step: int = 0, epochs: int = 1) -> None:
        """Set the next pass to cover `epochs` epochs, starting at `step` of `epoch`.

        In a pass over several epochs, workers load an epoch's first batches during the last steps of the previous one.
        """
        self.epoch, self.first_step, self.epochs = epoch, step, epochs

    def __len__(self) -> int:
        return (self.epochs * self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(self.first_step, self.epochs * self.steps):
            later, step = divmod(i, self.steps)
            share = self.sizes[step] // (self.accumulate * self.world_size)
            for micro_batch in range(self.accumulate):
                start = step * self.batch_size + (micro_batch * self.world_size + self.rank) * share
                yield [(self.epoch + later, position) for position in range(start, start + share)]


def collate(samples: list[dict], staging: Staging | None = None) -> dict:
    """Stack the samples of a batch and join their `failures`; `failed` counts the samples that have any.

    If a sample holds only failures, so does the batch, and they are also its `unreadable`: there are no partial
    batches. With `staging`, the batch is left there.
    """
    failures = [sample["failures"] for sample in samples if sample["failures"]]
    batch = {"failures": [failure for sample in failures for failure in sample], "failed": len(failures)}
    for sample in samples:
        if "frames" not in sample:
            return batch | {"unreadable": sample["failures"]}
    return batch | _stack(samples, staging)


def collate_readable(samples: list[dict], staging: Staging | None = None) -> dict:
    """Stack the samples that could be decoded and join all `failures`. For evaluation, where none is replaced."""
    failures = [failure for sample in samples for failure in sample["failures"]]
    readable = [sample for sample in samples if "frames" in sample]
    return (_stack(readable, staging) if readable else {}) | {"failures": failures}


def _stack(samples: list[dict], staging: Staging | None) -> dict:
    names = samples[0].keys() - {"failures"}
    columns = {name: [torch.as_tensor(sample[name]) for sample in samples] for name in names}
    if staging is not None:
        return staging.stack(columns)
    # default_collate stacks in shared memory in a worker, which saves a copy of the frames
    return {name: default_collate(values) for name, values in columns.items()}


def make_loader(
    dataset: Dataset, num_workers: int, device: torch.device | str = "cpu", batch_bytes: int = 0, **options: object
) -> DataLoader:
    """Create a DataLoader with the project's common settings; `options` are passed on to it.

    The number of workers is limited to the cores available to this process. On Linux, workers are always forked (also
    in spawned ranks and with Python 3.14), since a fork shares imported modules, 225 MB per worker.

    Args:
        batch_bytes: if set and workers are forked, batches travel through a `Staging` for as many bytes, and are only
            valid until the next one is asked for. `collate_fn` must take `staging`.
    """
    num_workers, on_gpu = min(num_workers, cores()), torch.device(device).type == "cuda"
    forked = num_workers > 0 and sys.platform == "linux"
    options.setdefault("collate_fn", collate)
    common = {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "generator": torch.Generator(),  # separate, so that the loader does not advance the global generator
        "worker_init_fn": _begin_worker,
        "multiprocessing_context": "fork" if forked else None,
    }
    if not (batch_bytes and forked):
        return DataLoader(dataset, pin_memory=on_gpu, **common, **options)
    staging = Staging(num_workers, batch_bytes, pin=on_gpu)
    collate_fn = partial(options.pop("collate_fn"), staging=staging)
    return StagedLoader(dataset, staging=staging, collate_fn=collate_fn, **common, **options)


def _begin_worker(number: int) -> None:
    """Set up a worker's memory and signal handling.

    The garbage collector must not touch memory shared with the parent, since its marks would copy every page. Unlike
    the parent, the worker does not keep freed memory, and returns what the parent had kept when it forked. Signals that
    stop a run are for the parent: Slurm and `timeout` send them to every process, but the parent needs its workers
    until it has saved.
    """
    gc.freeze()
    keep_freed_memory(False)
    give_back_freed_memory()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told_by_the_parent, daemon=True).start()


def _leave_when_told_by_the_parent() -> None:
    """End this worker only on a SIGTERM from its parent; torch's handler would end it on any."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
