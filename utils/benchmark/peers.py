"""Other decoders for the loader benchmark, if installed: torchcodec, decord.

Each reads single clips as its manual recommends, with one thread. Cropping and resizing are ours, so that decoders are
comparable.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from datasets.preprocessing import crop_and_resize
from datasets.video_dataset import ClipRecipe


def installed() -> tuple[dict[str, Callable], list[str]]:
    """Return the readers by name, and why each other package is unavailable."""
    found, absent = {}, []
    for package, name, read in (
        ("torchcodec", "torchcodec", read_torchcodec),
        ("decord", "decord (no sound)", read_decord),
    ):
        if find_spec(package) is None:
            absent.append(f"{package}: not installed")
            continue
        try:
            __import__(package)
        except (ImportError, OSError, RuntimeError) as error:
            absent.append(f"{package}: does not load: {str(error).splitlines()[0]}")
        else:
            found[name] = read
    return found, absent


def read_torchcodec(path: Path, clip: object, recipe: ClipRecipe, watch: object) -> tuple:
    """Read a clip with torchcodec: frames (1, T, crop, crop, 3) and waveform (1, L)."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder

    with watch.stage("open"):
        video = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    with watch.stage("seek and decode"):
        last = video.metadata.end_stream_seconds - 1e-3
        times = np.minimum(clip.video_start + np.arange(recipe.num_frames) / recipe.video_fps, last)
        frames = video.get_frames_played_at(times.tolist()).data
    frames = _resize(frames, clip, recipe, watch)
    with watch.stage("audio"):
        audio = AudioDecoder(str(path), sample_rate=recipe.sample_rate, num_channels=1)
        sound = audio.get_samples_played_in_range(clip.audio_start, clip.audio_start + recipe.audio_seconds).data
    with watch.stage("collate"):
        return torch.stack([frames]), sound


def read_decord(path: Path, clip: object, recipe: ClipRecipe, watch: object) -> tuple:
    """Read a clip's frames with decord, (1, T, crop, crop, 3); no sound, which decord can only read whole."""
    import decord

    with watch.stage("open"):
        video = decord.VideoReader(str(path), num_threads=1)
    with watch.stage("seek and decode"):
        places = (clip.video_start + np.arange(recipe.num_frames) / recipe.video_fps) * video.get_avg_fps()
        frames = torch.from_numpy(video.get_batch(np.round(places).clip(0, len(video) - 1).astype(int)).asnumpy())
    frames = _resize(frames, clip, recipe, watch)
    with watch.stage("collate"):
        return torch.stack([frames]), torch.empty(1, 0)


def _resize(frames: torch.Tensor, clip: object, recipe: ClipRecipe, watch: object) -> torch.Tensor:
    with watch.stage("resize"):
        return crop_and_resize(frames, clip.pixels(*frames.shape[1:3]), recipe.crop_size)
