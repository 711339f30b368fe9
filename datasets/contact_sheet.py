"""Contact sheet: random clips of a folder with their sound, to be looked at before training for a week."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.decoding import DecodeError, VideoFile
from utils.pictures import drawable, save_picture

FRAMES = 4
SAMPLE_RATE = 4000  # Hz, enough to draw
SECONDS = 12.0  # maximum per video


def draw_contact_sheet(
    root: str | Path, names: Sequence[str], file: str | Path, count: int = 12, seed: int = 0
) -> None:
    """Draw `count` random videos: four frames over their length with the waveform below, or the decoding error.

    Raises:
        UserError: the image cannot be written.
    """
    from matplotlib.figure import Figure

    names = sorted(names)
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    rows = -(-len(chosen) // 2)
    figure = Figure(figsize=(13, 2.5 * rows), layout="constrained")
    cells = figure.subfigures(rows, 2, squeeze=False).flat
    for cell, i in zip(cells, sorted(chosen.tolist()), strict=False):
        pictures, sound = cell.subplots(2, 1, height_ratios=(2.4, 1))
        pictures.set_title(drawable(names[i]), fontsize=8)
        try:
            frames, waveform, seconds = _look(Path(root) / names[i])
        except DecodeError as error:
            pictures.text(0.5, 0.5, drawable(str(error)[-80:]), ha="center", fontsize=7)
            frames, waveform, seconds = None, np.empty(0), 0.0
        if frames is not None:
            pictures.imshow(np.concatenate(list(frames), axis=1))
        if len(waveform):
            sound.plot(np.linspace(0, seconds, len(waveform)), waveform, lw=0.4)
            sound.set(ylim=(-1, 1), xlim=(0, seconds), yticks=[])
            sound.tick_params(labelsize=7)
        else:
            sound.text(0.5, 0.4, "no sound", ha="center", fontsize=8, transform=sound.transAxes)
            sound.axis("off")
        pictures.axis("off")
    save_picture(figure, file, dpi=90)


def _look(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    with VideoFile(path) as video:
        start, end = video.span("video")
        seconds = min(end - start, SECONDS)
        starts = start + (np.arange(FRAMES) + 0.5) * seconds / FRAMES
        fps = video.info.video.fps or 25.0
        frames = [video.read(video_start=time, video_seconds=1 / fps, fps=fps).frames[0] for time in starts]
        sound = np.empty(0)
        if video.info.audio is not None:
            try:
                sound = video.read(audio_start=start, audio_seconds=seconds, sample_rate=SAMPLE_RATE).waveform
            except DecodeError:
                pass  # marked as broken in the manifest, drawn without sound
    return np.stack(frames), sound, seconds
