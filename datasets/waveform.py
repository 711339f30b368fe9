"""From decoded audio frames to the mono samples of a clip, aligned in time."""

import math

import av
import numpy as np

from datasets.decoder_run import Run

FILTER_MARGIN = 0.05  # seconds of audio on both sides for the resampling filter
JITTER = 0.005  # seconds; audio time stamps that deviate more mark a gap or an overlap
SAMPLES = {"s16": (np.int16, 2**15), "s32": (np.int32, 2**31), "flt": (np.float32, 1)}  # formats: dtype, full scale


def mono_pieces(run: Run, stop: float) -> list[tuple[float, np.ndarray]]:
    """Return (time, mono float32 samples) of a run's frames up to `stop` seconds, at the stream's own rate.

    One or two channels are averaged here; others are mixed by swresample, which takes longer than decoding. Its matrix
    is normalised to avoid clipping only if the output is not floating-point, so they are mixed to int32.
    """
    pieces, resamplers = [], {}
    for time, frame in run:
        if time >= stop:
            break
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if kind[0].removesuffix("p") in SAMPLES and kind[1] in ("mono", "stereo") and kind[2] == run.sample_rate:
            pieces.append((time, _mean_of_channels(frame)))
            continue
        if kind not in resamplers:  # streams may change from mono to stereo
            resamplers[kind] = av.AudioResampler("s32p", "mono", run.sample_rate)
        frame.pts = None
        for mono in resamplers[kind].resample(frame):
            pieces.append((time, mono.to_ndarray()[0].astype(np.float32) / 2**31))
            time += mono.samples / run.sample_rate
    return pieces


def _mean_of_channels(frame: av.AudioFrame) -> np.ndarray:
    """Average a frame in a format of `SAMPLES` to float32. Floating-point input may hold any value, even NaN."""
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
    """Join consecutive pieces, and place each result where its time stamps agree best.

    Many containers round time stamps, Matroska to milliseconds. So a piece that starts within `JITTER` of the previous
    one's end continues it. Each stamp implies a start of the joined piece, rounded up or down; the result is midway
    between their extremes, without outliers.
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
    """Return where the last of the pieces at `native` Hz ends, in seconds."""
    time, samples = _join(pieces, native)[-1]
    return time + len(samples) / native


def cut(pieces: list[tuple[float, np.ndarray]], native: int, start: float, rate: int, length: int) -> np.ndarray:
    """Cut `length` samples at `rate` Hz, starting at `start` seconds, in [-1, 1]; zeros for gaps and NaN.

    Output samples lie at whole multiples of 1 / rate on the file's clock, wherever the clip starts. Therefore, the
    resampler's input starts where a sample of the file and one of the output coincide.
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
    track[np.isnan(track)] = 0  # before the filter can spread it
    if rate != native:
        track = _resample(track, native, rate)
    skip = round(start * rate) - begin * rate // native
    return np.clip(track[skip : skip + length], -1, 1)


def _resample(track: np.ndarray, native: int, rate: int) -> np.ndarray:
    """Resample a mono track, with a few extra samples at the end; sample 0 keeps its time."""
    track = np.pad(track, (0, 64 * -(-native // rate)))  # swresample returns nothing for less than its filter's length
    frame = av.AudioFrame.from_ndarray(track[None], format="fltp", layout="mono")
    frame.sample_rate = native
    resampler = av.AudioResampler("fltp", "mono", rate)
    return np.concatenate([part.to_ndarray()[0] for part in resampler.resample(frame) + resampler.resample(None)])
