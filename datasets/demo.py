"""The built-in demo data set: 880 short synthetic videos in which sound and motion correspond.

    python3 -m datasets.demo --root data/demo

There are ten classes of motion, each with its own kind of sound. Within a class, clips differ in the rate and extent of
the motion, both visible and audible: faster motion has a faster rhythm and a higher pitch, wider motion bends the pitch
further or rings longer.

A single frame does not reveal the class. Each frame shows a two-coloured body in front of a background. The class only
determines which of the body's four coordinates (x, y, size, angle) move; those at rest are drawn from the range of the
moving ones. Shape, colours, background, size, timbre, loudness and noise are independent of the class.

There are few shapes, colours and backgrounds on purpose, so that many videos look alike. When each video had its own
appearance, instance discrimination memorised the appearance and did not learn the motion.

The layout is that of UCF-101: `videos/<Class>/v_<Class>_g<NN>_c<NN>.mp4` and `ucfTrainTestlist/`, first split.
"""

import argparse
import itertools
import json
import multiprocessing
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from utils.cli import at_least, run_script
from utils.errors import UserError
from utils.processes import cores, ctrl_c_for_the_parent, end_with_parent
from utils.progress import progress_bar

VERSION = 2  # incremented when the same seed no longer gives the same pixels and sound
SIZE, FPS, SECONDS, SAMPLE_RATE = 128, 16, 3.5, 16000
RATES = (1.0, 3.6)  # Hz: at least a full cycle per second, and less than half of 8 frames per second
GROUP = 4  # clips c01 to c04 in a group, as UCF-101 numbers its files
X, Y, ZOOM, TURN = range(4)  # rows of a track


# ----------------------------------------------------------------------------------------------------- clip parameters


@dataclass(frozen=True)
class Body:
    """A shape with a light and a dark half, so that it stands out and its rotation is visible."""

    shape: str
    radius: float  # half its width, as a fraction of the frame
    colours: np.ndarray  # (2, 3) RGB in [0, 1]


@dataclass(frozen=True)
class ClipParams:
    """Parameters of `render_frames` and `render_sound`. Lengths are fractions of the frame, angles are in turns."""

    name: str  # the class
    key: tuple[int, ...]  # seed for textures, jumps and noise
    rate: float  # Hz, cycles of the motion
    extent: float  # 0 to 1, from narrow to wide motion
    phase: float  # cycles, at time 0
    direction: int  # 1 or -1
    centre: np.ndarray  # (2,) x and y of the motion's centre
    rest: np.ndarray  # (4,) x, y, zoom in [-1, 1] and turn: the track of a body at rest
    body: Body
    background: str
    pitch: float  # Hz
    timbre: np.ndarray  # (8,) amplitudes of the harmonics
    loudness: float  # peak of the clean sound
    noise: float  # standard deviation of the background noise, as a fraction of the loudness

    def rng(self, purpose: int) -> np.random.Generator:
        """Return a random generator that depends only on the clip and `purpose`."""
        return np.random.default_rng([*self.key, purpose])

    def cycles(self, times: np.ndarray) -> np.ndarray:
        """Return the phase of the motion in cycles at `times` (seconds)."""
        return self.rate * times + self.phase


def clip_params(name: str, index: int, seed: int = 0) -> ClipParams:
    """Draw the parameters of clip `index` (from 0) of class `name`. All classes have the same distributions."""
    key = (seed, list(CLASSES).index(name), index)
    rng = np.random.default_rng(key)
    rate = float(np.exp(rng.uniform(*np.log(RATES))))
    colours = np.array(COLOURS[rng.integers(len(COLOURS))])[rng.permutation(2)]
    return ClipParams(
        name=name,
        key=key,
        rate=rate,
        extent=rng.random(),
        phase=rng.random(),
        direction=int(rng.choice([-1, 1])),
        centre=rng.uniform(0.47, 0.53, 2),
        rest=np.append(rng.uniform(-1, 1, 3), rng.random()),
        body=Body(str(rng.choice(list(SHAPES))), rng.uniform(0.18, 0.22), colours),
        background=str(rng.choice(list(BACKGROUNDS))),
        pitch=220 * rate**1.3 * 2 ** rng.normal(0, 0.1),
        timbre=rng.dirichlet(np.ones(8)) + 0.5 ** np.arange(1, 9),
        loudness=rng.uniform(0.3, 0.95),
        noise=10 ** rng.uniform(-2.5, -1.5),
    )


# ----------------------------------------------------------------------------- motion: (params, times) -> (4, T) track
# x (to the right), y (upwards) and zoom in [-1, 1], turn in turns


def _at_rest(p: ClipParams, times: np.ndarray) -> np.ndarray:
    return np.repeat(p.rest[:, None], len(times), axis=1)


def _move_bounce(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track, u = _at_rest(p, times), p.cycles(times) % 1
    track[Y] = 8 * u * (1 - u) - 1
    return track


def _move_slide(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[X] = np.sin(2 * np.pi * p.cycles(times))
    return track


def _move_rise(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[Y] = 2 * (p.cycles(times) % 1) - 1
    return track


def _move_fall(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[Y] = 1 - 2 * (p.cycles(times) % 1)
    return track


def _move_orbit(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track, angle = _at_rest(p, times), 2 * np.pi * p.cycles(times)
    track[X], track[Y] = p.direction * np.cos(angle), np.sin(angle)
    return track


def _move_spin(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[TURN] += p.direction * p.cycles(times)
    return track


def _move_rock(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[TURN] += (0.15 + 0.1 * p.extent) * np.sin(2 * np.pi * p.cycles(times))
    return track


def _move_pulse(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[ZOOM] = np.sin(2 * np.pi * p.cycles(times))
    return track


def _move_shake(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    jitter = p.rng(0).uniform(-0.5, 0.5, (2, int(SECONDS * FPS) + 1))[:, (times * FPS).astype(int)]
    track[:2] += jitter * (p.cycles(times) % 1 < 0.5)
    return track


def _jump_spots(p: ClipParams) -> np.ndarray:
    return p.rng(0).uniform(-1, 1, (2, int(SECONDS * RATES[1]) + 2))


def _move_jump(p: ClipParams, times: np.ndarray) -> np.ndarray:
    track = _at_rest(p, times)
    track[:2] = _jump_spots(p)[:, p.cycles(times).astype(int)]
    return track


# --------------------------------------------------------------------------- sound: (params, times) -> (L,) waveform


def _tone(p: ClipParams, frequency: np.ndarray) -> np.ndarray:
    """Synthesise a tone with the clip's harmonics at the fundamental `frequency` (L,), in Hz."""
    angle = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    order = np.arange(1, len(p.timbre) + 1)[:, None]
    audible = order * frequency < 0.45 * SAMPLE_RATE
    return (p.timbre[:, None] * np.sin(order * angle) * audible).sum(axis=0)


def _hiss(p: ClipParams, frequency: float, length: int) -> np.ndarray:
    """Synthesise noise in a band of about an octave around `frequency` (Hz)."""
    spectrum = np.fft.rfft(p.rng(1).standard_normal(length))
    octaves = np.log2(np.fft.rfftfreq(length, 1 / SAMPLE_RATE).clip(1) / frequency)
    return np.fft.irfft(spectrum * np.exp(-(octaves**2) / 0.3), length)


def _hits(p: ClipParams, times: np.ndarray, teeth: int = 1) -> list[tuple[float, np.ndarray]]:
    """Return the hits of a clip, `teeth` per cycle, as (cycles at the hit, `times` relative to the hit in seconds)."""
    last = int(np.ceil(p.cycles(times[-1]) * teeth))
    cycles = np.arange(int(p.phase * teeth), last) / teeth  # the first is before time 0, but still rings
    return [(c, times - (c - p.phase) / p.rate) for c in cycles]


def _struck(since: np.ndarray, ring: float, frequency: float, weights: np.ndarray) -> np.ndarray:
    """Synthesise a struck sound `since` seconds (L,) after the hit: harmonics that decay over `ring` seconds."""
    out = np.zeros(len(since))
    heard = (since >= 0) & (since < 7 * ring)
    s = since[heard]
    order = np.arange(1, len(weights) + 1)[:, None]
    audible = order * frequency < 0.45 * SAMPLE_RATE
    partials = weights[:, None] * np.sin(2 * np.pi * order * frequency * s) * np.exp(-s * order**0.5 / ring) * audible
    out[heard] = partials.sum(axis=0)
    return out


def _sound_bounce(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A low thud at each landing; wider bounces ring longer."""
    ring = 0.03 + 0.06 * p.extent
    return sum(_struck(since, ring, p.pitch / 2, p.timbre) for _, since in _hits(p, times))


def _sound_slide(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A tone whose pitch and strength follow the speed."""
    speed = np.abs(np.cos(2 * np.pi * p.cycles(times)))
    return (0.1 + speed) * _tone(p, p.pitch * 2 ** ((0.7 + 0.8 * p.extent) * speed))


def _sound_height(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A tone whose pitch follows the height."""
    return _tone(p, p.pitch * 2 ** ((0.5 + 0.5 * p.extent) * CLASSES[p.name][0](p, times)[Y]))


def _sound_orbit(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A warble: vibrato of one period per turn, with a fifth above."""
    bend = 2 ** ((0.15 + 0.25 * p.extent) * np.sin(2 * np.pi * p.cycles(times)))
    return _tone(p, p.pitch * bend) + _tone(p, 1.5 * p.pitch * bend)


def _sound_spin(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A ratchet with four teeth per turn, the first the loudest."""
    hits = _hits(p, times, teeth=4)
    return sum((1 if c == int(c) else 0.5) * _struck(since, 0.012, 5 * p.pitch, np.ones(1)) for c, since in hits)


def _sound_rock(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A whoosh in each half of the cycle, which follows the speed of the rotation."""
    return np.cos(2 * np.pi * p.cycles(times)) ** 2 * _hiss(p, 3 * p.pitch, len(times))


def _sound_pulse(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A steady tone with tremolo: loud while the body is large."""
    swell = 0.5 + 0.5 * _move_pulse(p, times)[ZOOM]
    return (1 - (0.8 + 0.2 * p.extent) * (1 - swell)) * _tone(p, np.full(len(times), p.pitch))


def _sound_shake(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A rattle while the body trembles."""
    grains = p.rng(2).random(int(SECONDS * 40) + 1)[(times * 40).astype(int)] ** 3 * np.exp(-3 * (times * 40 % 1))
    return grains * (p.cycles(times) % 1 < 0.5) * _hiss(p, 5 * p.pitch, len(times))


def _sound_jump(p: ClipParams, times: np.ndarray) -> np.ndarray:
    """A plucked note at each jump, higher for higher positions."""
    height = _jump_spots(p)[Y]
    ring = 0.08 + 0.1 * p.extent
    return sum(_struck(since, ring, 2 * p.pitch * 2 ** height[int(c)], p.timbre) for c, since in _hits(p, times))


Motion = Callable[[ClipParams, np.ndarray], np.ndarray]
CLASSES: dict[str, tuple[Motion, Motion]] = {
    "Bounce": (_move_bounce, _sound_bounce),
    "Fall": (_move_fall, _sound_height),
    "Jump": (_move_jump, _sound_jump),
    "Orbit": (_move_orbit, _sound_orbit),
    "Pulse": (_move_pulse, _sound_pulse),
    "Rise": (_move_rise, _sound_height),
    "Rock": (_move_rock, _sound_rock),
    "Shake": (_move_shake, _sound_shake),
    "Slide": (_move_slide, _sound_slide),
    "Spin": (_move_spin, _sound_spin),
}


def render_sound(params: ClipParams) -> np.ndarray:
    """Render the sound of a clip: float32 (L,) in [-1, 1], `SAMPLE_RATE` Hz, `SECONDS` s."""
    times = np.arange(int(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    clean = CLASSES[params.name][1](params, times)
    rng = params.rng(3)
    hum = np.sin(2 * np.pi * rng.uniform(45, 65) * times) * rng.random()
    sound = clean / np.abs(clean).max() + params.noise * (rng.standard_normal(len(times)) + hum)
    return (params.loudness * sound).clip(-1, 1).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- frames

# Signed distances to the outlines of shapes within 1.1 of the origin, negative inside.
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Field] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.27,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.75,
    "bar": lambda x, y: np.maximum(abs(x) - 0.95, abs(y) - 0.5),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.36, np.maximum(abs(x), abs(y)) - 0.92),
    "triangle": lambda x, y: np.maximum(-x, 0.5 * x + 0.866 * abs(y)) - 0.55,
    "star": lambda x, y: np.hypot(x, y) - 0.7 - 0.28 * np.cos(5 * np.arctan2(y, x)),
}

# Patterns in [0, 1] over coordinates in [-1, 1], with a random period.
BACKGROUNDS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "gradient": lambda x, y, rng: 0.5 + 0.5 * x / 1.42,
    "stripes": lambda x, y, rng: 0.5 + 0.5 * np.sin(x * rng.uniform(6, 20)),
    "checker": lambda x, y, rng: (np.floor(x * (k := rng.uniform(2, 6))) + np.floor(y * k)) % 2,
    "noise": lambda x, y, rng: np.kron(rng.random((16, 16)), np.ones((SIZE // 16, SIZE // 16))),
}


BACKGROUND_COLOURS: dict[str, np.ndarray] = {
    "gradient": np.array([(0.45, 0.5, 0.55), (0.55, 0.5, 0.45)]),
    "stripes": np.array([(0.5, 0.45, 0.5), (0.55, 0.55, 0.5)]),
    "checker": np.array([(0.45, 0.5, 0.45), (0.5, 0.55, 0.55)]),
    "noise": np.array([(0.55, 0.5, 0.5), (0.45, 0.45, 0.5)]),
}
COLOURS = (  # pairs of a light and a dark colour, RGB
    ((1.0, 0.9, 0.7), (0.2, 0.1, 0.1)),
    ((0.8, 0.9, 1.0), (0.1, 0.1, 0.3)),
    ((0.8, 1.0, 0.8), (0.1, 0.25, 0.1)),
)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Return x (1, W) and y (H, 1) of the pixel centres as fractions of the frame, y upwards."""
    share = (np.arange(SIZE) + 0.5) / SIZE
    return share[None], 1 - share[:, None]


def _turned(x: np.ndarray, y: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
    return cos * x + sin * y, cos * y - sin * x


def _paint(picture: np.ndarray, body: Body, x: float, y: float, zoom: float, turn: float) -> None:
    """Draw `body` into `picture` (H, W, 3)."""
    columns, rows = _grid()
    radius = body.radius * zoom
    # only the square that contains the body
    left, right = np.searchsorted(columns[0], (x - 1.15 * radius, x + 1.15 * radius))
    top, bottom = np.searchsorted(-rows[:, 0], (-y - 1.15 * radius, 1.15 * radius - y))
    u, v = _turned((columns[:, left:right] - x) / radius, (rows[top:bottom] - y) / radius, turn)
    pixels = radius * SIZE
    cover = (0.5 - SHAPES[body.shape](u, v) * pixels).clip(0, 1)[..., None]
    half = (0.5 - u * pixels).clip(0, 1)[..., None]
    first, second = body.colours
    part = picture[top:bottom, left:right]
    part += cover * (second + half * (first - second) - part)


def _backdrop(p: ClipParams) -> np.ndarray:
    """Render the background, (H, W, 3)."""
    rng = np.random.default_rng(list(BACKGROUNDS).index(p.background))  # the same for all clips with this background
    columns, rows = _grid()
    x, y = _turned(2 * columns - 1, 2 * rows - 1, rng.random())
    pattern = BACKGROUNDS[p.background](x, y, rng)[..., None]
    first, second = BACKGROUND_COLOURS[p.background]
    return first + pattern * (second - first)


def render_frames(params: ClipParams) -> np.ndarray:
    """Render the frames of a clip: uint8 (T, `SIZE`, `SIZE`, 3), RGB, `FPS` Hz, `SECONDS` s."""
    times = np.arange(int(SECONDS * FPS)) / FPS
    x, y, zoom, turn = CLASSES[params.name][0](params, times)
    reach = 0.24 + 0.1 * params.extent
    x, y = params.centre[0] + reach * x, params.centre[1] + reach * y
    zoom = 2 ** ((0.6 + 0.4 * params.extent) * zoom)
    backdrop = _backdrop(params)
    frames = np.empty((len(times), SIZE, SIZE, 3), np.uint8)
    for t, frame in enumerate(frames):
        picture = backdrop.copy()
        _paint(picture, params.body, x[t], y[t], zoom[t], turn[t])
        frame[:] = 255 * picture + 0.5
    return frames


# --------------------------------------------------------------------------------------------------------------- files


def write_clip(path: Path, frames: np.ndarray, sound: np.ndarray) -> None:
    """Write frames (T, H, W, 3) and sound (L,) to an mp4 file: H.264 (one thread, key frames every 0.5 s) and AAC."""
    with av.open(str(path), "w", format="mp4") as file:
        options = {"preset": "veryfast", "crf": "25", "g": str(FPS // 2), "bf": "0", "threads": "1"}
        video = file.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono", bit_rate=48000)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            file.mux(video.encode(frame))
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        file.mux(audio.encode(frame))
        file.mux(video.encode(None))
        file.mux(audio.encode(None))


def _clip_name(name: str, index: int) -> str:
    return f"{name}/v_{name}_g{index // GROUP + 1:02d}_c{index % GROUP + 1:02d}.mp4"


def _make_clip(folder: Path, name: str, index: int, seed: int) -> None:
    params = clip_params(name, index, seed)
    write_clip(folder / "videos" / _clip_name(name, index), render_frames(params), render_sound(params))


def _make_clips(folder: Path, jobs: list[tuple[str, int]], seed: int, workers: int, progress: bool) -> None:
    """Write the clips of `jobs`, (class, index) pairs. With at most one worker, this process writes them."""
    names, indices = zip(*jobs, strict=True)
    columns = (itertools.repeat(folder), names, indices, itertools.repeat(seed))
    with progress_bar(total=len(jobs), desc="demo data set: ", unit="clip", disable=not progress) as bar:
        if workers <= 1:
            for job in zip(*columns, strict=False):
                _make_clip(*job)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            with ctrl_c_for_the_parent():
                done = pool.map(_make_clip, *columns)
            try:
                for _ in done:
                    bar.update()
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)  # else it would make the rest first
                raise


def _write_lists(folder: Path, train: range, test: range) -> None:
    """Write the class names and the lists of the first split in UCF-101's format (test lists have no labels)."""
    numbers = {name: number for number, name in enumerate(CLASSES, start=1)}
    lines = {
        "classInd.txt": [f"{number} {name}" for name, number in numbers.items()],
        "trainlist01.txt": [f"{_clip_name(name, i)} {number}" for name, number in numbers.items() for i in train],
        "testlist01.txt": [_clip_name(name, i) for name in numbers for i in test],
    }
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    for name, content in lines.items():
        (lists / name).write_text("\n".join(content) + "\n")


def _is_complete(root: Path, marker: dict) -> bool:
    """Whether `root` already holds the data set described by `marker`. Raises UserError if it holds anything else."""
    if (root / "demo.json").is_file():
        try:
            found = json.loads((root / "demo.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{root}/demo.json: cannot be read: {error}; delete {root} or choose another folder"
            ) from None
        if found == marker:
            return True
        if not isinstance(found, dict):
            raise UserError(f"{root}/demo.json: is of no demo data set; delete {root} or choose another folder")
        differ = [f"{k} {found.get(k)} instead of {v}" for k, v in marker.items() if found.get(k) != v]
        raise UserError(f"{root}: holds a demo data set with {', '.join(differ)}: delete it or choose another folder")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: expected a demo data set (demo.json), or nothing; found other files: choose another")
    return False


def make(
    root: str | Path,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    *,
    train_clips: int = 72,
    test_clips: int = 16,
) -> Path:
    """Create the demo data set in the folder `root` unless it is there already, and return the folder.

    `train_clips` and `test_clips` are per class; `workers` is the number of processes (default: one per core). The
    folder is built beside `root` and then renamed, so it is never incomplete.

    Raises:
        UserError: `root` holds other files or a demo data set with other parameters, or cannot be written.
    """
    root = Path(root)
    marker = {"version": VERSION, "seed": seed, "train_clips": train_clips, "test_clips": test_clips}
    if _is_complete(root, marker):
        return root
    train = range(train_clips)
    first_test = -(-train_clips // GROUP) * GROUP  # no group is in both splits
    test = range(first_test, first_test + test_clips)
    building = root.with_name(f".{root.name}.{secrets.token_hex(4)}.tmp")
    try:
        for name in CLASSES:
            (building / "videos" / name).mkdir(parents=True)
        jobs = [(name, i) for name in CLASSES for i in (*train, *test)]
        _make_clips(building, jobs, seed, workers or cores(), progress)
        _write_lists(building, train, test)
        (building / "demo.json").write_text(json.dumps(marker) + "\n")
        try:
            building.rename(root)
        except OSError:  # another run may have been faster
            if not _is_complete(root, marker):
                raise
    except OSError as error:
        raise UserError(f"--root {root}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m datasets.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data/demo", help="folder of the data set (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(1), help="processes (default: one per core)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    root = make(args.root, args.seed, args.workers)
    print(f"{root}: {len(list(root.glob('videos/*/*.mp4')))} clips")


if __name__ == "__main__":
    run_script(main)
