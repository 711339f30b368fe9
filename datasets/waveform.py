"""Decoded audio frames -> the mono samples of a clip, each at its time."""

import math

import av
import numpy as np

from datasets.decoder_run import Run

FILTER_MARGIN = 0.05  # seconds of audio on both sides that the resampling filter may look at
JITTER = 0.005  # seconds by which audio time stamps may deviate before that is a gap or an overlap
SAMPLES = {"s16": (np.int16, 2**15), "s32": (np.int32, 2**31), "flt": (np.float32, 1)}  # what is mixed here, full scale


def mono_pieces(run: Run, stop: float) -> list[tuple[float, np.ndarray]]:
    """(time, mono float32 samples) of a run's frames up to `stop` seconds, at the stream's own rate.

    One and two channels are averaged here, others mixed by swresample, which takes longer than to decode them. Its
    matrix is normalised, so that nothing clips, only where the output is not floating-point: mix to int32.
    """
    pieces, resamplers = [], {}
    for time, frame in run:
        if time >= stop:
            break
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if kind[0].removesuffix("p") in SAMPLES and kind[1] in ("mono", "stereo") and kind[2] == run.sample_rate:
            pieces.append((time, _mean_of_channels(frame)))
            continue
        if kind not in resamplers:  # streams may change from mono to stereo on the way
            resamplers[kind] = av.AudioResampler("s32p", "mono", run.sample_rate)
        frame.pts = None
        for mono in resamplers[kind].resample(frame):
            pieces.append((time, mono.to_ndarray()[0].astype(np.float32) / 2**31))
            time += mono.samples / run.sample_rate
    return pieces


def _mean_of_channels(frame: av.AudioFrame) -> np.ndarray:
    """Float32 samples of a frame in one of the formats of `SAMPLES`; floating-point ones may be anything, NaN too."""
    kind, full_scale = SAMPLES[frame.format.name.removesuffix("p")]
    count, width = frame.samples, frame.layout.nb_channels
    if frame.format.is_planar:
        channels = [np.frombuffer(plane, kind, count) for plane in frame.planes]
    else:
        channels = np.frombuffer(frame.planes[0], kind, count * width).reshape(count, width).T
    mean = channels[0].astype(np.float32)
    if width == 2:
        mean = (mean + channels[1]) / 2
    return (mean / full_scale).astype(np.float32, copy=False)


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


def end_of(pieces: list[tuple[float, np.ndarray]], native: int) -> float:
    """Where the last of some pieces at `native` Hz ends, seconds."""
    time, samples = _join(pieces, native)[-1]
    return time + len(samples) / native


def cut(pieces: list[tuple[float, np.ndarray]], native: int, start: float, rate: int, length: int) -> np.ndarray:
    """`length` samples at `rate` Hz from `start` seconds on, from -1 to 1; zeros where there is no piece or no number.

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
    np.clip(track, -1, 1, out=track)
    track[np.isnan(track)] = 0  # else the filter would spread it
    if rate != native:
        track = _resample(track, native, rate)
    skip = round(start * rate) - begin * rate // native
    return np.clip(track[skip : skip + length], -1, 1)


def _resample(track: np.ndarray, native: int, rate: int) -> np.ndarray:
    """A mono track at another rate, and a little more; sample 0 keeps its time."""
    track = np.pad(track, (0, 64 * -(-native // rate)))  # of less than its filter's length swresample answers nothing
    frame = av.AudioFrame.from_ndarray(track[None], format="fltp", layout="mono")
    frame.sample_rate = native
    resampler = av.AudioResampler("fltp", "mono", rate)
    return np.concatenate([part.to_ndarray()[0] for part in resampler.resample(frame) + resampler.resample(None)])
