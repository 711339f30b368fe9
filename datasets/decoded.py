"""Videos decoded once and kept as they are shown, so that later clips cost no decoding (`dataset.decode_once`).

A kept file is a line of JSON, then the frames' times (float64, seconds), the sound (float32 at the rate of the run) and
the frames (uint8 RGB), 3 bytes a pixel. Clips are cut from it by memory map: all processes of a machine share what the
system holds of it. It is for the video of that size and time of change, and made anew for another one.

Frames are those that `VideoFile` answers, to the bit. The sound is equal to about 1e-6, but for what hangs on where
decoding begins: the noise that AAC may put in place of high frequencies, and, where time stamps are rounded (Matroska),
a place that is a few samples off.
"""

import json
import mmap
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from datasets.decoder_run import nearest
from datasets.decoding import SLACK, AudioInfo, Clip, DecodeError, MediaInfo, VideoFile, VideoInfo
from utils.errors import UserError
from utils.files import write_whole

MAGIC = b"AV-SSRL decoded 1 "
ALIGNMENT = 64  # bytes; of the data's beginning
LARGEST = 2**29  # bytes of a video's frames; it is decoded whole in memory
EVER = 1e6  # seconds before and after a stream: all of its frames, wherever the container says that it begins and ends


class DecodedVideos:
    """Opens videos, each one decoded and kept below `folder` the first time.

    A video that does not decode completely over its whole span, whose frames are more than `LARGEST`, or whose times
    run backwards, is not kept but opened as a `VideoFile`: what can be read of it, and its errors, are as ever.

    Args:
        sample_rate: Hz, of the sound; 0: none is kept.
    """

    def __init__(self, folder: str | Path, sample_rate: int) -> None:
        self.folder, self.sample_rate = Path(folder), sample_rate

    def open(self, root: Path, name: str) -> "DecodedFile | VideoFile":
        """Open the video `name` below `root`.

        Raises:
            DecodeError: it cannot be opened.
            UserError: what was decoded cannot be written.
        """
        path, kept = root / name, self.folder / f"{name}.{self.sample_rate}.decoded"
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return VideoFile(path)
        stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        found = _map(kept, stamp)
        if found is None:
            self._keep(path, kept, stamp)
            found = _map(kept, stamp)
        if found is None or not found[0]["video"]:
            return VideoFile(path)
        return DecodedFile(path, *found)

    def _keep(self, path: Path, kept: Path, stamp: dict) -> None:
        """Decode a video and write the kept file; of one that cannot be kept, a header that says so."""
        try:
            header, arrays = _decode(path, self.sample_rate)
        except DecodeError:
            header, arrays = {"video": None}, []
        sizes = {"bytes": sum(array.nbytes for array in arrays)}
        line = MAGIC + json.dumps(stamp | sizes | header).encode()
        line += b" " * (-(len(line) + 1) % ALIGNMENT) + b"\n"
        try:
            write_whole(kept, line, *(array.data for array in arrays))
        except UserError as error:
            raise UserError(f"cache_dir: {error}; make room, or --set dataset.decode_once=false") from None


def _decode(path: Path, sample_rate: int) -> tuple[dict, list[np.ndarray]]:
    """What a kept file's header says of a video, and its arrays.

    Raises:
        DecodeError: it cannot be decoded completely, or is not to be kept.
    """
    with VideoFile(path) as file:
        spans = {kind: file.span(kind) for kind in (("video", "audio") if sample_rate else ("video",))}
        video, (start, end) = file.info.video, spans["video"]
        size = (video.frames or (end - start) * video.fps) * video.height * video.width * 3
        if not 0 < size <= LARGEST:
            raise DecodeError(f"{path}: about {size:.0f} bytes of frames; at most {LARGEST} are kept")
        clip, first_sample = file.read(video_start=start - EVER, video_seconds=end - start + 2 * EVER), 0
        if (np.diff(clip.frame_times) < 0).any():
            raise DecodeError(f"{path}: times of frames that run backwards")
        if sample_rate:
            start, seconds = spans["audio"][0] - SLACK, spans["audio"][1] - spans["audio"][0] + 2 * SLACK
            clip.waveform = file.read(audio_start=start, audio_seconds=seconds, sample_rate=sample_rate).waveform
            first_sample = round(start * sample_rate)
        header = {
            "video": asdict(video),
            "audio": file.info.audio and asdict(file.info.audio),
            "spans": spans,
            "frames": len(clip.frames),
            "samples": len(clip.waveform),
            "first_sample": first_sample,
            "sample_rate": sample_rate,
        }
    return header, [clip.frame_times, clip.waveform, clip.frames]


def _map(kept: Path, stamp: dict) -> tuple[dict, mmap.mmap, int] | None:
    """A kept file's header, its memory map and where the data begin; None where it is no whole one of this video."""
    try:
        with kept.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: it is empty
        return None
    line = mapping.readline()
    if not (line.startswith(MAGIC) and line.endswith(b"\n")):
        return None
    try:
        header = json.loads(line[len(MAGIC) :])
    except ValueError:
        return None
    whole = len(mapping) == len(line) + header["bytes"]
    return (header, mapping, len(line)) if whole and stamp.items() <= header.items() else None


class DecodedFile:
    """A kept video, of which any number of clips can be read as from a `VideoFile`. A context manager."""

    def __init__(self, path: str | os.PathLike, header: dict, mapping: mmap.mmap, offset: int) -> None:
        self.path = os.fspath(path)
        video, audio = VideoInfo(**header["video"]), header["audio"] and AudioInfo(**header["audio"])
        self.info = MediaInfo(self.path, video, audio)
        self._spans, self._first_sample = header["spans"], header["first_sample"]
        self._sample_rate = header["sample_rate"]
        number, samples = header["frames"], header["samples"]
        self._times = np.frombuffer(mapping, np.float64, number, offset)
        self._waveform = np.frombuffer(mapping, np.float32, samples, offset + 8 * number)
        frames = np.frombuffer(mapping, np.uint8, offset=offset + 8 * number + 4 * samples)
        self._frames = frames.reshape(number, video.height, video.width, 3)

    def __enter__(self) -> "DecodedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is to be done: the map goes with the last array that looks at it."""

    def span(self, kind: str) -> tuple[float, float]:
        """As `VideoFile.span`, of a stream that was kept."""
        return tuple(self._spans[kind])

    def read(
        self,
        *,
        video_start: float | None = None,
        video_seconds: float | None = None,
        fps: float | None = None,
        audio_start: float | None = None,
        audio_seconds: float | None = None,
        sample_rate: int | None = None,
        crop: tuple[int, int, int, int] | None = None,
    ) -> Clip:
        """As `VideoFile.read`, with all arguments of a stream (but for the crop), or none of it.

        Raises:
            ValueError: sound was asked for that was not kept, in another rate.
        """
        clip = Clip(np.empty((0, 0, 0, 3), np.uint8), np.empty(0), np.empty(0, np.float32), 0)
        if video_start is not None:
            clip.frames, clip.frame_times = self._read_video(video_start, fps, round(video_seconds * fps), crop)
        if audio_start is not None:
            if sample_rate != self._sample_rate:
                raise ValueError(f"{self.path}: sound is kept at {self._sample_rate} Hz, not at {sample_rate} Hz")
            first = round(audio_start * sample_rate) - self._first_sample
            clip.waveform, clip.sample_rate = self._samples(first, round(audio_seconds * sample_rate)), sample_rate
        return clip

    def _read_video(
        self, start: float, fps: float, number: int, crop: tuple[int, int, int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        before = max(0, int(np.searchsorted(self._times, start)) - 1)
        timed = zip(self._times[before:].tolist(), range(before, len(self._times)), strict=True)
        chosen = nearest(timed, start, fps, number)
        top, left, height, width = crop or (0, 0, *self._frames.shape[1:3])
        frames = np.empty((number, height, width, 3), np.uint8)
        for out, (_, index) in zip(frames, chosen, strict=True):
            out[:] = self._frames[index, top : top + height, left : left + width]
        return frames, np.array([time for time, _ in chosen])

    def _samples(self, first: int, length: int) -> np.ndarray:
        """`length` samples from the kept one number `first` on; zeros outside."""
        out = np.zeros(length, np.float32)
        part = self._waveform[max(first, 0) : max(first + length, 0)]
        at = max(-first, 0)
        out[at : at + len(part)] = part
        return out
