"""Decode the frames and samples of an interval of a media file into arrays (PyAV).

Times are in seconds and follow the file's time stamps (`pts * time_base`, without subtracting the start time). A clip
always equals the same interval of a decode of the whole file: a seek that lands too late is repeated from further back,
finally from the first packet, and frames are selected by the decoder's output times, never by counting. The exception
is AAC with noise substitution, where the noise in the high frequencies depends on where decoding began.

At the borders:

* The first and the last frame are repeated before and after the stream; samples outside the stream are zeros.
* A stream may end up to `SLACK` seconds before its declared end. A clip that reaches further raises a DecodeError, as
  does one with lost frames: a frame that lies `SLACK` seconds further from its target than some packet does. If no end
  is declared, the stream ends with its data. A container of several streams declares the end of the longest, so this
  counts only if the data of none reaches it: the file is truncated. A read without an end returns what can be decoded,
  and fails if nothing can.
* AVI stores no presentation times, and the demuxer's guesses run backwards with B-frames. There, a frame's time is the
  decoding time at which the decoder outputs it, as in FFmpeg's own tools. In other formats, a frame without a time
  stamp gets its decoding time, or else the time of the previous frame plus one frame duration.
"""

import contextlib
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import av
import numpy as np

from datasets.decoder_run import MediaError, Run, Timed, distance, nearest, within
from datasets.waveform import FILTER_MARGIN, cut, end_of, mono_pieces

SLACK = 0.5  # seconds; tolerance between declared and decoded ends, and between packets and frames
PREROLL = 0.3  # seconds of audio decoded before the start: priming, overlap, mp3's bit reservoir
ANY_METADATA = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}  # PyAV 19: always so
NOT_MEDIA = ("tty", "bin", "xbin", "adf", "idf")  # demuxers that render text files as images

av.logging.set_level(None)  # damaged files are reported by DecodeError, not by FFmpeg on the console


class DecodeError(Exception):
    """A file cannot be read as requested. The message is one line: path, request, finding."""


@dataclass(frozen=True)
class VideoInfo:
    """A video stream as declared by the container. `width` and `height` (pixels) apply after rotation."""

    start: float  # seconds
    duration: float  # seconds; 0: not declared
    fps: float  # average, Hz; 0: not declared
    width: int
    height: int
    rotation: int  # degrees counter-clockwise that turn the stored frames upright: 0, 90, 180 or 270
    codec: str
    frames: int | None  # None: not declared


@dataclass(frozen=True)
class AudioInfo:
    """An audio stream as declared by the container."""

    start: float  # seconds
    duration: float  # seconds; 0: not declared
    sample_rate: int  # Hz
    channels: int
    codec: str


@dataclass(frozen=True)
class MediaInfo:
    """Result of `probe`: the first video and the first audio stream that have a decoder, else None."""

    path: str
    video: VideoInfo | None
    audio: AudioInfo | None


@dataclass(repr=False)
class Clip:
    """A decoded interval of a file. A stream that is missing or was not requested has length 0."""

    frames: np.ndarray  # (T, H, W, 3) uint8 RGB, upright
    frame_times: np.ndarray  # (T,) float64 seconds; the frames' own times, not the requested ones
    waveform: np.ndarray  # (L,) float32 mono in [-1, 1]
    sample_rate: int  # Hz; 0 without audio

    def __repr__(self) -> str:
        return f"Clip(frames {self.frames.shape}, waveform {self.waveform.shape} at {self.sample_rate} Hz)"


def probe(path: str | os.PathLike) -> MediaInfo:
    """Return a file's streams, durations and rates without decoding. Raises DecodeError if it cannot be opened."""
    with VideoFile(path) as file:
        return file.info


def read_clip(
    path: str | os.PathLike,
    *,
    video_start: float | None = None,
    video_seconds: float | None = None,
    fps: float | None = None,
    audio_start: float | None = None,
    audio_seconds: float | None = None,
    sample_rate: int | None = None,
    crop: tuple[int, int, int, int] | None = None,
) -> Clip:
    """Open a file, read one clip and close it. Arguments and errors are those of `VideoFile.read`."""
    with VideoFile(path) as file:
        return file.read(
            video_start=video_start,
            video_seconds=video_seconds,
            fps=fps,
            audio_start=audio_start,
            audio_seconds=audio_seconds,
            sample_rate=sample_rate,
            crop=crop,
        )


class VideoFile:
    """An open media file from which any number of clips can be read. A context manager.

    Raises:
        DecodeError: it is not a regular file, or holds no media that can be decoded.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._container = None
        self._cut_end: float | None = None  # of `_end_if_truncated`, once it is known
        self._sparing = True  # False once the packets' time stamps do not show which frames exist
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._check_regular_file()
        self._open()
        try:
            self.info = self._describe()
        except DecodeError:
            self.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._container is not None:
            self._container.close()
            self._container = None

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
        """Decode an interval. Passing any argument of a stream requests it; passing none requests all streams.

        Args:
            video_start: seconds; None: the stream's start.
            video_seconds: duration in seconds; None: to the end.
            fps: Hz; returns round(video_seconds * fps) frames, each the nearest to video_start + i / fps (the earlier
                of two equally near). None: every frame with video_start <= time < video_start + video_seconds.
            audio_start: seconds; None: the stream's start.
            audio_seconds: duration in seconds; None: to the end.
            sample_rate: Hz; returns round(audio_seconds * sample_rate) samples. None: the file's own rate.
            crop: (top, left, height, width) in pixels of the upright frames. None: the whole frames.

        Raises:
            DecodeError: a requested stream is missing, or cannot be decoded in the requested interval.
            ValueError: a duration or rate is not above 0, a start is not finite, the clip is shorter than one frame or
                sample, the sample rate is not whole, or the crop is not inside the frames.
        """
        _check_arguments((video_start, audio_start), (video_seconds, fps, audio_seconds, sample_rate))
        if video_seconds and fps and not round(video_seconds * fps):
            raise ValueError(f"{video_seconds} s at {fps} fps must be at least one frame")
        if sample_rate is not None:
            if sample_rate != int(sample_rate):
                raise ValueError(f"sample_rate must be a whole number of Hz, found {sample_rate}")
            sample_rate = int(sample_rate)
        ask_video = any(value is not None for value in (video_start, video_seconds, fps))
        ask_audio = any(value is not None for value in (audio_start, audio_seconds, sample_rate))
        clip = Clip(np.empty((0, 0, 0, 3), np.uint8), np.empty(0), np.empty(0, np.float32), 0)
        if ask_video or (self.info.video and not ask_audio):
            self._require("video")
            clip.frames, clip.frame_times = self._read_video(video_start, video_seconds, fps, self._inside(crop))
        if ask_audio or (self.info.audio and not ask_video):
            self._require("audio")
            clip.sample_rate = sample_rate or self.info.audio.sample_rate
            clip.waveform = self._read_audio(audio_start, audio_seconds, clip.sample_rate)
        return clip

    def span(self, kind: str) -> tuple[float, float]:
        """Return the interval (start, end) in seconds that the "video" or "audio" stream covers.

        This is the declared interval. If no end is declared for the stream (a recorded live stream, a bare elementary
        stream, FLV), all packets are read, without decoding, to find the end.

        Raises:
            DecodeError: there is no such stream that can be decoded.
        """
        self._require(kind)
        start, end = getattr(self.info, kind).start, self._declared_end(kind)
        return start, next(self._runs(kind, -math.inf)).end() if end == -math.inf else end

    def frames(self) -> "Iterator[Timed]":
        """Yield every video frame as (time in seconds, PyAV frame without rotation), in display order.

        Decodes from the file's first packet, with one frame at a time in memory, until the data ends.

        Raises:
            DecodeError: there is no video stream that can be decoded; or, after the last frame, some between the first
                and the last were lost.
        """
        self._require("video")
        run, found = next(self._runs("video", -math.inf)), []
        for time, frame in run:
            found.append(time)
            yield time, frame
        if found:  # a video that begins late or ends early has no gap
            self._check_decoded(run, "all frames", run.packets_within(min(found), max(found)), np.array(found))

    def sound(self, sample_rate: int) -> np.ndarray:
        """Return the whole track at `sample_rate` Hz: mono, float32 (L,) in [-1, 1].

        Raises:
            DecodeError: there is no audio stream that can be decoded, or a part of it was lost.
        """
        self._require("audio")
        return self._read_audio(None, None, sample_rate, complete=True)

    # Opening

    def _check_regular_file(self) -> None:
        """Raise DecodeError unless the path is a regular file; opening a named pipe would block forever."""
        try:
            status = os.stat(self.path)
        except (OSError, ValueError) as error:
            raise self._error("open", getattr(error, "strerror", None) or error) from None
        if stat.S_ISDIR(status.st_mode):
            raise self._error("open", "a directory")
        if not stat.S_ISREG(status.st_mode):
            raise self._error("open", "not a regular file")
        if status.st_size == 0:
            raise self._error("open", "an empty file")

    def _open(self) -> None:
        """(Re)open the container at its first packet."""
        self.close()
        try:  # "file:" keeps names with a colon from being parsed as URLs; playlists must not access the network
            self._container = av.open(f"file:{self.path}", **ANY_METADATA, options={"protocol_whitelist": "file"})
        except MediaError as error:
            raise self._error("open", f"no media that FFmpeg can read ({_reason(error)})") from None
        self._at_first_packet, self._encoder_noted = True, False
        self._dump_text = self._dump()
        for kind in ("video", "audio"):
            stream = self._stream(kind)
            if stream is not None:
                stream.codec_context.thread_count = 1  # the loader's workers run in parallel already
                stream.codec_context.thread_type = "NONE"

    def _stream(self, kind: str) -> "av.stream.Stream | None":
        for stream in self._container.streams:
            if stream.type == kind and stream.codec_context is not None:
                if "(attached pic)" not in self._dumped(stream):
                    return stream
        return None

    def _dump(self) -> str:
        """Return what FFmpeg's command-line tool prints about the file."""
        level = av.logging.get_level()
        av.logging.set_level(av.logging.INFO)
        try:
            return self._container.dumps_format()
        finally:
            av.logging.set_level(level)

    def _dumped(self, stream: "av.stream.Stream") -> str:
        """Return the dump of one stream, for facts that PyAV does not expose otherwise without decoding."""
        part = re.search(rf"Stream #0:{stream.index}\b.*?(?=\n *Stream #|\Z)", self._dump_text, re.DOTALL)
        return part[0] if part else ""

    def _describe(self) -> MediaInfo:
        video, audio = self._stream("video"), self._stream("audio")
        name = self._container.format.name
        if name in NOT_MEDIA or (video is None and audio is None):
            found = ", ".join(stream.type for stream in self._container.streams)
            raise self._error("open", f"no stream that can be decoded (format {name}, streams: {found or 'none'})")
        return MediaInfo(self.path, video and self._describe_video(video), audio and self._describe_audio(audio))

    def _describe_video(self, stream: "av.video.stream.VideoStream") -> VideoInfo:
        context = stream.codec_context
        rotation = self._rotation(stream)
        width, height = _turned(context.width, context.height, rotation)
        if not (width and height):
            raise self._error("open", "a video stream without a picture size")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        span = self._span(stream)
        return VideoInfo(*span, fps, width, height, rotation, context.name, stream.frames or None)

    def _describe_audio(self, stream: "av.audio.stream.AudioStream") -> AudioInfo:
        context = stream.codec_context
        if not context.sample_rate:
            raise self._error("open", "an audio stream without a sample rate")
        return AudioInfo(*self._span(stream), context.sample_rate, context.layout.nb_channels, context.name)

    def _span(self, stream: "av.stream.Stream") -> tuple[float, float]:
        """Return the declared start and duration in seconds, from the stream or its Matroska tag.

        The duration may also be that of the container, if no other stream can have set it.
        """
        start = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
        if stream.duration:
            return start, float(stream.duration * stream.time_base)
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        if tag:
            return start, int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) - start
        if self._container.duration is None or len(self._container.streams) > 1:
            return start, 0.0
        return start, self._container_end() - start

    def _container_end(self) -> float:
        return ((self._container.start_time or 0) + self._container.duration) / av.time_base

    def _declared_end(self, kind: str) -> float:
        """Return the end in seconds that the file declares for a stream; -inf: none."""
        info = getattr(self.info, kind)
        if info.duration or self._container.duration is None:
            return info.start + info.duration if info.duration else -math.inf
        if self._cut_end is None:
            self._cut_end = self._end_if_truncated()
        return self._cut_end

    def _end_if_truncated(self) -> float:
        """Return the container's end in seconds if the data of no stream reaches it, else -inf.

        Reads all packets.
        """
        self._open()
        self._at_first_packet, reach = False, -math.inf
        with contextlib.suppress(MediaError):  # the data end here
            for packet in self._container.demux():
                if packet.size and packet.dts is not None:
                    last = packet.dts if packet.pts is None else max(packet.pts, packet.dts)
                    reach = max(reach, float((last + (packet.duration or 0)) * packet.time_base))
        return self._container_end() if reach < self._container_end() - SLACK else -math.inf

    def _rotation(self, stream: "av.video.stream.VideoStream") -> int:
        """Return the rotation of the display matrix in degrees, rounded to quarter turns."""
        turn = re.search(r"rotation of (-?[\d.]+) degrees", self._dumped(stream))
        return round(float(turn[1]) / 90) % 4 * 90 if turn else 0

    # Decoding

    def _runs(self, kind: str, time: float) -> "Iterator[Run]":
        """Yield decoder runs of a stream that start at or before `time`, each further back than the last."""
        info = getattr(self.info, kind)
        stream = self._stream(kind)
        end = info.start + (info.duration or math.inf)
        for back in (0.0, 2.0, 10.0):
            target = min(time, end) - back
            if stream.start_time is None or target <= info.start:
                break
            if kind == "video":
                self._note_encoder()
                stream = self._stream(kind)
            self._at_first_packet = False
            try:
                self._container.seek(int(target / stream.time_base), stream=stream)
            except MediaError:
                continue
            yield Run(self._container, stream, info, from_start=False)
        if not self._at_first_packet:
            self._open()
        self._at_first_packet = False
        yield Run(self._container, self._stream(kind), info, from_start=True)

    def _note_encoder(self) -> None:
        """Decode the first packet before a seek if the decoder needs the encoder's version.

        4:4:4 files of old x264 versions need a workaround, and only the first packet names the version.
        """
        context = self._stream("video").codec_context
        if self._encoder_noted or context.name != "h264" or "444" not in (context.pix_fmt or ""):
            return
        if not self._at_first_packet:
            self._open()
        next(iter(Run(self._container, self._stream("video"), self.info.video, from_start=True)), None)
        self._encoder_noted = True

    def _read_video(
        self, start: float | None, seconds: float | None, fps: float | None, crop: tuple[int, int, int, int]
    ) -> tuple:
        info = self.info.video
        bounded = seconds is not None
        whole = start is None and not bounded
        first = info.start if start is None else start
        stop = first + seconds if bounded else math.inf
        number = round(seconds * fps) if bounded and fps else None
        if fps:
            pick, last = partial(nearest, start=first, fps=fps, number=number), first + ((number or 0) - 1) / fps
        else:
            pick, last = partial(within, start=-math.inf if start is None else first, stop=stop), stop
        time = -math.inf if whole else first - (3 / info.fps if info.fps else 0.0)
        chosen = []
        if bounded and self._sparing:
            run = next(self._runs("video", time))
            chosen = run.pick_sparingly(pick, first, last)
            self._sparing = bool(chosen)
        if not chosen:
            for run in self._runs("video", time):
                chosen = pick(run)
                if run.from_start or run.covers(first):
                    break
        asked = f"video {first:.3f} to {stop:.3f} s" if bounded else f"video from {first:.3f} s"
        asked += f" at {fps:g} fps" if fps else ""
        if not chosen:
            raise self._error(asked, "no frame there that can be decoded")
        times = np.array([time for time, _ in chosen])
        if bounded:
            needed = first + np.arange(number) / fps if fps else run.packets_within(first, stop)
            self._check_complete("video", run, asked, needed, times, needed[-1] if fps else stop)
        return self._to_rgb(chosen, asked, crop), times

    def _check_complete(
        self, kind: str, run: "Run", asked: str, needed: np.ndarray, found: np.ndarray, stop: float
    ) -> None:
        """Raise DecodeError if the file ends too early or the decoder lost any of the `needed` times (seconds)."""
        if run.ended and stop > run.reach + SLACK and (end := self._declared_end(kind)) > run.reach + SLACK:
            raise self._error(asked, f"data up to {max(run.reach, 0):.3f} s of the {end:.3f} s declared")
        self._check_decoded(run, asked, needed, found)

    def _check_decoded(self, run: "Run", asked: str, needed: np.ndarray, found: np.ndarray) -> None:
        """Raise DecodeError if the decoder lost any of the `needed` times (seconds)."""
        lost = needed[distance(needed, found) > distance(needed, np.array(run.packets)) + SLACK]
        if len(lost):
            raise self._error(asked, f"packets around {lost[0]:.3f} s that do not decode")

    def _inside(self, crop: tuple[int, int, int, int] | None) -> tuple[int, int, int, int]:
        info = self.info.video
        top, left, height, width = crop or (0, 0, info.height, info.width)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > info.height or left + width > info.width:
            raise ValueError(f"a crop must lie inside the {info.height} x {info.width} frames, found {crop}")
        return top, left, height, width

    def _to_rgb(self, chosen: "list[Timed]", asked: str, crop: tuple[int, int, int, int]) -> np.ndarray:
        """Convert to upright RGB, uint8 (T, height, width, 3). A frame chosen several times is converted once."""
        top, left, height, width = crop
        out = np.empty((len(chosen), height, width, 3), np.uint8)
        for i, (_, frame) in enumerate(chosen):
            if i and frame is chosen[i - 1][1]:
                out[i] = out[i - 1]
                continue
            try:
                rows, at_top, at_left = self._rgb_of(frame, crop)
            except MediaError as error:
                raise self._error(asked, f"a frame that cannot be converted to RGB ({_reason(error)})") from None
            out[i] = rows[top - at_top : top - at_top + height, left - at_left : left - at_left + width]
        return out

    def _rgb_of(self, frame: "av.VideoFrame", crop: tuple[int, int, int, int]) -> tuple[np.ndarray, int, int]:
        """Return a part of the upright frame that contains the crop, uint8 (h, w, 3), and its top and left.

        Only that part is converted if its pixels are the same as in the whole frame: with 4:2:0 subsampling and even
        coordinates, each block of 2 x 2 pixels of a progressive frame has its own colour.
        """
        info = self.info.video
        width, height = _turned(info.width, info.height, info.rotation)
        top = left = 0
        even = not (width % 2 or height % 2 or info.rotation) and (frame.width, frame.height) == (width, height)
        in_blocks = frame.format.name in ("yuv420p", "yuvj420p") and not frame.interlaced_frame
        if even and in_blocks and crop[2:] != (height, width):
            top, left = crop[0] // 2 * 2, crop[1] // 2 * 2
            height, width = -(-(crop[0] + crop[2]) // 2) * 2 - top, -(-(crop[1] + crop[3]) // 2) * 2 - left
            part = av.VideoFrame(width, height, frame.format.name)
            part.colorspace, part.color_range = frame.colorspace, frame.color_range
            for to, plane, size in zip(part.planes, frame.planes, (1, 2, 2), strict=True):
                _pixels(to)[:] = _pixels(plane)[top // size :, left // size :][: height // size, : width // size]
            frame = part
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24")
        rows = _pixels(rgb.planes[0], channels=3).reshape(height, width, 3)
        return np.rot90(rows, info.rotation // 90), top, left

    def _read_audio(self, start: float | None, seconds: float | None, rate: int, complete: bool = False) -> np.ndarray:
        info = self.info.audio
        bounded = seconds is not None
        first = info.start if start is None else start
        stop = first + seconds if bounded else math.inf
        if bounded and not round(seconds * rate):
            raise ValueError(f"{seconds} s at {rate} Hz must be at least one sample")
        whole = start is None and not bounded
        asked = f"audio {first:.3f} to {stop:.3f} s" if bounded else f"audio from {first:.3f} s"
        for run in self._runs("audio", -math.inf if whole else first - PREROLL):
            try:
                pieces = mono_pieces(run, stop + FILTER_MARGIN)
            except MediaError as error:
                raise self._error(asked, f"samples that cannot be mixed to mono ({_reason(error)})") from None
            if run.from_start or run.covers(first - PREROLL / 2):
                break
        found = np.array([time for time, _ in pieces])
        if bounded:
            self._check_complete("audio", run, asked, run.packets_within(first, stop), found, stop)
        elif not pieces or (stop := end_of(pieces, info.sample_rate)) <= first:
            raise self._error(asked, "no samples there that can be decoded")
        elif complete:
            end = info.start + (info.duration or math.inf)
            self._check_decoded(run, asked, run.packets_within(first, end), found)
        length = round((seconds if bounded else stop - first) * rate)
        return cut(pieces, info.sample_rate, first, rate, length)

    # Errors

    def _require(self, kind: str) -> None:
        if getattr(self.info, kind) is None:
            other = "audio" if kind == "video" else "video"
            raise self._error(kind, f"no {kind} stream that can be decoded, only {other}")

    def _error(self, asked: str, found: object) -> DecodeError:
        return DecodeError(f"{self.path}: asked for: {asked}; found: {found}".replace("\n", " "))


def _turned(width: int, height: int, rotation: int) -> tuple[int, int]:
    """Return a frame's width and height after a rotation by `rotation` degrees."""
    return (height, width) if rotation % 180 else (width, height)


def _pixels(plane: "av.video.plane.VideoPlane", channels: int = 1) -> np.ndarray:
    """Return a view of a plane's 8-bit samples without row padding, uint8 (h, w * channels)."""
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : channels * plane.width]


def _check_arguments(starts: tuple, above_0: tuple) -> None:
    for value in starts:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a start must be finite, found {value}")
    for value in above_0:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"a duration or rate must be above 0, found {value}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
