"""Sampling of clips, crops and masks: pure functions of spans, sizes and a random generator.

A span is `(start, end)` in seconds on the file's clock. If a span is shorter than the requested clip, the clip starts
with the span, and the decoder repeats the last frame or pads the waveform with silence.
"""

import numpy as np

Span = tuple[float, float]


def overlap(first: Span, second: Span) -> Span:
    """Return the intersection of two spans; if they are disjoint, the empty span at the later start."""
    start = max(first[0], second[0])
    return start, max(start, min(first[1], second[1]))


def anywhere(span: Span, seconds: float, rng: np.random.Generator) -> float:
    """Draw a start, uniform over those for which a clip of `seconds` lies inside the span."""
    room = span[1] - span[0] - seconds
    return span[0] + rng.uniform(0.0, 1.0) * max(0.0, room)


def evenly(span: Span, seconds: float, count: int) -> list[float]:
    """Return `count` starts of clips of `seconds`, evenly over the whole span; a single one is in the middle."""
    room = max(0.0, span[1] - span[0] - seconds)
    if count == 1:
        return [span[0] + room / 2]
    return [span[0] + room * i / (count - 1) for i in range(count)]


def audio_visual(
    video: Span, audio: Span, video_seconds: float, audio_seconds: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Draw the starts of a video clip and its audio clip.

    The audio clip lies anywhere in the overlap of the streams. The video clip lies anywhere within the audio clip
    extended by 0.5 s on both sides, and within the video.
    """
    audio_start = anywhere(overlap(video, audio), audio_seconds, rng)
    window = overlap((audio_start - 0.5, audio_start + audio_seconds + 0.5), video)
    start, latest = anywhere(window, video_seconds, rng), max(video[0], video[1] - video_seconds)
    return min(max(start, video[0]), latest), audio_start


def audio_visual_evenly(
    video: Span, audio: Span, video_seconds: float, audio_seconds: float, count: int
) -> list[tuple[float, float]]:
    """Return `count` pairs of starts, evenly over the streams' overlap, each video clip centred in its audio clip."""
    shared = overlap(video, audio)
    pairs = []
    for audio_start in evenly(shared, audio_seconds, count):
        middle = audio_start + (min(audio_seconds, shared[1] - shared[0]) - video_seconds) / 2
        latest = max(video[0], video[1] - video_seconds)
        pairs.append((min(max(middle, video[0]), latest), audio_start))
    return pairs


def two_apart(
    video: Span, seconds: float, rng: np.random.Generator, least: float = 2.0, most: float = 8.0
) -> tuple[float, float]:
    """Draw the starts of two clips of a video, `least` to `most` seconds apart, in random order.

    If the video is too short for that, the clips are as far apart as possible: at its beginning and at its end.
    """
    room = max(0.0, video[1] - video[0] - seconds)
    if room <= least:
        starts = (video[0], video[0] + room)
    else:
        distance = rng.uniform(least, min(most, room))
        first = video[0] + rng.uniform(0.0, 1.0) * (room - distance)
        starts = (first, first + distance)
    return starts if rng.random() < 0.5 else starts[::-1]


def random_resized_crop(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box (top, left, height, width) with a random share of the frame's area and log-uniform aspect ratio.

    After ten draws that do not fit, returns the largest centred box within the aspect limits (the Inception recipe).
    """
    for _ in range(10):
        size = height * width * rng.uniform(*area)
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        w, h = int(round(np.sqrt(size * ratio))), int(round(np.sqrt(size / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    h, w = min(height, int(round(width / ratio))), min(width, int(round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def block_mask(length: int, ratio: float, size: int, variable: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw which of `length` bins to mask: bool (length,). The masked share is uniform from 0 to `ratio`.

    Blocks of `size` bins (1 to `size` if `variable`) are placed at random until the share is masked; the last block is
    shortened so as not to exceed it.
    """
    mask = np.zeros(length, dtype=bool)
    target = int(rng.uniform(0.0, ratio) * length)
    while (missing := target - int(mask.sum())) > 0:
        block = min(int(rng.integers(1, size + 1)) if variable else size, missing)
        start = int(rng.integers(0, length - block + 1))
        mask[start : start + block] = True
    return mask
