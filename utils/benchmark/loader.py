"""The loader: clips per second from files, time per stage, and a comparison with a plain way to read the same clips.

Each variant reads the same training clips (frames, random crop, sound) of every video, in turns, in a single process.
`plain` reads the raw files as scripts usually do: it decodes every frame from the key frame on, converts those of the
clip to PIL images, transforms these one by one, and decodes the sound from the file's start. `ours, raw` and
`ours, prepared` use this project's decoder. Times are the process's CPU time, which other load on the machine hardly
changes. Then the project's DataLoader runs an epoch with 1 and with N workers, each as for a CPU, with new memory for
every batch, and `staged` as for a GPU (`datasets.staging`), but without pinning, or the thread that otherwise does it.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from datasets import build_videos, sampling
from datasets.decoding import ANY_METADATA, DecodeError, VideoFile
from datasets.preprocessing import crop_and_resize
from datasets.video_dataset import (
    ClipRecipe,
    EpochBatches,
    TrainingClips,
    VideoList,
    make_loader,
)
from utils.benchmark.peers import installed
from utils.benchmark.tools import table, write_json
from utils.cli import at_least
from utils.config import load_config
from utils.errors import UserError
from utils.pictures import picture, save_picture
from utils.processes import cores

STAGES = ("open", "seek and decode", "convert", "resize", "audio", "collate")
BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python3 -m utils.benchmark loader`."""
    parser.add_argument("cfg", metavar="CFG", help="YAML of a pre-training; it defines the clips")
    parser.add_argument("--root", required=True, help="the raw data set")
    parser.add_argument("--prepared", metavar="DIR", help="the same, prepared by python3 -m datasets.prepare")
    parser.add_argument(
        "--clips", type=at_least(1), default=3, metavar="N", help="clips per video; default: %(default)s"
    )
    parser.add_argument(
        "--videos", type=at_least(1), default=32, metavar="N", help="at most N videos; default: %(default)s"
    )
    parser.add_argument("--workers", type=at_least(1), default=cores(), metavar="N", help="default: one per core")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of CFG")
    parser.add_argument("--peers", action="store_true", help="also torchcodec and decord, if installed")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--png", type=picture, metavar="FILE", help="plot the time per stage")


def run(args: argparse.Namespace) -> None:
    """Measure, print the tables and write the requested files."""
    torch.set_num_threads(1)
    cfg = load_config(args.cfg, [*args.set, f"dataset.root={args.root}"], "pre-training")
    recipe = ClipRecipe.from_config(cfg["dataset"], augment=True)
    videos = build_videos(cfg["dataset"], cfg["dataset"]["train"]["split"])
    roots = {"ours, raw": Path(args.root)} | ({"ours, prepared": Path(args.prepared)} if args.prepared else {})
    names, left_out = with_clips(videos, recipe, args.videos)
    for root in roots.values():
        if absent := [name for name in names if not (root / name).is_file()]:
            raise UserError(f"{root}: {len(absent)} of the {len(names)} videos are not there, such as {absent[0]}")

    readers = {"plain, raw": (read_plain, Path(args.root))} | {v: (read_ours, root) for v, root in roots.items()}
    peers, absent = installed() if args.peers else ({}, [])
    for name, read in peers.items():
        readers |= {variant.replace("ours", name): (read, root) for variant, root in roots.items()}
    timers = {variant: Stopwatch() for variant in readers}
    for k in range(args.clips):
        for i, name in enumerate(names):
            clip = draw_clip(Path(args.root) / name, recipe, np.random.default_rng((k, i)))
            order = list(timers)[:: 1 if (i + k) % 2 else -1]  # so that no variant always finds the file cached
            for variant in order:
                read, root = readers[variant]
                with timers[variant].video(name):
                    read(root / name, clip, recipe, timers[variant])
    rows = figures(timers, len(names) * args.clips)
    print(
        f"{len(names)} videos x {args.clips} clips, {recipe.num_frames} frames of {recipe.crop_size} px, one process\n"
    )
    print(table(("variant", "clips/s of CPU time", "ratio", "least", "most", *STAGES), [cells(row) for row in rows]))
    print("".join(f"\n{line}" for line in [*absent, *left_out]))
    print("\nratio: of all clips, then of the video with the least and the most; stages in ms per clip\n")
    skippable = {name: unreferenced(Path(args.root) / name) for name in names}
    heads = ("raw video", "skippable", *(row["variant"] for row in rows[1:]))
    print(table(heads, [(name, f"{skippable[name]:.0%}", *ratio_cells(rows[1:], name)) for name in names]))
    print("\nratios by video; skippable: frames of the raw file that no other frame references")
    epochs = [
        epoch(root, names, recipe, workers, variant, staged)
        for variant, root in roots.items()
        for workers in counts(args)
        for staged in (False, True)
    ]
    print("\nDataLoader, wall time\n")
    heads = ("variant", "staged", "workers", "clips/s", "a core", "first batch, s", "MB a worker", "MB grown")
    print(table(heads, [tuple(map(str, e.values())) for e in epochs]))
    print(
        "\nMB a worker: memory that no other process has used (staged: with its slots, which the parent does not read "
        "here); grown: from the first half of the epoch to its end"
    )
    if args.json:
        write_json(args.json, {"clips": rows, "skippable": skippable, "epochs": epochs})
    if args.png:
        draw(rows, args.png)


@dataclass(frozen=True)
class ClipPlace:
    """One training clip: start times in seconds on the raw file's clock, the crop as fractions of the frame."""

    video_start: float
    audio_start: float
    box: tuple[float, float, float, float]  # top, left, height, width

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The crop in a frame of this size: top, left, height, width."""
        top, left, h, w = (round(share * side) for share, side in zip(self.box, (height, width) * 2, strict=True))
        return top, left, min(h, height - top), min(w, width - left)


def with_clips(videos: VideoList, recipe: ClipRecipe, most: int) -> tuple[list[str], list[str]]:
    """Return the names of the first `most` videos that clips can be drawn from, and why others were skipped.

    Raises:
        UserError: there are none.
    """
    names, left_out = [], []
    for i in range(len(videos)):
        try:
            draw_clip(videos.path(i), recipe, np.random.default_rng(0))
        except DecodeError as error:
            left_out.append(f"left out: {error}")
        else:
            names.append(videos.name(i))
        if len(names) == most:
            break
    if not names:
        raise UserError(f"{videos.root}: clips can be drawn from none of its {len(videos)} videos; {left_out[0]}")
    return names, left_out


def draw_clip(path: Path, recipe: ClipRecipe, rng: np.random.Generator) -> ClipPlace:
    """Draw a clip as pre-training would."""
    with VideoFile(path) as file:
        starts = sampling.audio_visual(
            file.span("video"), file.span("audio"), recipe.video_seconds, recipe.audio_seconds, rng
        )
        height, width = file.info.video.height, file.info.video.width
    top, left, h, w = sampling.random_resized_crop(height, width, recipe.area, recipe.aspect, rng)
    return ClipPlace(*starts, (top / height, left / width, h / height, w / width))


class Stopwatch:
    """CPU seconds by video and by stage."""

    def __init__(self) -> None:
        self.by_video: dict[str, float] = defaultdict(float)
        self.stages: dict[str, float] = defaultdict(float)

    @contextmanager
    def video(self, name: str) -> Iterator[None]:
        """Time one clip of a video."""
        start = time.process_time()
        yield
        self.by_video[name] += time.process_time() - start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a clip; the time of a nested stage does not count for the outer one."""
        start, inner = time.process_time(), sum(self.stages.values())
        yield
        self.stages[name] += time.process_time() - start - (sum(self.stages.values()) - inner)


class TimedFile(VideoFile):
    """Our decoder, with its conversion to RGB timed separately."""

    watch: Stopwatch

    def _to_rgb(self, *arguments: object) -> np.ndarray:
        with self.watch.stage("convert"):
            return super()._to_rgb(*arguments)


def read_ours(path: Path, clip: ClipPlace, recipe: ClipRecipe, watch: Stopwatch) -> tuple:
    """Read a clip as the project's data sets do: frames (T, crop, crop, 3) and waveform (L,)."""
    with watch.stage("open"):
        file = TimedFile(path)
        file.watch = watch
    with file:
        with watch.stage("seek and decode"):
            window = {"video_start": clip.video_start, "video_seconds": recipe.video_seconds, "fps": recipe.video_fps}
            box = clip.pixels(file.info.video.height, file.info.video.width)
            frames = file.read(**window, crop=box).frames
        with watch.stage("resize"):
            frames = crop_and_resize(torch.from_numpy(frames), (0, 0, *box[2:]), recipe.crop_size)
        with watch.stage("audio"):
            sound = file.read(
                audio_start=clip.audio_start, audio_seconds=recipe.audio_seconds, sample_rate=recipe.sample_rate
            ).waveform
    with watch.stage("collate"):
        return torch.stack([frames]), torch.from_numpy(sound)[None]


def read_plain(path: Path, clip: ClipPlace, recipe: ClipRecipe, watch: Stopwatch) -> tuple:
    """Read the same clip as scripts usually do: the baseline."""
    from PIL import Image

    with watch.stage("open"):
        file = av.open(str(path), **ANY_METADATA)
    with file:
        with watch.stage("seek and decode"):
            stream = file.streams.video[0]
            stream.thread_type = "NONE"
            file.seek(int(clip.video_start / stream.time_base), stream=stream)
            decoded = []
            for frame in file.decode(stream):
                if frame.time < clip.video_start - 1.5 / float(stream.average_rate):
                    continue
                with watch.stage("convert"):
                    decoded.append((frame.time, frame.to_image()))
                if frame.time >= clip.video_start + recipe.video_seconds:
                    break
            times = np.array([seconds for seconds, _ in decoded])
            wanted = clip.video_start + np.arange(recipe.num_frames) / recipe.video_fps
            pictures = [decoded[int(np.abs(times - at).argmin())][1] for at in wanted]
        with watch.stage("resize"):
            width, height = pictures[0].size
            top, left, h, w = (s * side for s, side in zip(clip.box, (height, width) * 2, strict=True))
            size = (recipe.crop_size, recipe.crop_size)
            frames = [p.crop((left, top, left + w, top + h)).resize(size, Image.Resampling.BILINEAR) for p in pictures]
            frames = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames])
        with watch.stage("audio"):
            file.seek(0)
            resampler = av.AudioResampler("fltp", "mono", recipe.sample_rate)
            pieces = [part.to_ndarray()[0] for frame in file.decode(audio=0) for part in resampler.resample(frame)]
            first = round(clip.audio_start * recipe.sample_rate)
            sound = np.concatenate(pieces)[first : first + round(recipe.audio_seconds * recipe.sample_rate)]
    with watch.stage("collate"):
        return torch.stack([frames]), torch.from_numpy(sound)[None]


def figures(timers: dict[str, Stopwatch], clips: int) -> list[dict]:
    """One row per variant: clips per second of CPU time, ratio to the plain variant, and the stages in ms per clip."""
    plain = timers["plain, raw"].by_video
    rows = []
    for variant, watch in timers.items():
        ratios = [plain[name] / seconds for name, seconds in watch.by_video.items()]
        rows.append(
            {
                "variant": variant,
                "clips_per_s": clips / sum(watch.by_video.values()),
                "ratio": sum(plain.values()) / sum(watch.by_video.values()),
                "least": min(ratios),
                "most": max(ratios),
                "median": statistics.median(ratios),
                "stages_ms": {stage: 1000 * watch.stages[stage] / clips for stage in STAGES},
                "ratio_by_video": dict(zip(watch.by_video, ratios, strict=True)),
            }
        )
    return rows


def cells(row: dict) -> tuple[str, ...]:
    """One row of the printed table."""
    ratios = [f"{row[name]:.2f}" for name in ("ratio", "least", "most")]
    return row["variant"], f"{row['clips_per_s']:.1f}", *ratios, *(f"{ms:.1f}" for ms in row["stages_ms"].values())


def ratio_cells(rows: list[dict], name: str) -> list[str]:
    """One video's ratios, one cell per variant."""
    return [f"{row['ratio_by_video'][name]:.2f}" for row in rows]


def unreferenced(path: Path) -> float:
    """The share of a file's frames that no other frame references, which its decoder can skip."""
    with av.open(str(path), **ANY_METADATA) as file:
        stream = file.streams.video[0]
        stream.thread_type, stream.codec_context.skip_frame = "NONE", "NONREF"
        packets, frames = 0, 0
        for packet in file.demux(stream):
            packets += packet.size > 0
            frames += len(packet.decode())
    return 1 - frames / packets


def counts(args: argparse.Namespace) -> list[int]:
    """Numbers of workers to try."""
    return sorted({1, args.workers})


def epoch(root: Path, names: list[str], recipe: ClipRecipe, workers: int, variant: str, staged: bool) -> dict:
    """Run an epoch of the DataLoader: clips per second after the first batch, time to that, memory of the workers."""
    clips = TrainingClips(VideoList(root, names), recipe, max(1, 16 * BATCH // len(names)), seed=0)
    batches = EpochBatches(len(clips), BATCH)
    batch_bytes = BATCH * recipe.num_bytes if staged else 0
    loader = make_loader(clips, workers, batch_bytes=batch_bytes, batch_sampler=batches)
    started = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter()
    halfway, memory = None, []
    for step in range(1, batches.steps):
        next(iterator)
        memory = [private_memory(worker.pid) for worker in loader._iterator._workers]
        if step == batches.steps // 2:
            halfway = max(memory)
    rate = BATCH * (batches.steps - 1) / (time.perf_counter() - first)
    return {
        "variant": variant,
        "staged": staged,
        "workers": len(memory),
        "clips_per_s": round(rate, 1),
        "a_core": round(rate / min(len(memory), cores()), 1),
        "first_batch_s": round(first - started, 2),
        "worker_mb": round(max(memory), 1),
        "grown_mb": round(max(memory) - (halfway or max(memory)), 1),
    }


def private_memory(pid: int) -> float:
    """MB of a process that it shares with no other (USS); Linux only."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return float("nan")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def draw(rows: list[dict], file: str) -> None:
    """Draw one bar per variant: a clip's time by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.4 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names, left = [row["variant"] for row in rows], np.zeros(len(rows))
    for stage in STAGES:
        values = np.array([row["stages_ms"][stage] for row in rows])
        axis.barh(names, values, left=left, label=stage)
        left += values
    for row, end in zip(rows, left, strict=True):
        axis.text(
            end, row["variant"], f" {row['clips_per_s']:.1f} clips/s, {row['ratio']:.1f} x", va="center", fontsize=8
        )
    axis.set(xlabel="ms of one core per clip", xlim=(0, 1.25 * left.max()))
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncols=3, loc="lower right")
    save_picture(figure, file)
