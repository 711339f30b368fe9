"""Cache of decoded videos, so that later clips need no decoding (`dataset.decode_once`).

A cached file holds a line of JSON, the frame times (float64, seconds), the sound (float32 at the run's rate) and the
frames (uint8 RGB, 3 bytes per pixel). Clips are cut from its memory map, so all processes of a machine share the page
cache. If the video's size or modification time changes, the file is rebuilt.

Frames are bit-identical to those of `VideoFile`. The sound is equal to about 1e-6, except where it depends on where
decoding begins: AAC may replace high frequencies with noise, and rounded time stamps (Matroska) may shift it by a few
samples.
"""

import hashlib
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
ALIGNMENT = 64  # bytes; alignment of the data's offset
LARGEST = 2**29  # bytes; limit for a video's frames, since it is decoded in memory as a whole
EVER = 1e6  # seconds before and after a stream, to get all frames whatever span the container declares


class DecodedVideos:
    """Opens videos; each is decoded once and cached below `folder`.

    A cached file's name holds the video's and a hash of its size and modification time: another data set's of the same
    name is another file, and a copy that kept its time is the same. Files of videos that are gone may be deleted.

    A video that does not decode completely, exceeds `LARGEST` or has frame times that run backwards is not cached. It
    is opened as a `VideoFile`, with the same clips and errors as ever.

    Args:
        sample_rate: of the cached sound in Hz; 0: no sound is cached.
    """

    def __init__(self, folder: str | Path, sample_rate: int) -> None:
        self.folder, self.sample_rate = Path(folder), sample_rate

    def open(self, root: Path, name: str) -> "DecodedFile | VideoFile":
        """Open the video `name` below `root`.

        Raises:
            DecodeError: it cannot be opened.
            UserError: the cache cannot be written.
        """
        path = root / name
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return VideoFile(path)
        stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        digest = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:8]
        kept = self.folder / f"{name}.{digest}.{self.sample_rate}.decoded"
        found = _map(kept, stamp)
        if found is None:
            self._keep(path, kept, stamp)
            found = _map(kept, stamp)
        if found is None or not found[0]["video"]:
            return VideoFile(path)
        return DecodedFile(path, *found)

    def _keep(self, path: Path, kept: Path, stamp: dict) -> None:
        """Decode a video and write the cached file; if it cannot be cached, write a header that says so."""
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
    """Decode a video into the header and the arrays of a cached file.

    Raises:
        DecodeError: it cannot be decoded completely, or must not be cached.
    """
    with VideoFile(path) as file:
        spans = {kind: file.span(kind) for kind in (("video", "audio") if sample_rate else ("video",))}
        video, (start, end) = file.info.video, spans["video"]
        size = (video.frames or (end - start) * video.fps) * video.height * video.width * 3
        if not 0 < size <= LARGEST:
            raise DecodeError(f"{path}: about {size:.0f} bytes of frames; at most {LARGEST} are kept")
        clip, first_sample = file.read(video_start=start - EVER, video_seconds=end - start + 2 * EVER), 0
        if (np.diff(clip.frame_times) < 0).any():
            raise DecodeError(f"{path}: frame times run backwards")
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
    """Return a cached file's header, memory map and data offset; None if it is incomplete or of another video."""
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
    """A cached video with the reading interface of `VideoFile`. A context manager."""

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
        """Do nothing: the map is freed with the last array that uses it."""

    def span(self, kind: str) -> tuple[float, float]:
        """Return the span of a cached stream; see `VideoFile.span`."""
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
        """Read a clip; see `VideoFile.read`. Each stream needs all of its arguments (except `crop`) or none.

        Raises:
            ValueError: the sound is not cached at this sample rate.
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
        """Return `length` samples, starting at index `first` of the cached ones; zeros outside."""
        out = np.zeros(length, np.float32)
        part = self._waveform[max(first, 0) : max(first + length, 0)]
        at = max(-first, 0)
        out[at : at + len(part)] = part
        return out
