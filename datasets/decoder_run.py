"""One pass of a decoder over a stream of an open file, and the selection of a clip's frames."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import av
import numpy as np

if TYPE_CHECKING:
    from datasets.decoding import AudioInfo, VideoInfo

SAME_TIME = 1e-9  # seconds; smaller differences are floating-point noise
MOST_HELD = 100_000_000  # bytes; limit for the packets held to find out which frames exist
SKIPPING_CODECS = ("h264", "hevc", "mpeg4")  # decoders whose NONREF skipping may be changed while they run

MediaError = (av.error.FFmpegError, ValueError, EOFError)
Timed = tuple[float, "av.video.frame.VideoFrame"]


class Run:
    """One pass of a decoder over a stream: yields (time, frame) in display order and records what it saw."""

    def __init__(
        self,
        container: "av.container.InputContainer",
        stream: "av.stream.Stream",
        info: "VideoInfo | AudioInfo",
        from_start: bool,
    ) -> None:
        self.from_start = from_start
        self.first = math.inf  # time of the first frame in output
        self.first_is_whole = True  # whether that video frame depends only on decoded frames
        self.sample_rate = getattr(info, "sample_rate", 0)  # Hz
        self.packets: list[float] = []  # times of the packets that hold data
        self.reach = -math.inf  # latest end of these packets
        self.ended = False  # whether all data was read
        self._container, self._stream = container, stream
        self._start, self._step = info.start, 1 / info.fps if getattr(info, "fps", 0) else 0.0
        self._time_base = stream.time_base
        self._clock = stream.time_base.numerator, stream.time_base.denominator
        self._from_dts = container.format.name == "avi" and stream.type == "video"
        self._can_skip = info.codec in SKIPPING_CODECS and not self._from_dts

    def __iter__(self) -> Iterator[Timed]:
        before = None
        for packet in self._demux():
            for frame in self._decode(packet):
                time = self._time(frame, self._start if before is None else before + self._step)
                self._note(frame, time)
                frame.time_base = self._time_base  # PyAV omits it if the decoder delayed the frame
                yield time, frame
                before = time

    def pick_sparingly(self, pick: "Callable[[Iterable[Timed]], list[Timed]]", first: float, last: float) -> list:
        """Return the frames that `pick` selects, without decoding those neither selected nor referenced.

        The packets' time stamps show in advance which frames exist. Returns an empty list if they are missing or
        duplicated, if the decoder outputs other times, or if the run begins after `first`.

        Args:
            pick: selects from (time, frame) pairs in display order, by their times alone.
            first, last: range of the times that `pick` looks for, in seconds.
        """
        packets = self._packets_up_to(last) if self._can_skip else []
        times = sorted(time for time, _ in packets)
        if not packets or math.isnan(sum(times)) or len(set(times)) < len(times):
            return []
        wanted = [time for time, _ in pick((time, None) for time in times)]
        found = dict.fromkeys(wanted)
        end = 1 + max((i for i, (time, _) in enumerate(packets) if time in found), default=-1)
        context = self._stream.codec_context
        try:
            for time, packet in [*packets[:end], (math.nan, None)]:  # None flushes the decoder
                context.skip_frame = "DEFAULT" if time in found or packet is None else "NONREF"
                for frame in self._decode(packet):
                    time = self._time(frame, math.nan)
                    self._note(frame, time)
                    if time in found:
                        found[time] = frame
        finally:
            context.skip_frame = "DEFAULT"
        if None in found.values() or not (self.from_start or self.covers(first)):
            return []
        return [(time, found[time]) for time in wanted]

    def _note(self, frame: "av.VideoFrame | av.AudioFrame", time: float) -> None:
        """Record a frame. With periodic intra refresh, frames after a seek may depend on frames before it."""
        if self.first == math.inf and isinstance(frame, av.VideoFrame):
            cut = self.packets[0] < self._start  # by an edit list: the key frame is decoded but not shown
            self.first_is_whole = frame.key_frame or cut
        self.first = min(self.first, time)

    def covers(self, first: float) -> bool:
        """Whether decoding began at or before `first`, with a frame that does not depend on earlier ones."""
        return self.first_is_whole and self.first <= first + SAME_TIME

    def end(self) -> float:
        """Return where the data ends (seconds), without decoding. Packets without times count as one frame each."""
        number = sum(packet is not None for packet in self._demux())
        if number and self._step and self.packets[0] == self.packets[-1]:
            return self._start + number * self._step
        return max(self.reach, self._start)

    def packets_within(self, start: float, stop: float) -> np.ndarray:
        """Return the times of the packets that hold data in [start, stop), in seconds."""
        times = np.array(self.packets)
        return times[(times >= start) & (times < stop)]

    def _demux(self) -> "Iterator[av.Packet | None]":
        """Yield the packets that hold data, then None to flush the decoder, even if the data is truncated."""
        packets = self._container.demux(self._stream)
        try:
            for packet in packets:
                if packet.size == 0:  # PyAV's flush packet; in AVI and Ogg, nothing new to show
                    continue
                time = self._time(packet, self._start)
                self.packets.append(time)
                self.reach = max(self.reach, time + self._seconds(packet.duration or 0))
                yield packet
        except MediaError:
            pass  # missing data is found by comparing `reach` with the declared end
        finally:
            packets.close()
        self.ended = True
        yield None

    def _packets_up_to(self, last: float) -> "list[tuple[float, av.Packet]]":
        """Return (time, packet) in decoding order, until no later packet can be shown by `last`.

        A packet without a time stamp has time NaN. Returns an empty list if the packets exceed `MOST_HELD` bytes.
        """
        packets, after, held = [], math.inf, 0
        for packet in self._demux():
            if packet is None:
                break
            time = self._time(packet, math.nan) if packet.pts is not None else math.nan
            packets.append((time, packet))
            held += packet.size
            if held > MOST_HELD:
                return []
            if time >= last:
                after = min(after, time)
            if packet.dts is not None and self._seconds(packet.dts) >= after:
                break
        return packets

    def _decode(self, packet: "av.Packet | None") -> list:
        try:
            return self._stream.codec_context.decode(packet)
        except MediaError:
            return []  # a damaged packet; the caller detects missing frames by their times

    def _time(self, item: "av.Packet | av.frame.Frame", otherwise: float) -> float:
        stamp = item.dts if self._from_dts or item.pts is None else item.pts
        return otherwise if stamp is None else self._seconds(stamp)

    def _seconds(self, ticks: int) -> float:
        return ticks * self._clock[0] / self._clock[1]


def nearest(run: "Run | Iterable[Timed]", start: float, fps: float, number: int | None) -> list[Timed]:
    """Select the frame nearest to each time start + i / fps for i < `number` (None: until the frames end)."""
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


def within(run: "Run | Iterable[Timed]", start: float, stop: float) -> list[Timed]:
    """Select all frames with start <= time < stop."""
    chosen = []
    for time, frame in run:
        if time >= stop - SAME_TIME:
            break
        if time >= start - SAME_TIME:
            chosen.append((time, frame))
    return chosen


def distance(times: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the distance from each of `times` to the nearest of `others`, in seconds."""
    if len(others) == 0:
        return np.full(len(times), np.inf)
    others = np.sort(others)
    after = np.searchsorted(others, times)
    left, right = others[np.maximum(after - 1, 0)], others[np.minimum(after, len(others) - 1)]
    return np.minimum(np.abs(times - left), np.abs(times - right))
