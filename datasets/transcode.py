"""One raw video -> one training-ready file: what `datasets.prepare` does with each file, by PyAV alone.

Every frame can be reached by decoding at most `GOP` frames, which are small and cheap to decode; the sound is mono, at
the rate that training wants, and lossless. Colours pass through the conversion to RGB by which raw files are read.
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

from datasets.decoding import DecodeError, VideoFile
from utils.errors import UserError

GOP = 12  # frames from one key frame to the next
B_FRAMES = 3  # between two others; none refers to them, so that a reader skips those that it does not want
QUALITY = 18  # x264's crf: 18 passes for transparent
SAMPLE_RATE = 16000  # Hz
AUDIO_FRAME = 4096  # samples
CLOCK = 90000  # ticks a second of the frames' time stamps
# where a stream begins later than the other is told in ticks of the movie's clock: both SAMPLE_RATE and CLOCK divide it
CONTAINER = {"movflags": "+faststart", "movie_timescale": "720000"}
SILENT = -60.0  # dBFS; below this loudness a track counts as silent
STILL = 0.05  # mean change of a pixel between frames, of 255; below this a video counts as a still picture
THUMBNAIL = 32  # pixels a side, of the pictures that motion is measured on

MediaError = (av.error.FFmpegError, ValueError)
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Facts:
    """What is in a video: times in seconds, rates in Hz, sizes in pixels of the prepared file (or of the raw one)."""

    duration: float
    frames: int
    fps: float  # average
    width: int
    height: int
    audio: str  # sound, silent, none, broken
    loudness: float  # dBFS, root mean square of the whole track; -inf without sound
    motion: float  # mean absolute change of a pixel from frame to frame, of 255, at 32 x 32
    still: bool
    declared: float  # seconds of video that the raw file says it has; 0: it does not say
    shift: float  # time in the raw file at which the prepared one's clock begins


def transcode(
    source: str | os.PathLike, target: str | os.PathLike, *, short_side: int = 256, fps: float | None = None
) -> Facts:
    """Write `target`, an mp4 file with what is in `source`; whole or not at all.

    The short side is at most `short_side` pixels and both are even; a rotation in the metadata is carried out. H.264
    with closed groups of `GOP` frames, most of them ones that no other refers to, tuned for fast decoding; FLAC, mono,
    16 kHz, 16 bits. Both streams keep their places in time relative to each other, and the earlier one starts at 0: a
    moment t of the raw file is t - `shift` in the prepared one. Frames keep their times; with `fps` (Hz) they are the
    nearest ones to times that far apart. The last one is held as long as in the raw file.

    Raises:
        DecodeError: no video in it that can be decoded.
        UserError: the target cannot be written, which is not the raw file's fault.
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


def inspect(source: str | os.PathLike) -> Facts:
    """The facts on a file as it is, by decoding all of it; DecodeError where that cannot be done."""
    with VideoFile(source) as file:
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
        video.options = {
            "preset": "fast",
            "tune": "fastdecode",
            "crf": str(QUALITY),
            "x264-params": f"keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0:"
            f"bframes={B_FRAMES}:b-adapt=0:b-pyramid=none",
        }
        track = _add_audio(out) if len(waveform) else None
        turn, last_tick = info.rotation // 90, -1
        stored = (height, width) if turn % 2 else (width, height)
        reformatter = av.video.reformatter.VideoReformatter()
        for time, frame in _at_rate(_all(first, frames), fps):
            tick = round((time - shift) * CLOCK)
            if tick <= last_tick:  # two frames at one time: the first stays
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
        if held:  # by the last packet, whichever picture is in it: of the others the muxer takes what follows
            end = max(packet.pts for packet in rest) + round(held / rest[-1].time_base)
            rest[-1].duration = end - rest[-1].pts
        out.mux(rest)
        if track is not None:
            _write_audio(out, track, waveform, round((audio_start - shift) * SAMPLE_RATE))
    return _facts(file, times, held, (width, height), waveform, audio, motion, shift)


def _held(frame: "av.VideoFrame") -> float:
    """Seconds for which a frame is shown by its file; 0: it does not say."""
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


def prepared_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height in pixels, even, of a picture whose short side is to be at most so long."""
    scale = min(1.0, short_side / min(width, height))
    return tuple(max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in (width, height))


def _all(first: tuple, rest: Iterator[tuple]) -> Iterator[tuple]:
    yield first
    yield from rest


def _at_rate(frames: Iterator[tuple], fps: float | None) -> Iterator[tuple]:
    """The frames as they are, or at start + i / fps the one nearest to that time (of two equally near, the earlier)."""
    if fps is None:
        yield from frames
        return
    before, start, count = None, None, 0
    for time, frame in _with_end(frames):
        start = time if start is None else start
        while (wanted := start + count / fps) <= time:
            nearer = before is not None and wanted - before[0] <= time - wanted + 1e-9
            yield wanted, before[1] if nearer or frame is None else frame
            count += 1
        before = time, frame


def _with_end(frames: Iterator[tuple]) -> Iterator[tuple]:
    """The frames, and then None at the last moment at which the last one is shown."""
    time, frame = 0.0, None
    for time, frame in frames:
        yield time, frame
    if frame is not None and (held := _held(frame)):
        yield time + held - 1e-6, None


def _sound(file: VideoFile) -> tuple[np.ndarray, str]:
    """The whole track at `SAMPLE_RATE`, float32 (samples,), and what it is; empty where there is none to use."""
    if file.info.audio is None:
        return np.empty(0, np.float32), "none"
    try:
        waveform = file.read(sample_rate=SAMPLE_RATE).waveform
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
    """Encode a waveform whose first sample has the time `first`, in samples."""
    samples = np.round(waveform * 32767).astype(np.int16)
    for at in range(0, len(samples), AUDIO_FRAME):
        frame = av.AudioFrame.from_ndarray(samples[None, at : at + AUDIO_FRAME], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, first + at, Fraction(1, SAMPLE_RATE)
        out.mux(track.encode(frame))
    out.mux(track.encode(None))


class _Motion:
    """The mean change from frame to frame, on small grey pictures."""

    def __init__(self) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._before, self._sum, self._count = None, 0.0, 0

    def see(self, time: float, frame: "av.VideoFrame") -> float:
        """Count a frame, and give its time back."""
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
        declared=round(file.info.video.duration, 6),
        shift=shift,
    )
