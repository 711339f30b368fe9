"""The memory bank's time per step, and its memory, over the number of instances.

A step here is xID on random embeddings: look up positives and negatives, loss, backward, update rows. Numbers of
instances that do not fit into memory are skipped and listed.
"""

import argparse
import os
import time
from pathlib import Path

import matplotlib
import torch

from criterions import build_criterion
from criterions.memory_bank import DTYPES
from utils.benchmark.tools import machine, table, time_in_turns, wait, write_json
from utils.cli import at_least
from utils.memory import default_device
from utils.pictures import picture, save_picture

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INSTANCES = (50_000, 200_000, 1_000_000, 3_000_000, 10_000_000)
FREE_SHARE = 0.7  # share of the free memory that a bank may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bank`."""
    parser.add_argument("--instances", type=at_least(2), nargs="+", default=INSTANCES, metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES), help="of the rows")
    parser.add_argument("--batch-size", type=at_least(1), default=32, metavar="N")
    parser.add_argument("--negatives", type=at_least(1), default=1024, metavar="K")
    parser.add_argument("--hard", type=at_least(0), default=0, metavar="N_HARD", help="nearest rows to find; 0: none")
    parser.add_argument("--dim", type=at_least(1), default=128, metavar="D")
    parser.add_argument("--steps", type=at_least(1), default=20, metavar="N", help="steps per round")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="rounds; the median is reported")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--png", type=picture, metavar="FILE", help="draw step time and memory")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the requested files."""
    device = default_device()
    print(
        f"xID's step without the network, batch {args.batch_size}, {args.negatives} negatives, {args.hard} hard, "
        f"D = {args.dim}, {machine(device)['device']}, torch {torch.__version__}\n"
    )
    rows, left_out = [], []
    for instances in args.instances:
        for dtype in args.dtypes:
            needed = 2 * instances * args.dim * DTYPES[dtype].itemsize
            free = FREE_SHARE * _free_memory(device)
            if needed > free:
                why = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
                left_out.append(f"{instances:,} rows in {dtype}: left out, {why}")
            else:
                rows.append(_measure(args, instances, dtype, device))
    columns = ("rows", "stored as", "GB", "ms/step", "min-max", "s to make")
    print(table(columns, [_cells(row) for row in rows]))
    print("\n".join(left_out))
    if args.json:
        write_json(args.json, {**vars(args), **machine(device), "rows": rows, "left_out": left_out})
    if args.png and rows:
        _draw(args, rows, machine(device)["device"])


def _measure(args: argparse.Namespace, instances: int, dtype: str, device: torch.device) -> dict:
    start = time.perf_counter()
    cfg = {"num_negatives": args.negatives, "N_hard": args.hard, "hard_neg_epoch": 0, "bank_dtype": dtype}
    criterion = build_criterion({"name": "xID", "args": cfg}, instances, args.dim, device)
    wait(device)
    made = time.perf_counter() - start
    generator = torch.Generator(device).manual_seed(0)
    video, audio = torch.randn(2, args.batch_size, args.dim, device=device, generator=generator)
    video.requires_grad_(), audio.requires_grad_()

    def step() -> None:
        index = torch.randint(instances, (args.batch_size,), device=device, generator=generator)
        torch.autograd.grad(criterion(video, audio, index), (video, audio))

    timing = time_in_turns([step], args.steps, args.rounds, device)[0]
    bank = criterion.nce_average
    return {
        "instances": instances,
        "dtype": dtype,
        "gb": (bank.view1_mem.nbytes + bank.view2_mem.nbytes) / 1e9,
        "ms": timing.median * 1e3,
        "ms_rounds": [seconds * 1e3 for seconds in timing.rounds],
        "seconds_to_make": made,
    }


def _cells(row: dict) -> list[str]:
    spread = f"{min(row['ms_rounds']):.2f}-{max(row['ms_rounds']):.2f}"
    name, made = f"{row['instances']:,}", f"{row['seconds_to_make']:.1f}"
    return [name, row["dtype"], f"{row['gb']:.3f}", f"{row['ms']:.2f}", spread, made]


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))  # given in KiB


def _draw(args: argparse.Namespace, rows: list[dict], device: str) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for dtype, color in zip(args.dtypes, ("#2f6f9f", "#d1783c"), strict=False):
        own = [row for row in rows if row["dtype"] == dtype]
        sizes = [row["instances"] for row in own]
        for axes, key in zip(panels, ("ms", "gb"), strict=True):
            axes.plot(sizes, [row[key] for row in own], "o-", color=color, label=dtype)
    for axes, label in zip(panels, ("ms per step, without the network", "GB, both banks"), strict=True):
        axes.set(xscale="log", xlabel="instances", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    sizes = f"batch {args.batch_size}, {args.negatives} negatives, D = {args.dim}"
    panels[0].set_ylim(0)
    panels[1].set_yscale("log")
    figure.suptitle(f"Memory bank: {sizes}; {device}", fontsize=9)
    save_picture(figure, args.png, dpi=120)
    plt.close(figure)
