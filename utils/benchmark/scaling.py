"""The time of a training step on 1 to N processes of this node, and the bytes communicated per step.

Every process has the same number of clips, so with perfect scaling a step always takes the same time. On a CPU the
processes share cores and memory, so only the bytes are meaningful. No step is recorded as CUDA graphs, as those of
several processes cannot be.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from utils.benchmark.forms import Step, forms_of, synthetic_batch
from utils.benchmark.tools import CollectiveCounter, machine, table, time_in_turns, write_json
from utils.cli import at_least
from utils.config import load_config
from utils.distributed import is_main, launch, rank, world_size
from utils.errors import UserError

ONE_NODE = {"distributed": True, "gpu": None, "world_size": None, "rank": None, "dist_url": None, "dist_backend": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `scaling`."""
    parser.add_argument("cfg", metavar="CFG", help="YAML of an xID or VICReg pre-training")
    parser.add_argument(
        "--procs", type=at_least(1), nargs="+", default=[1, 2, 4], metavar="N", help="numbers of processes"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="clips per process; default: the YAML's / max(--procs)"
    )
    parser.add_argument("--crop", type=at_least(1), metavar="N", help="pixels; default: the YAML's")
    parser.add_argument("--steps", type=at_least(1), default=5, metavar="N", help="steps per round")
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="rounds; the median is reported")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key; repeatable")


def run(args: argparse.Namespace) -> None:
    """Measure each number of processes, print the table and write the requested file."""
    cfg = load_config(args.cfg, args.set, "pre-training")
    gpus = torch.cuda.device_count()
    if gpus and max(args.procs) > gpus:
        raise UserError(f"--procs {max(args.procs)}: one process per GPU, but {gpus} are visible")
    cfg["dataset"]["crop_size"] = args.crop or cfg["dataset"]["crop_size"]
    clips = args.batch_size or max(1, cfg["dataset"]["batch_size"] // max(args.procs))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in args.procs:
            file = Path(folder) / f"{processes}.json"
            options = argparse.Namespace(**ONE_NODE, nproc=processes)
            launch(_measure, options, cfg, clips, args.steps, args.rounds, str(file))
            rows.append(json.loads(file.read_text()))
    first = rows[0]["clips_per_s"] / rows[0]["processes"]
    for row in rows:
        row["efficiency"] = row["clips_per_s"] / row["processes"] / first
    device = torch.device("cuda" if gpus else "cpu")
    size = cfg["dataset"]["crop_size"]
    print(f"training step, {args.cfg}, {clips} clips of {size} px per process, {machine(device)['device']}\n")
    columns = ("processes", "ms/step", "clips/s", "efficiency", "MB handed over", "MB sent at least")
    print(table(columns, [_cells(row) for row in rows]))
    print(
        "\nMB handed over: what a process passes to (all-reduce) or gets from (the others) collective calls per step."
    )
    for row in rows:
        for kind, calls in row["calls"].items():
            print(f"{row['processes']} processes: {kind} {calls} per step, {row['payload'][kind] / 1e6:.4g} MB")
    if not gpus:
        print("On a CPU the processes share cores and memory: only the bytes mean something, not the times.")
    if args.json:
        write_json(args.json, {"cfg": args.cfg, "clips_a_process": clips, **machine(device), "rows": rows})


def _cells(row: dict) -> list[str]:
    return [
        str(row["processes"]),
        f"{row['ms']:.1f}",
        f"{row['clips_per_s']:.1f}",
        f"{row['efficiency']:.0%}",
        f"{sum(row['payload'].values()) / 1e6:.2f}",
        f"{row['wire'] / 1e6:.2f}",
    ]


def _measure(device: torch.device, cfg: dict, clips: int, steps: int, rounds: int, file: str) -> None:
    """Measure our step, in its last form, in one process; rank 0 writes the figures."""
    forms, _ = forms_of(cfg, device)
    step = Step(cfg, replace(forms[-1], graphs=False), synthetic_batch(cfg, device, clips, seed=rank()), device)
    for _ in range(4):
        step()  # DDP settles its buckets in the first steps
    with CollectiveCounter(world_size()) as counter:
        step()
    seconds = time_in_turns([step], steps, rounds, device)[0].median
    if is_main():
        figures = {"processes": world_size(), "ms": seconds * 1e3, "clips_per_s": clips * world_size() / seconds}
        figures |= {"calls": counter.calls, "payload": counter.payload, "wire": counter.wire}
        Path(file).write_text(json.dumps(figures))
