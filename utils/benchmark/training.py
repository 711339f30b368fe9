"""The real loader and the real step: clips per second of each alone and of both together, and how they overlap.

The loader alone produces batches that are discarded (on a GPU also without `datasets.staging`, for comparison); the
step alone trains on one batch on the device; both together do what a script does. Training is limited by the slower of
the two: the share of its speed that both together reach shows the cost of their overlap. (On a CPU the two compete for
cores, so that share means little.) Nothing is saved.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from datasets import build_training
from datasets.staging import SLOTS, StagedLoader
from datasets.video_dataset import make_loader
from utils.benchmark.forms import Step, forms_of
from utils.benchmark.step import check_finite
from utils.benchmark.tools import Run, machine, table, wait, write_json
from utils.cli import at_least
from utils.config import load_config
from utils.errors import UserError
from utils.memory import default_device
from utils.pictures import picture, save_picture
from utils.prefetch import prefetch
from utils.trial import attempt, uncompile

WARM_UP = 3  # steps before each measurement: compilation, cuDNN's choices, full queues
SHOWN = 12  # steps in the plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `training`."""
    parser.add_argument("cfg", metavar="CFG", help="YAML of a pre-training; sets num_workers too")
    parser.add_argument("--root", help="the data set; default: the YAML's")
    parser.add_argument(
        "--steps", type=at_least(2), default=30, metavar="N", help="steps per measurement; default: %(default)s"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key; repeatable")
    parser.add_argument("--json", metavar="FILE", help="write all figures, with the times of each step")
    parser.add_argument("--png", type=picture, metavar="FILE", help="plot when host and device wait, queue and compute")
    parser.add_argument("--trace", metavar="FILE", help="write a torch.profiler trace of some steps, for Perfetto")


@dataclass
class Times:
    """One step, in seconds since the first: batch requested and received, step queued, device begins and ends."""

    asked: float
    there: float
    queued: float
    begun: float = 0.0
    done: float = 0.0


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the requested files."""
    device = default_device()
    root = [f"dataset.root={args.root}"] if args.root else []
    cfg = load_config(args.cfg, [*args.set, *root], "pre-training")
    loader = build_training(cfg, device, pairs=cfg["model"]["arch"] == "vicreg_v_wrapper")
    if cfg["loss"]["name"] == "xID":
        cfg["loss"]["args"]["num_instances"] = len(loader.dataset.videos)
    batches, size = endless(loader), cfg["dataset"]["batch_size"] // cfg["accumulate"]
    on_device = prefetch(batches, device)
    step = Step(cfg, forms_of(cfg, device)[0][-1], next(on_device), device)

    def train() -> Times:
        return one_step(step, on_device)

    _, reason = attempt(lambda: [step() for _ in range(WARM_UP)])  # the second step records CUDA graphs
    if reason is not None:
        print(f"compile: failed, going on without: {reason}", file=sys.stderr)
        uncompile(step.net, step.prepare)
    for _ in range(WARM_UP):
        step()
    check_finite(args.cfg, step)
    alone = {"step": seconds(step, args.steps, device)}
    alone["loader"] = loading(loader, batches, args.steps, device)
    unstaged = {}
    if isinstance(loader, StagedLoader):
        plain = make_loader(loader.dataset, loader.num_workers, device, batch_sampler=loader.batch_sampler)
        unstaged["loader, not staged"] = loading(plain, endless(plain), args.steps, device)
        del plain
    for _ in range(WARM_UP):
        train()
    times, together = timeline(train, args.steps, device)
    measured = {"step": alone["step"], **unstaged, "loader": alone["loader"], "both": together}
    rates = {name: size / value for name, value in measured.items()}
    slower = min(alone, key=lambda name: rates[name])
    waited = sum(t.there - t.asked for t in times) / (together * args.steps)
    where = f"{loader.dataset.videos}, {loader.num_workers} workers, batch {size}, {machine(device)['device']}"
    print(f"{where}, torch {torch.__version__}\n")
    print(table(("", "ms/step", "clips/s"), [(n, f"{1e3 * size / r:.1f}", f"{r:.1f}") for n, r in rates.items()]))
    print(f"\nthe slower one: the {slower}; both together reach {rates['both'] / rates[slower]:.0%} of its speed")
    print(f"waiting for data: {waited:.0%} of the time")
    if args.json:
        report = {"cfg": args.cfg, "where": where, "clips_per_s": rates, "slower": slower, "wait_share": waited}
        write_json(args.json, report | machine(device) | {"steps": times})
    if args.png:
        draw(times[:SHOWN], device, where, args.png)
    if args.trace:
        record_trace(train, device, args.trace)


def endless(loader: DataLoader) -> Iterator[dict]:
    """Yield batches, epoch after epoch.

    Raises:
        UserError: a batch holds a clip for which no video could be read.
    """
    loader.batch_sampler.start_at(0, epochs=1_000_000)
    for batch in loader:
        if "frames" not in batch:
            raise UserError(f"no video could be read for a clip; the last one tried: {batch['failures'][-1][1]}")
        yield batch


def loading(loader: DataLoader, batches: Iterator[dict], steps: int, device: torch.device) -> float:
    """Mean seconds per batch of the loader alone, once its queues are used up and all its slots are pinned."""
    for _ in range(WARM_UP + loader.num_workers * SLOTS):
        next(batches)
    return seconds(lambda: next(batches), steps, device)


def one_step(step: Step, batches: Iterator[dict]) -> Times:
    """Train on the next batch; return the host times."""
    asked = time.perf_counter()
    step.batch = next(batches)
    there = time.perf_counter()
    step()
    return Times(asked, there, time.perf_counter())


def seconds(call: Run, steps: int, device: torch.device) -> float:
    """Mean seconds per call over `steps` calls in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        call()
    wait(device)
    return (time.perf_counter() - start) / steps


def timeline(train: Callable[[], Times], steps: int, device: torch.device) -> tuple[list[Times], float]:
    """Times of `steps` steps in a row, and seconds per step. On a CPU the device works while the host queues."""
    wait(device)
    start, events, times = time.perf_counter(), [], []
    for _ in range(steps):
        if device.type == "cuda":
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        times.append(train())
    if device.type == "cuda":
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    wait(device)
    end = time.perf_counter()
    for i, t in enumerate(times):
        t.asked, t.there, t.queued = (moment - start for moment in (t.asked, t.there, t.queued))
        t.begun, t.done = t.there, t.queued
        if events:  # device time between events, shifted so that the last event ends with the measurement
            offset = end - start - events[0].elapsed_time(events[-1]) / 1e3
            t.begun = max(t.there, offset + events[0].elapsed_time(events[i]) / 1e3)
            t.done = offset + events[0].elapsed_time(events[i + 1]) / 1e3
    return times, (end - start) / steps


def draw(times: list[Times], device: torch.device, title: str, file: str) -> None:
    """Plot over time, one row each: the host waiting, the host queueing, the device computing."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 2.4), layout="constrained")
    rows = {"host: waits for data": ("asked", "there"), "host: queues the step": ("there", "queued")}
    rows[f"{device.type}: computes"] = ("begun", "done")
    for row, (begin, end) in enumerate(rows.values()):
        spans = [(getattr(t, begin), getattr(t, end) - getattr(t, begin)) for t in times]
        for k in (0, 1):  # neighbouring steps in different shades
            axes.broken_barh(spans[k::2], (row - 0.4, 0.8), color=f"C{row}", alpha=(1.0, 0.6)[k])
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds, the first {len(times)} steps")
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save_picture(figure, file, dpi=120)
    plt.close(figure)


def record_trace(train: Run, device: torch.device, file: str) -> None:
    """Write a trace of host and device over some steps, as JSON for chrome://tracing and Perfetto."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(WARM_UP):
            train()
        wait(device)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(file)
