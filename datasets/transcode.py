"""Transcode one raw video to one training-ready file with PyAV; `datasets.prepare` does this with every file.

Every frame can be reached by decoding at most `GOP` small and cheap frames. The sound is mono, lossless and at the
sample rate of training. Colours go through the same conversion to RGB with which raw files are read.
"""

import contextlib
import errno
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from datasets.decoder_run import SAME_TIME, MediaError
from datasets.decoding import DecodeError, VideoFile
from utils.errors import UserError

GOP = 12  # frames from one key frame to the next
B_FRAMES = 3  # between two other frames; not referenced, so that a reader can skip those it does not need
QUALITY = 18  # x264's crf; 18 is considered visually lossless
SAMPLE_RATE = 16000  # Hz
AUDIO_FRAME = 4096  # samples
CLOCK = 90000  # ticks per second of the frames' time stamps
ENCODER = {
    "preset": "fast",
    "tune": "fastdecode",
    "crf": str(QUALITY),
    "x264-params": f"keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0:bframes={B_FRAMES}:b-adapt=0:b-pyramid=none",
}
# the delay of the later stream is stored in ticks of the movie's clock, so SAMPLE_RATE and CLOCK must both divide it
CONTAINER = {"movflags": "+faststart", "movie_timescale": "720000"}
SILENT = -60.0  # dBFS; a track below this loudness counts as silent
STILL = 0.05  # mean change of a pixel between frames, of 255; a video below this counts as a still picture
THUMBNAIL = 32  # pixels; side of the thumbnails on which motion is measured

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Facts:
    """Facts about a prepared (or raw) video: times in seconds, rates in Hz, sizes in pixels."""

    duration: float
    frames: int
    fps: float  # average
    width: int
    height: int
    audio: str  # sound, silent, none, broken
    loudness: float  # dBFS, root mean square of the whole track; -inf without sound
    motion: float  # mean absolute change of a pixel from frame to frame, of 255, at 32 x 32
    still: bool
    declared: float  # duration of the video by the raw file's header or, if that declares none, by its packets
    shift: float  # time in the raw file at which the prepared file's clock begins


def transcode(
    source: str | os.PathLike, target: str | os.PathLike, *, short_side: int = 256, fps: float | None = None
) -> Facts:
    """Transcode `source` to the mp4 file `target`, which is written completely or not at all.

    The short side is at most `short_side` pixels and both sides are even; rotation in the metadata is applied. Video is
    H.264 in closed groups of `GOP` frames, most of them not referenced, tuned for fast decoding; audio is FLAC, mono,
    16 kHz, 16 bits. The streams keep their relative position in time and the earlier one starts at 0, so time t in the
    raw file is t - `shift` in the prepared one. Frames keep their times; with `fps` (Hz), the frames nearest to
    regularly spaced times are used. The last frame is shown as long as in the raw file.

    Raises:
        DecodeError: the source has no video that can be decoded.
        UserError: the target cannot be written, for a reason other than the raw file.
    """
    target = Path(target)
    building = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with VideoFile(source) as file:
            building.parent.mkdir(parents=True, exist_ok=True)
            facts = _write(file, building, short_side, fps)
        with building.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(building, target)
    except (*MediaError, OSError) as error:  # some of FFmpeg's errors are OSErrors too
        if not isinstance(error, MediaError) or getattr(error, "errno", None) in DISK_ERRORS:
            raise UserError(f"{target}: could not be written: {error}") from None
        raise DecodeError(f"{source}: asked for: prepare as {target}; found: {error}".replace("\n", " ")) from None
    finally:
        with contextlib.suppress(OSError):
            building.unlink()
    return facts


def recipe(short_side: int, fps: float | None) -> str:
    """Return all that, besides the raw file, determines what `transcode` writes."""
    return f"{short_side} {fps and float(fps)} {SAMPLE_RATE} {AUDIO_FRAME} {CLOCK} {CONTAINER} {ENCODER}"


def recipe_of_inspection() -> str:
    """Return all that, besides the raw file, determines what `inspect` returns."""
    return f"check {SAMPLE_RATE} {SILENT} {STILL} {THUMBNAIL}"


def inspect(source: str | os.PathLike) -> Facts:
    """Return the facts about a raw file by decoding all of it. Raises DecodeError if that fails."""
    try:
        with VideoFile(source) as file:
            return _inspect(file)
    except MediaError as error:
        raise DecodeError(f"{source}: asked for: all of it; found: {error}".replace("\n", " ")) from None


def _inspect(file: VideoFile) -> Facts:
    info, motion, times, end = file.info.video, _Motion(), [], -math.inf
    for time, frame in file.frames():
        times.append(motion.see(time, frame))
        end = max(end, time + _held(frame))
    held = end - times[-1] if times else 0.0
    waveform, audio = _sound(file)
    return _facts(file, times, held, (info.width, info.height), waveform, audio, motion, 0.0)


def _write(file: VideoFile, target: Path, short_side: int, fps: float | None) -> Facts:
    info = file.info.video
    if info is None:
        raise DecodeError(f"{file.path}: asked for: video; found: no video stream that can be decoded")
    waveform, audio = _sound(file)
    frames = file.frames()
    first = next(frames, None)
    if first is None:
        raise DecodeError(f"{file.path}: asked for: all frames; found: no frame that can be decoded")
    audio_start = round(file.info.audio.start * SAMPLE_RATE) / SAMPLE_RATE if len(waveform) else math.inf
    shift = min(math.floor(first[0] * SAMPLE_RATE) / SAMPLE_RATE, audio_start)
    width, height = prepared_size(info.width, info.height, short_side)
    motion, times, held = _Motion(), [], 0.0
    with av.open(str(target), "w", format="mp4", options=CONTAINER) as out:
        video = out.add_stream("libx264", rate=Fraction(fps or info.fps or 25).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = Fraction(1, CLOCK)
        video.codec_context.thread_count = 1
        video.options = dict(ENCODER)
        track = _add_audio(out) if len(waveform) else None
        turn, last_tick = info.rotation // 90, -1
        stored = (height, width) if turn % 2 else (width, height)
        reformatter = av.video.reformatter.VideoReformatter()
        for time, frame in _at_rate(_all(first, frames), fps):
            tick = round((time - shift) * CLOCK)
            if tick <= last_tick:  # of two frames at one time, keep the first
                continue
            rgb = reformatter.reformat(
                frame, width=stored[0], height=stored[1], format="rgb24", interpolation="AREA"
            ).to_ndarray()
            motion.see(time, frame)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(rgb, turn)), format="rgb24")
            picture.pts, picture.time_base = tick, Fraction(1, CLOCK)
            out.mux(video.encode(picture))
            times.append(tick / CLOCK)
            last_tick, held = tick, 1 / fps if fps else _held(frame)
        rest = video.encode(None)
        if held:  # set on the last packet, whatever frame it holds: the muxer derives the others from what follows
            end = max(packet.pts for packet in rest) + round(held / rest[-1].time_base)
            rest[-1].duration = end - rest[-1].pts
        out.mux(rest)
        if track is not None:
            _write_audio(out, track, waveform, round((audio_start - shift) * SAMPLE_RATE))
    return _facts(file, times, held, (width, height), waveform, audio, motion, shift)


def _held(frame: "av.VideoFrame") -> float:
    """Return a frame's duration in seconds; 0: not declared."""
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


def prepared_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return even width and height in pixels, with a short side of at most `short_side`."""
    scale = min(1.0, short_side / min(width, height))
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))


def _all(first: tuple, rest: Iterator[tuple]) -> Iterator[tuple]:
    yield first
    yield from rest


def _at_rate(frames: Iterator[tuple], fps: float | None) -> Iterator[tuple]:
    """Yield the frames unchanged, or those nearest to start + i / fps (the earlier of two equally near)."""
    if fps is None:
        yield from frames
        return
    before, start, count = None, None, 0
    for time, frame in _with_end(frames):
        start = time if start is None else start
        while (wanted := start + count / fps) <= time:
            nearer = before is not None and wanted - before[0] <= time - wanted + SAME_TIME
            yield wanted, before[1] if nearer or frame is None else frame
            count += 1
        before = time, frame


def _with_end(frames: Iterator[tuple]) -> Iterator[tuple]:
    """Yield the frames, then None at the last moment at which the last frame is shown."""
    time, frame = 0.0, None
    for time, frame in frames:
        yield time, frame
    if frame is not None and (held := _held(frame)):
        yield time + held - 1e-6, None


def _sound(file: VideoFile) -> tuple[np.ndarray, str]:
    """Return the whole track at `SAMPLE_RATE`, float32 (samples,), empty if not usable, and its kind."""
    if file.info.audio is None:
        return np.empty(0, np.float32), "none"
    try:
        waveform = file.sound(SAMPLE_RATE)
    except DecodeError:
        return np.empty(0, np.float32), "broken"
    return waveform, "silent" if _loudness(waveform) < SILENT else "sound"


def _loudness(waveform: np.ndarray) -> float:
    power = float(np.mean(np.square(waveform, dtype=np.float64))) if len(waveform) else 0.0
    return 10 * math.log10(power) if power > 0 else -math.inf


def _add_audio(out: "av.container.OutputContainer") -> "av.audio.stream.AudioStream":
    track = out.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
    track.options = {"frame_size": str(AUDIO_FRAME)}
    track.codec_context.time_base = Fraction(1, SAMPLE_RATE)
    return track


def _write_audio(
    out: "av.container.OutputContainer", track: "av.audio.stream.AudioStream", waveform: np.ndarray, first: int
) -> None:
    """Encode a waveform that starts at time `first`, in samples."""
    samples = np.round(waveform * 32767).astype(np.int16)
    for at in range(0, len(samples), AUDIO_FRAME):
        frame = av.AudioFrame.from_ndarray(samples[None, at : at + AUDIO_FRAME], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, first + at, Fraction(1, SAMPLE_RATE)
        out.mux(track.encode(frame))
    out.mux(track.encode(None))


class _Motion:
    """Mean change from frame to frame, measured on gray thumbnails."""

    def __init__(self) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._before, self._sum, self._count = None, 0.0, 0

    def see(self, time: float, frame: "av.VideoFrame") -> float:
        """Add a frame and return its time."""
        small = self._reformatter.reformat(
            frame, width=THUMBNAIL, height=THUMBNAIL, format="gray", interpolation="AREA"
        ).to_ndarray()
        if self._before is not None:
            self._sum += float(np.abs(small.astype(np.int16) - self._before).mean())
            self._count += 1
        self._before = small.astype(np.int16)
        return time

    @property
    def mean(self) -> float:
        return self._sum / self._count if self._count else 0.0


def _facts(
    file: VideoFile,
    times: list[float],
    held: float,
    size: tuple[int, int],
    waveform: np.ndarray,
    audio: str,
    motion: _Motion,
    shift: float,
) -> Facts:
    if not times:
        raise DecodeError(f"{file.path}: asked for: all frames; found: no frame that can be decoded")
    between = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    start, end = file.span("video")
    return Facts(
        duration=round(times[-1] - times[0] + (held or between), 6),
        frames=len(times),
        fps=round(1 / between, 3) if between else 0.0,
        width=size[0],
        height=size[1],
        audio=audio,
        loudness=round(_loudness(waveform), 2),
        motion=round(motion.mean, 3),
        still=motion.mean < STILL,
        declared=round(end - start, 6),
        shift=shift,
    )
