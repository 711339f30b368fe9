"""Mean and standard deviation of each mel bin over the training set, computed once and cached."""

import hashlib
import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets import sampling
from datasets.decoding import DecodeError, VideoFile
from datasets.evaluation import data_fingerprint
from datasets.preprocessing import LogMelSpectrogram, normalise_peak
from datasets.video_dataset import ClipRecipe, VideoList, make_loader, read_waveform
from utils.errors import UserError
from utils.files import write_whole
from utils.logger import is_quiet

MOST_VIDEOS = 2000

log = logging.getLogger("avssrl")


class _Spectrograms(Dataset):
    """One log-mel spectrogram (n_mels, frames) per chosen video, or the decoding error as a string."""

    def __init__(self, videos: VideoList, chosen: np.ndarray, recipe: ClipRecipe) -> None:
        self.videos, self.chosen, self.recipe = videos, chosen, recipe
        self.log_mel = LogMelSpectrogram(recipe.sample_rate, **recipe.spec_params)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> torch.Tensor | str:
        video = int(self.chosen[i])
        rng = np.random.default_rng((0, video))
        try:
            with VideoFile(self.videos.path(video)) as file:
                start = sampling.anywhere(file.span("audio"), self.recipe.audio_seconds, rng)
                waveform = read_waveform(file, start, self.recipe)
        except DecodeError as error:
            return str(error)
        return self.log_mel(normalise_peak(waveform.unsqueeze(0)))[0]


def audio_statistics(
    videos: VideoList, recipe: ClipRecipe, num_workers: int, cache_dir: str | Path
) -> dict[str, torch.Tensor]:
    """Compute `mean` and `std` of each mel bin, float32 (n_mels,), over one clip from each of at most 2,000 videos.

    The result is cached as `<cache_dir>/audio-stats-<fingerprint of files and parameters>.npz`.

    Raises:
        UserError: the sound of no video could be read, or the cache could not be written.
    """
    chosen = np.unique(np.linspace(0, len(videos) - 1, min(len(videos), MOST_VIDEOS)).round().astype(int))
    files = data_fingerprint(videos.subset(chosen))
    meaning = [files, recipe.audio_seconds, recipe.sample_rate, recipe.spec_params]
    digest = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]
    cached = Path(cache_dir) / f"audio-stats-{digest}.npz"
    if cached.is_file():
        log.info("audio statistics: read from %s", cached)
        try:
            return read_statistics(cached, recipe.spec_params["n_mels"])
        except UserError as error:
            log.warning("%s; computing them again", error)
    statistics, used = _compute(videos, chosen, recipe, num_workers)
    log.info("audio statistics: computed from %d videos, cached in %s", used, cached)
    npz = io.BytesIO()
    np.savez(npz, count=used, **{name: value.numpy() for name, value in statistics.items()})
    write_whole(cached, npz.getvalue())
    return statistics


def read_statistics(file: str | Path, n_mels: int) -> dict[str, torch.Tensor]:
    """Read `mean` and `std` of each mel bin, float32 (n_mels,), from an npz file like that of the thesis' repository.

    Raises:
        UserError: the file cannot be read, or has other contents.
    """
    try:
        with np.load(file) as stored:
            statistics = {name: np.asarray(stored[name], np.float32).reshape(-1) for name in ("mean", "std")}
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: expected an npz file with `mean` and `std`: {' '.join(str(error).split())}") from None
    sizes = {name: len(values) for name, values in statistics.items()}
    if set(sizes.values()) != {n_mels}:
        raise UserError(f"{file}: mean has {sizes['mean']} and std {sizes['std']} values, expected {n_mels} (n_mels)")
    return {name: torch.from_numpy(values) for name, values in statistics.items()}


def _compute(
    videos: VideoList, chosen: np.ndarray, recipe: ClipRecipe, num_workers: int
) -> tuple[dict[str, torch.Tensor], int]:
    dataset = _Spectrograms(videos, chosen, recipe)
    loader = make_loader(dataset, num_workers, batch_size=None, collate_fn=None)
    mels = recipe.spec_params["n_mels"]
    total, squares, frames, errors = torch.zeros(mels).double(), torch.zeros(mels).double(), 0, []
    disable = True if is_quiet() else None  # None: unless the console is a terminal
    for answer in tqdm(loader, "audio statistics", unit="video", disable=disable, leave=False):
        if isinstance(answer, str):
            errors.append(answer)
            continue
        total += answer.double().sum(1)
        squares += answer.double().square().sum(1)
        frames += answer.shape[1]
    used = len(chosen) - len(errors)
    if not used:
        raise UserError(f"{videos.root}: the sound of none of {len(chosen)} videos could be read; first: {errors[0]}")
    if errors:
        log.warning("audio statistics: skipped %d of %d videos; first: %s", len(errors), len(chosen), errors[0])
    mean = total / frames
    std = (squares / frames - mean.square()).clamp_min(0).sqrt()
    return {"mean": mean.float(), "std": std.float()}, used
