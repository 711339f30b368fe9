"""Labelled videos -> samples for an evaluation. Nothing is ever substituted: what cannot be read is named.

A video shorter than a clip gives a clip that starts with it and repeats its last frame.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datasets import sampling
from datasets.decoding import DecodeError, VideoFile
from datasets.manifest import manifest_of, missing_of, size_and_time
from datasets.preprocessing import draw_video_augmentation, no_video_augmentation
from datasets.video_dataset import ClipRecipe, VideoList, cut_out, epoch_order, read_frames
from utils.errors import UserError

PASS_BYTES = 256_000_000  # RGB pictures that one pass over a file may hold
MARGIN = 0.25  # seconds decoded before and after the clips of a pass, for the frames nearest to their ends


def present_videos(videos: VideoList, allow_missing: bool) -> tuple[VideoList, list[str]]:
    """The videos of a list whose files are there (in a prepared folder: by its manifest), and the names of the others.

    Raises:
        UserError: files are missing and `allow_missing` is False, or all are.
    """
    manifest = manifest_of(videos.root)
    if manifest is None:
        missing = [i for i in range(len(videos)) if not videos.path(i).is_file()]
    else:
        missing = missing_of(manifest, videos.names())
    names = [videos.name(i) for i in missing]
    if missing and (not allow_missing or len(missing) == len(videos)):
        first = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        advice = "get them" if len(missing) == len(videos) else "get them, or go on without them by --allow-missing"
        raise UserError(
            f"{videos.root}: {len(missing)} of the {len(videos)} videos of a list are missing: {first}; {advice}"
        )
    present = np.setdiff1d(np.arange(len(videos)), missing)
    return (videos.subset(present) if missing else videos), names


class FreshClips(Dataset):
    """Random clips for training a classifier, one for each (epoch, position), made anew every epoch.

    What a position holds depends on the seed alone. A video that cannot be decoded gives a sample with nothing but
    its `failures`.
    """

    def __init__(self, videos: VideoList, recipe: ClipRecipe, clips_per_video: int, seed: int, shuffle: bool) -> None:
        self.videos, self.recipe, self.seed, self.shuffle = videos, recipe, seed, shuffle
        self.clips_per_video = clips_per_video
        self._order = (None, None)

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def order(self, epoch: int) -> np.ndarray:
        """The video of each position in this epoch."""
        if self._order[0] != epoch:
            shuffled = epoch_order(len(self.videos), self.clips_per_video, self.seed, epoch, self.shuffle)
            self._order = epoch, shuffled
        return self._order[1]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, position = key
        video = int(self.order(epoch)[position])
        rng = np.random.default_rng((self.seed, epoch, position))
        augment = self.recipe.augment
        try:
            with VideoFile(self.videos.path(video)) as file:
                start = sampling.anywhere(file.span("video"), self.recipe.video_seconds, rng)
                frames = read_frames(file, start, self.recipe, rng if augment else None)
        except DecodeError as error:
            return {"failures": [(self.videos.name(video), str(error))]}
        color = draw_video_augmentation(list(self.recipe.color), rng) if augment else no_video_augmentation()
        return {"index": video, "position": position, "frames": frames, "video_aug": color, "failures": []}


class VideoClips(Dataset):
    """All the clips that an evaluation asks of a video, cut from one pass over its file.

    A sample holds `frames` (num_random + num_dense, T, H, W, 3): first clips at random times, which depend on (seed,
    video) alone and of which fewer are the first ones of more; then clips evenly over the whole video. By the recipe
    they are cropped in the centre, or, with its `augment`, at random and with a `video_aug` (clips, 5).
    A video that cannot be decoded gives only `index` and `failures`.
    """

    def __init__(
        self, videos: VideoList, recipe: ClipRecipe, seed: int, num_random: int = 0, num_dense: int = 0
    ) -> None:
        self.videos, self.recipe, self.seed = videos, recipe, seed
        self.num_random, self.num_dense = num_random, num_dense

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index = key[1]
        recipe = self.recipe
        rng = np.random.default_rng((self.seed, index))
        clip_rngs = None
        try:
            with VideoFile(self.videos.path(index)) as file:
                span = file.span("video")
                starts = [sampling.anywhere(span, recipe.video_seconds, rng) for _ in range(self.num_random)]
                if self.num_dense:
                    starts += sampling.evenly(span, recipe.video_seconds, self.num_dense)
                if recipe.augment:
                    # from 1 on: zeros at the end of a seed change nothing, and the starts have (seed, index)
                    clip_rngs = [np.random.default_rng((self.seed, index, clip + 1)) for clip in range(len(starts))]
                frames = read_windows(file, starts, recipe, clip_rngs)
        except DecodeError as error:
            return {"index": index, "failures": [(self.videos.name(index), str(error))]}
        sample = {"index": index, "frames": frames, "failures": []}
        if clip_rngs is not None:
            colors = [draw_video_augmentation(list(recipe.color), clip_rng) for clip_rng in clip_rngs]
            sample["video_aug"] = np.stack(colors)
        return sample


def read_windows(
    file: VideoFile, starts: list[float], recipe: ClipRecipe, rngs: list[np.random.Generator] | None = None
) -> Tensor:
    """Clips at `starts` (seconds, any order): uint8 (clips, T, H, W, 3), each as `read_frames` gives it.

    Clips that lie close together are decoded in one pass, as many as fit into `PASS_BYTES`.
    """
    clips = torch.empty(len(starts), *recipe.clip_shape, dtype=torch.uint8)
    for group in _passes(file, starts, recipe.video_seconds):
        first, last = starts[group[0]] - MARGIN, starts[group[-1]] + recipe.video_seconds + MARGIN
        try:
            decoded = file.read(video_start=first, video_seconds=last - first)
        except DecodeError:  # there may be no frame in these seconds, and one before and after them
            for i in group:
                clips[i] = read_frames(file, starts[i], recipe, None if rngs is None else rngs[i])
            continue
        pictures, times = torch.from_numpy(decoded.frames), decoded.frame_times
        if rngs is None:  # cropped once, however many clips they are in
            pictures = cut_out(pictures, recipe)
        for i in group:
            rng = None if rngs is None else rngs[i]
            targets = starts[i] + np.arange(recipe.num_frames) / recipe.video_fps
            if not times[0] <= targets[0] <= targets[-1] <= times[-1]:  # the file begins or ends here
                clips[i] = read_frames(file, starts[i], recipe, rng)
            elif rng is None:
                clips[i] = pictures[_nearest(times, targets)]
            else:
                clips[i] = cut_out(pictures[_nearest(times, targets)], recipe, rng)
    return clips


def _passes(file: VideoFile, starts: list[float], seconds: float) -> list[list[int]]:
    """The clips' numbers by start, in groups that overlap or nearly do, each no longer than `PASS_BYTES` allows."""
    info = file.info.video
    most = PASS_BYTES / (info.width * info.height * 3 * max(info.fps, 1.0))
    groups: list[list[int]] = []
    for i in np.argsort(starts, kind="stable").tolist():
        if groups:
            begin, end = starts[groups[-1][0]], starts[groups[-1][-1]] + seconds
            if starts[i] < end + 1 and starts[i] + seconds - begin < most:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def _nearest(times: np.ndarray, targets: np.ndarray) -> Tensor:
    """For each target the number of the time nearest to it; of two equally near, the earlier."""
    after = np.searchsorted(times, targets).clip(1, len(times) - 1) if len(times) > 1 else np.zeros(len(targets), int)
    before = np.maximum(after - 1, 0)
    return torch.from_numpy(np.where(targets - times[before] <= times[after] - targets + 1e-9, before, after))


class SharedBatches(Sampler):
    """Batches of (epoch, position) keys for one rank, in which no position is left out.

    A global batch is `batch_size` consecutive positions, and the last one may be smaller unless `drop_last`. The ranks'
    shares of it differ by at most one; a share may be empty.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, drop_last: bool = False) -> None:
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size
        self.steps = length // batch_size if drop_last else -(-length // batch_size)
        self.epoch, self.first_step, self.epochs = 0, 0, 1

    def start_at(self, epoch: int, step: int = 0, epochs: int = 1) -> None:
        """Let the next pass be of so many epochs, from this step of this one on."""
        self.epoch, self.first_step, self.epochs = epoch, step, epochs

    def size(self, step: int) -> int:
        """Positions in a global batch."""
        return min(self.batch_size, self.length - step * self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(self.first_step, self.epochs * self.steps):
            later, step = divmod(i, self.steps)
            first, size = step * self.batch_size, self.size(step)
            begin, end = (first + size * r // self.world_size for r in (self.rank, self.rank + 1))
            yield [(self.epoch + later, position) for position in range(begin, end)]


def data_fingerprint(*lists: VideoList) -> str:
    """Says whether two evaluations mean the same files: names, labels, sizes and times of change.

    In a prepared folder the manifest's fingerprints stand for sizes and times.
    """
    digest = hashlib.sha256()
    for videos in lists:
        digest.update(f"{videos.fingerprint} {videos.classes} {videos.labels.tolist()}".encode())
        manifest = manifest_of(videos.root)
        for i in range(len(videos)):
            if manifest is None:
                digest.update(size_and_time(videos.path(i)).encode())
            else:
                digest.update(manifest.sources.get(videos.name(i), "absent").encode())
    return digest.hexdigest()[:16]
