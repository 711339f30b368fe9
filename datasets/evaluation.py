"""Samples of labelled videos for evaluation. Unreadable videos are reported, never substituted.

If a video is shorter than a clip, the clip starts with the video and repeats its last frame.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datasets import sampling
from datasets.decoder_run import SAME_TIME
from datasets.decoding import DecodeError, VideoFile
from datasets.manifest import manifest_of, missing_of, size_and_time
from datasets.preprocessing import draw_video_augmentation, no_video_augmentation
from datasets.video_dataset import ClipRecipe, VideoList, cut_out, epoch_order, read_frames
from utils.errors import UserError

PASS_BYTES = 256_000_000  # limit for the RGB frames of one pass over a file
MARGIN = 0.25  # seconds decoded before and after the clips of a pass, to find the frames nearest to their ends


def labelled_videos(videos: VideoList) -> tuple[VideoList, list[str]]:
    """Return the videos that have a label (0 or above), and the names of the others."""
    labels = videos.labels.numpy()
    if (labels >= 0).all():
        return videos, []
    return videos.subset(np.flatnonzero(labels >= 0)), [videos.name(i) for i in np.flatnonzero(labels < 0)]


def present_videos(videos: VideoList, allow_missing: bool) -> tuple[VideoList, list[str]]:
    """Return the videos whose files exist (in a prepared folder, by its manifest) and the names of the missing ones.

    Raises:
        UserError: files are missing and `allow_missing` is False, or all files are missing.
    """
    manifest = manifest_of(videos.root)
    if manifest is None:
        missing = [i for i in range(len(videos)) if not videos.path(i).is_file()]
    else:
        missing = missing_of(manifest, videos.names())
    names = [videos.name(i) for i in missing]
    if missing and (not allow_missing or len(missing) == len(videos)):
        first = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        advice = "get them" if len(missing) == len(videos) else "get them, or continue without them by --allow-missing"
        raise UserError(
            f"{videos.root}: {len(missing)} of the {len(videos)} videos of a list are missing: {first}; {advice}"
        )
    present = np.setdiff1d(np.arange(len(videos)), missing)
    return (videos.subset(present) if missing else videos), names


class FreshClips(Dataset):
    """Random clips for training a classifier, new ones in every epoch. Keys are (epoch, position).

    The sample of a key depends only on the seed. A video that cannot be decoded gives a sample with only `failures`.
    """

    def __init__(self, videos: VideoList, recipe: ClipRecipe, clips_per_video: int, seed: int, shuffle: bool) -> None:
        self.videos, self.recipe, self.seed, self.shuffle = videos, recipe, seed, shuffle
        self.clips_per_video = clips_per_video
        self._order = (None, None)

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def order(self, epoch: int) -> np.ndarray:
        """Return the video at each position of this epoch."""
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
    """All clips of a video for an evaluation, read in one pass over its file.

    A sample holds `frames` (num_random + num_dense, T, H, W, 3). The first clips are at random times that depend only
    on (seed, video); a smaller `num_random` gives the first ones of a larger. The others are evenly spaced over the
    video. Clips are centre-cropped or, if the recipe has `augment`, cropped at random with a `video_aug` (clips, 5).
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
                    # clip + 1: trailing zeros do not change a seed, and (seed, index) is taken by the starts
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
    """Read clips at `starts` (seconds, any order), each as by `read_frames`: uint8 (clips, T, H, W, 3).

    Clips that lie close together are decoded in one pass, as many as fit into `PASS_BYTES`.
    """
    clips = torch.empty(len(starts), *recipe.clip_shape, dtype=torch.uint8)
    for group in _passes(file, starts, recipe.video_seconds):
        first, last = starts[group[0]] - MARGIN, starts[group[-1]] + recipe.video_seconds + MARGIN
        try:
            decoded = file.read(video_start=first, video_seconds=last - first)
        except DecodeError:  # there may be frames before and after this interval but none inside
            for i in group:
                clips[i] = read_frames(file, starts[i], recipe, None if rngs is None else rngs[i])
            continue
        pictures, times = torch.from_numpy(decoded.frames), decoded.frame_times
        if rngs is None:  # crop frames shared by several clips only once
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
    """Group the clips' indices, sorted by start, into nearly overlapping runs that each fit into `PASS_BYTES`."""
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
    """Return the index of the time nearest to each target (the earlier of two equally near)."""
    after = np.searchsorted(times, targets).clip(1, len(times) - 1) if len(times) > 1 else np.zeros(len(targets), int)
    before = np.maximum(after - 1, 0)
    return torch.from_numpy(np.where(targets - times[before] <= times[after] - targets + SAME_TIME, before, after))


class SharedBatches(Sampler):
    """Batches of (epoch, position) keys for one rank that together cover every position.

    A global batch is `batch_size` consecutive positions; the last one may be smaller, or is dropped with `drop_last`.
    The ranks' shares of a batch differ in size by at most one and may be empty.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, drop_last: bool = False) -> None:
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size
        self.steps = length // batch_size if drop_last else -(-length // batch_size)
        self.epoch, self.first_step, self.epochs = 0, 0, 1

    def start_at(self, epoch: int, step: int = 0, epochs: int = 1) -> None:
        """Set the next pass to cover `epochs` epochs, starting at `step` of `epoch`."""
        self.epoch, self.first_step, self.epochs = epoch, step, epochs

    def size(self, step: int) -> int:
        """Number of positions in a global batch."""
        return min(self.batch_size, self.length - step * self.batch_size)

    def own(self, step: int) -> range:
        """This rank's positions in a global batch."""
        first, size = step * self.batch_size, self.size(step)
        begin, end = (first + size * r // self.world_size for r in (self.rank, self.rank + 1))
        return range(begin, end)

    def __len__(self) -> int:
        return self.epochs * self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for i in range(self.first_step, self.epochs * self.steps):
            later, step = divmod(i, self.steps)
            yield [(self.epoch + later, position) for position in self.own(step)]


def data_fingerprint(*lists: VideoList, times: bool = True) -> str:
    """Hash the names, labels, sizes and, unless `times` is False, modification times of the videos.

    A copy of the data may have other times. In a prepared folder, the manifest's fingerprints replace sizes and times.
    """
    digest = hashlib.sha256()
    for videos in lists:
        digest.update(f"{videos.fingerprint} {videos.classes} {videos.labels.tolist()}".encode())
        manifest = manifest_of(videos.root)
        for i in range(len(videos)):
            if manifest is None:
                size, *time = size_and_time(videos.path(i)).split()
                digest.update(" ".join([size, *time] if times else [size]).encode())
            else:
                digest.update(manifest.sources.get(videos.name(i), "absent").encode())
    return digest.hexdigest()[:16]
