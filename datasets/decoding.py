"""Open a media file, find the frames and samples of some seconds of it, and hand them over as arrays (PyAV).

Times are seconds on the file's own time stamps (`pts * time_base`, the start time not subtracted). Whatever the file,
a clip equals the one cut from a decode of the whole file: a seek that lands too late is repeated from further back, at
last from the first packet, and choices are made on the decoder's output times, never by counting frames.

What happens at the borders:

* Frames before the first or after the last one repeat the first or the last; samples outside the stream are zeros.
* A stream may end up to `SLACK` seconds before its declared end. A clip that reaches further is a DecodeError, and so
  is one whose frames the decoder lost: a frame that lies `SLACK` seconds further from its target than some packet does.
  A read without an end takes what can be decoded, if that is anything at all.
* AVI stores no presentation times, and the demuxer's guesses run backwards with B-frames: there the time of a frame is
  the decoding time at which the decoder gives it out, as in FFmpeg's own tools. Elsewhere a frame without a time stamp
  takes its decoding time, and without that, the time of the frame before plus one frame.
"""

import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np

SLACK = 0.5  # seconds that declared and decoded ends, or packets and frames, may lie apart
SKIP_MARGIN = 0.35  # seconds before the first frame needed from which every frame is decoded
PREROLL = 0.3  # seconds of audio decoded before those needed: priming, overlap, mp3's bit reservoir
FILTER_MARGIN = 0.05  # seconds of audio on both sides that the resampling filter may look at
JITTER = 0.005  # seconds by which audio time stamps may deviate before that is a gap or an overlap
SAME_TIME = 1e-9  # seconds; below this, floating-point noise
SKIPPING_CODECS = ("h264", "hevc", "mpeg4")  # decoders whose NONREF skipping may be changed while they run
NOT_MEDIA = ("tty", "bin", "xbin", "adf", "idf")  # demuxers that draw text files as pictures

av.logging.set_level(None)  # damaged files are reported by DecodeError, not by FFmpeg's lines on the console

MediaError = (av.error.FFmpegError, ValueError, EOFError)


class DecodeError(Exception):
    """A file that cannot be read as asked. One line: the path, what was asked for, what was found."""


@dataclass(frozen=True)
class VideoInfo:
    """A video stream, as the container declares it. `width` and `height` (pixels) are those after rotation."""

    start: float  # seconds
    duration: float  # seconds; 0: not declared
    fps: float  # average, Hz; 0: not declared
    width: int
    height: int
    rotation: int  # degrees counter-clockwise that make the stored pictures upright: 0, 90, 180 or 270
    codec: str
    frames: int | None  # None: not declared


@dataclass(frozen=True)
class AudioInfo:
    """An audio stream, as the container declares it."""

    start: float  # seconds
    duration: float  # seconds; 0: not declared
    sample_rate: int  # Hz
    channels: int
    codec: str


@dataclass(frozen=True)
class MediaInfo:
    """What `probe` finds: the first video and the first audio stream that have a decoder, None where there is none."""

    path: str
    video: VideoInfo | None
    audio: AudioInfo | None


@dataclass(repr=False)
class Clip:
    """Decoded seconds of a file. A stream that is missing or was not asked for has length 0."""

    frames: np.ndarray  # (T, H, W, 3) uint8 RGB, upright
    frame_times: np.ndarray  # (T,) float64 seconds, of the frames themselves (not of the times asked for)
    waveform: np.ndarray  # (L,) float32 mono in [-1, 1]
    sample_rate: int  # Hz; 0 without audio

    def __repr__(self) -> str:
        return f"Clip(frames {self.frames.shape}, waveform {self.waveform.shape} at {self.sample_rate} Hz)"


def probe(path: str | os.PathLike) -> MediaInfo:
    """Streams, durations and rates of a file, without decoding. Raises DecodeError where it cannot be opened."""
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
) -> Clip:
    """Open, read one clip, close. Arguments and errors are those of `VideoFile.read`."""
    with VideoFile(path) as file:
        return file.read(
            video_start=video_start,
            video_seconds=video_seconds,
            fps=fps,
            audio_start=audio_start,
            audio_seconds=audio_seconds,
            sample_rate=sample_rate,
        )


class VideoFile:
    """An open media file, of which any number of clips can be read. A context manager.

    Raises:
        DecodeError: no regular file, or no media in it that can be decoded.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._container = None
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
    ) -> Clip:
        """Decode the seconds asked for. Naming any argument of a stream asks for it; naming none asks for all there is.

        Args:
            video_start: seconds; None: the stream's start.
            video_seconds: duration in seconds; None: to the end.
            fps: Hz; round(video_seconds * fps) frames, each the one nearest to video_start + i / fps (of two equally
                near, the earlier). None: every frame with video_start <= time < video_start + video_seconds.
            audio_start: seconds; None: the stream's start.
            audio_seconds: duration in seconds; None: to the end.
            sample_rate: Hz; round(audio_seconds * sample_rate) samples. None: the file's own rate.

        Raises:
            DecodeError: a stream asked for is missing, or cannot be decoded where asked for.
            ValueError: a duration or rate that is not above 0, a start that is not finite, or less than one frame.
        """
        _check_arguments((video_start, audio_start), (video_seconds, fps, audio_seconds, sample_rate))
        if video_seconds and fps and not round(video_seconds * fps):
            raise ValueError(f"{video_seconds} s at {fps} fps must be at least one frame")
        ask_video = any(value is not None for value in (video_start, video_seconds, fps))
        ask_audio = any(value is not None for value in (audio_start, audio_seconds, sample_rate))
        clip = Clip(np.empty((0, 0, 0, 3), np.uint8), np.empty(0), np.empty(0, np.float32), 0)
        if ask_video or (self.info.video and not ask_audio):
            self._require("video")
            clip.frames, clip.frame_times = self._read_video(video_start, video_seconds, fps)
        if ask_audio or (self.info.audio and not ask_video):
            self._require("audio")
            clip.sample_rate = sample_rate or self.info.audio.sample_rate
            clip.waveform = self._read_audio(audio_start, audio_seconds, clip.sample_rate)
        return clip

    def frames(self) -> "Iterator[_Timed]":
        """Every frame of the video as (time in seconds, PyAV's frame, not rotated), in the order of display.

        Decoded from the file's first packet on, one frame at a time in memory. Iteration ends where the data do.

        Raises:
            DecodeError: there is no video stream that can be decoded.
        """
        self._require("video")
        for run in self._runs("video", -math.inf):
            yield from run

    # Opening

    def _check_regular_file(self) -> None:
        """Only a regular file is opened: opening a named pipe would wait for ever."""
        try:
            status = os.stat(self.path)
        except (OSError, ValueError) as error:
            raise self._error("open", getattr(error, "strerror", None) or error) from None
        if stat.S_ISDIR(status.st_mode):
            raise self._error("open", "a directory")
        if not stat.S_ISREG(status.st_mode):
            raise self._error("open", "no regular file")
        if status.st_size == 0:
            raise self._error("open", "an empty file")

    def _open(self) -> None:
        """(Re)open the container at its first packet."""
        self.close()
        try:  # "file:" keeps names with a colon from being read as addresses; a playlist must not reach the network
            self._container = av.open(
                f"file:{self.path}", metadata_errors="ignore", options={"protocol_whitelist": "file"}
            )
        except MediaError as error:
            raise self._error("open", f"no media that FFmpeg can read ({_reason(error)})") from None
        self._at_first_packet, self._encoder_noted = True, False
        self._dump_text = self._dump()
        for kind in ("video", "audio"):
            stream = self._stream(kind)
            if stream is not None:
                stream.codec_context.thread_count = 1  # the loader's workers are the parallel part
                stream.codec_context.thread_type = "NONE"

    def _stream(self, kind: str) -> "av.stream.Stream | None":
        for stream in self._container.streams:
            if stream.type == kind and stream.codec_context is not None:
                if "(attached pic)" not in self._dumped(stream):
                    return stream
        return None

    def _dump(self) -> str:
        """What FFmpeg's command line tool prints about the file."""
        level = av.logging.get_level()
        av.logging.set_level(av.logging.INFO)
        try:
            return self._container.dumps_format()
        finally:
            av.logging.set_level(level)

    def _dumped(self, stream: "av.stream.Stream") -> str:
        """The part of the dump about one stream. It holds what PyAV 14 shows nowhere else without decoding."""
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
        width, height = (context.width, context.height)[:: -1 if rotation % 180 else 1]
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
        """Declared start and duration in seconds: the stream's, else its Matroska tag's, else the container's."""
        start = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
        if stream.duration:
            return start, float(stream.duration * stream.time_base)
        tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        if tag:
            return start, int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) - start
        if self._container.duration is None:
            return start, 0.0
        return start, ((self._container.start_time or 0) + self._container.duration) / av.time_base - start

    def _rotation(self, stream: "av.video.stream.VideoStream") -> int:
        """The quarter turns of the display matrix, in degrees."""
        turn = re.search(r"rotation of (-?[\d.]+) degrees", self._dumped(stream))
        return round(float(turn[1]) / 90) % 4 * 90 if turn else 0

    # Decoding

    def _runs(self, kind: str, time: float) -> "Iterator[_Run]":
        """Decode a stream from at or before `time`, then from ever earlier; only the first run skips frames."""
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
            yield _Run(self._container, stream, info, from_start=False, skip_before=time if back == 0 else None)
        if not self._at_first_packet:
            self._open()
        self._at_first_packet = False
        yield _Run(self._container, self._stream(kind), info, from_start=True)

    def _note_encoder(self) -> None:
        """Show the decoder the first packet before a seek where it has to know the encoder's version.

        Old x264 made 4:4:4 files that decode rightly only with a workaround, and says so in the first packet alone.
        """
        context = self._stream("video").codec_context
        if self._encoder_noted or context.name != "h264" or "444" not in (context.pix_fmt or ""):
            return
        if not self._at_first_packet:
            self._open()
        next(iter(_Run(self._container, self._stream("video"), self.info.video, from_start=True)), None)
        self._encoder_noted = True

    def _read_video(self, start: float | None, seconds: float | None, fps: float | None) -> tuple:
        info = self.info.video
        bounded = seconds is not None
        whole = start is None and not bounded
        first = info.start if start is None else start
        stop = first + seconds if bounded else math.inf
        number = round(seconds * fps) if bounded and fps else None
        step = 1 / info.fps if info.fps else 0.0
        for run in self._runs("video", -math.inf if whole else first - 3 * step):
            if fps:
                chosen = _nearest(run, first, fps, number)
            else:
                chosen = _within(run, -math.inf if start is None else first, stop)
            if run.from_start or run.covers(first, chosen):
                break
        asked = f"video {first:.3f} to {stop:.3f} s" if bounded else f"video from {first:.3f} s"
        asked += f" at {fps:g} fps" if fps else ""
        if not chosen:
            raise self._error(asked, "no frame there that can be decoded")
        times = np.array([time for time, _ in chosen])
        if bounded:
            needed = first + np.arange(number) / fps if fps else run.packets_within(first, stop)
            self._check_complete(run, asked, needed, times, needed[-1] if fps else stop)
        return self._to_rgb(chosen, asked), times

    def _check_complete(self, run: "_Run", asked: str, needed: np.ndarray, found: np.ndarray, stop: float) -> None:
        """Raise DecodeError where the file ends too early or the decoder lost what was `needed` (times, seconds)."""
        if run.ended and min(stop, run.declared_end) > run.reach + SLACK:
            raise self._error(asked, f"data up to {max(run.reach, 0):.3f} s of the {run.declared_end:.3f} s declared")
        lost = needed[_distance(needed, found) > _distance(needed, np.array(run.packets)) + SLACK]
        if len(lost):
            raise self._error(asked, f"packets around {lost[0]:.3f} s that do not decode")

    def _to_rgb(self, chosen: "list[_Timed]", asked: str) -> np.ndarray:
        """(T, H, W, 3) uint8, upright; a frame chosen several times is converted once."""
        info = self.info.video
        width, height = (info.width, info.height)[:: -1 if info.rotation % 180 else 1]
        out = np.empty((len(chosen), info.height, info.width, 3), np.uint8)
        for i, (_, frame) in enumerate(chosen):
            if i and frame is chosen[i - 1][1]:
                out[i] = out[i - 1]
                continue
            try:
                rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24")
            except MediaError as error:
                raise self._error(asked, f"a picture that cannot be converted to RGB ({_reason(error)})") from None
            plane = rgb.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, : 3 * width]
            out[i] = np.rot90(rows.reshape(height, width, 3), info.rotation // 90)
        return out

    def _read_audio(self, start: float | None, seconds: float | None, rate: int) -> np.ndarray:
        info = self.info.audio
        bounded = seconds is not None
        first = info.start if start is None else start
        stop = first + seconds if bounded else math.inf
        whole = start is None and not bounded
        asked = f"audio {first:.3f} to {stop:.3f} s" if bounded else f"audio from {first:.3f} s"
        for run in self._runs("audio", -math.inf if whole else first - PREROLL):
            try:
                pieces = _mono_pieces(run, stop + FILTER_MARGIN)
            except MediaError as error:
                raise self._error(asked, f"samples that cannot be mixed to mono ({_reason(error)})") from None
            if run.from_start or run.covers(first - PREROLL / 2):
                break
        found = np.array([time for time, _ in pieces])
        if bounded:
            self._check_complete(run, asked, run.packets_within(first, stop), found, stop)
        elif not pieces:
            raise self._error(asked, "no samples there that can be decoded")
        else:
            stop = max(first, found[-1] + len(pieces[-1][1]) / info.sample_rate)
        length = round((seconds if bounded else stop - first) * rate)
        return _cut(pieces, info.sample_rate, first, rate, length)

    # Errors

    def _require(self, kind: str) -> None:
        if getattr(self.info, kind) is None:
            other = "audio" if kind == "video" else "video"
            raise self._error(kind, f"no {kind} stream that can be decoded, only {other}")

    def _error(self, asked: str, found: object) -> DecodeError:
        return DecodeError(f"{self.path}: asked for: {asked}; found: {found}".replace("\n", " "))


_Timed = tuple[float, "av.video.frame.VideoFrame"]


class _Run:
    """One pass of a decoder over a stream: yields (time, frame) in the order of display, and keeps count."""

    def __init__(
        self,
        container: "av.container.InputContainer",
        stream: "av.stream.Stream",
        info: VideoInfo | AudioInfo,
        from_start: bool,
        skip_before: float | None = None,
    ) -> None:
        self.from_start = from_start
        self.declared_end = info.start + (info.duration or math.inf)
        self.first = math.inf  # time of the first frame given out
        self.sample_rate = getattr(info, "sample_rate", 0)  # Hz
        self.packets: list[float] = []  # times of the packets with data
        self.reach = -math.inf  # where the last of them ends
        self.ended = False  # whether the data was read to its end
        self._container, self._stream = container, stream
        self._start, self._step = info.start, 1 / info.fps if getattr(info, "fps", 0) else 0.0
        self._from_dts = container.format.name == "avi" and stream.type == "video"
        skips = skip_before is not None and info.codec in SKIPPING_CODECS and not self._from_dts
        self._skip_before = skip_before - SKIP_MARGIN if skips else -math.inf

    def __iter__(self) -> Iterator[_Timed]:
        context = self._stream.codec_context
        skipping = self._skip_before > -math.inf
        before = None
        try:
            if skipping and self._stream.type == "video":
                context.skip_frame = "NONREF"
            for packet in self._demux():
                if skipping and packet is not None and self._time(packet, -math.inf) >= self._skip_before:
                    context.skip_frame, skipping = "DEFAULT", False
                for frame in self._decode(packet):
                    time = self._time(frame, self._start if before is None else before + self._step)
                    self.first = min(self.first, time)
                    yield time, frame
                    before = time
        finally:
            context.skip_frame = "DEFAULT"

    def covers(self, first: float, chosen: list[_Timed] = ()) -> bool:
        """Whether decoding began at or before `first`, and nothing skipped could have been a better choice."""
        return self.first <= first + SAME_TIME and not (chosen and chosen[0][0] < self._skip_before)

    def packets_within(self, start: float, stop: float) -> np.ndarray:
        """Times of the packets with data from `start` to `stop`, seconds."""
        times = np.array(self.packets)
        return times[(times >= start) & (times < stop)]

    def _demux(self) -> "Iterator[av.Packet | None]":
        """The packets with data, then None to drain the decoder: also where the data breaks off."""
        packets = self._container.demux(self._stream)
        try:
            for packet in packets:
                if packet.size == 0:  # PyAV's own drain packet; AVI's and Ogg's "nothing new to show"
                    continue
                time = self._time(packet, self._start)
                self.packets.append(time)
                self.reach = max(self.reach, time + float((packet.duration or 0) * self._stream.time_base))
                yield packet
        except MediaError:
            pass  # what is missing is found by comparing `reach` with what the file declares
        finally:
            packets.close()
        self.ended = True
        yield None

    def _decode(self, packet: "av.Packet | None") -> list:
        try:
            return self._stream.codec_context.decode(packet)
        except MediaError:
            return []  # a damaged packet; the caller sees what is missing by its time

    def _time(self, item: "av.Packet | av.frame.Frame", otherwise: float) -> float:
        stamp = item.dts if self._from_dts or item.pts is None else item.pts
        return otherwise if stamp is None else float(stamp * self._stream.time_base)


def _nearest(run: _Run, start: float, fps: float, number: int | None) -> list[_Timed]:
    """For each time start + i / fps, i < `number`, the frame nearest to it; `number` None: until the frames end."""
    chosen, before = [], None
    for time, frame in run:
        while len(chosen) != number and (target := start + len(chosen) / fps) <= time:
            earlier = before is not None and target - before[0] <= time - target + SAME_TIME
            chosen.append(before if earlier else (time, frame))
        if len(chosen) == number:
            return chosen
        before = time, frame
    while before is not None and (
        start + len(chosen) / fps < run.reach - SAME_TIME if number is None else len(chosen) < number
    ):
        chosen.append(before)
    return chosen


def _within(run: _Run, start: float, stop: float) -> list[_Timed]:
    """All frames with start <= time < stop."""
    chosen = []
    for time, frame in run:
        if time >= stop - SAME_TIME:
            break
        if time >= start - SAME_TIME:
            chosen.append((time, frame))
    return chosen


def _distance(times: np.ndarray, others: np.ndarray) -> np.ndarray:
    """From each of `times` to the nearest of `others`, seconds."""
    if len(others) == 0:
        return np.full(len(times), np.inf)
    others = np.sort(others)
    after = np.searchsorted(others, times)
    left, right = others[np.maximum(after - 1, 0)], others[np.minimum(after, len(others) - 1)]
    return np.minimum(np.abs(times - left), np.abs(times - right))


def _mono_pieces(run: _Run, stop: float) -> list[tuple[float, np.ndarray]]:
    """(time, mono float32 samples) of a run's frames up to `stop` seconds, at the stream's own rate.

    swresample's matrix is normalised, so that nothing clips, only where the output is not floating-point: mix to int32.
    """
    pieces, resamplers = [], {}
    for time, frame in run:
        if time >= stop:
            break
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if kind not in resamplers:  # streams may change from mono to stereo on the way
            resamplers[kind] = av.AudioResampler("s32p", "mono", run.sample_rate)
        frame.pts = None
        for mono in resamplers[kind].resample(frame):
            pieces.append((time, mono.to_ndarray()[0].astype(np.float32) / 2**31))
            time += mono.samples / run.sample_rate
    return pieces


def _join(pieces: list[tuple[float, np.ndarray]], rate: int) -> list[tuple[float, np.ndarray]]:
    """Pieces that follow each other as one piece each, where its time stamps agree best.

    Many containers round time stamps, Matroska to milliseconds: a piece that starts within `JITTER` of where the one
    before ended continues it. Each stamp implies a start of the whole, rounded up or down: it starts midway between the
    extremes of these, but for the odd outlier.
    """
    groups, length = [], 0
    for time, samples in pieces:
        if not groups or abs(time - length / rate - groups[-1][0][0]) > JITTER:
            groups.append(([], []))
            length = 0
        starts, parts = groups[-1]
        starts.append(time - length / rate)
        parts.append(samples)
        length += len(samples)
    return [(np.percentile(starts, (5, 95)).mean(), np.concatenate(parts)) for starts, parts in groups]


def _cut(pieces: list[tuple[float, np.ndarray]], native: int, start: float, rate: int, length: int) -> np.ndarray:
    """`length` samples at `rate` Hz from `start` seconds on; zeros where there is no piece.

    Output samples lie at whole multiples of 1 / rate on the file's clock, wherever the clip starts. To that end the
    track handed to the resampler starts where a sample of the file and one of the output coincide.
    """
    block = native // math.gcd(native, rate)
    begin = math.floor((start - FILTER_MARGIN) * native / block) * block
    end = math.ceil((start + length / rate + FILTER_MARGIN) * native) + 1
    track = np.zeros(end - begin, np.float32)
    filled = 0
    for time, samples in _join(pieces, native):
        at = round(time * native) - begin
        trim = max(filled - at, 0)
        part = samples[trim : max(len(track) - at, 0)]
        if len(part):
            track[at + trim : at + trim + len(part)] = part
            filled = at + trim + len(part)
    if rate != native:
        track = _resample(track, native, rate)
    skip = round(start * rate) - begin * rate // native
    return np.clip(track[skip : skip + length], -1, 1)


def _resample(track: np.ndarray, native: int, rate: int) -> np.ndarray:
    """A mono track at another rate; sample 0 keeps its time."""
    frame = av.AudioFrame.from_ndarray(track[None], format="fltp", layout="mono")
    frame.sample_rate = native
    resampler = av.AudioResampler("fltp", "mono", rate)
    return np.concatenate([part.to_ndarray()[0] for part in resampler.resample(frame) + resampler.resample(None)])


def _check_arguments(starts: tuple, above_0: tuple) -> None:
    for value in starts:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a start must be finite, found {value}")
    for value in above_0:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"a duration or rate must be above 0, found {value}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
