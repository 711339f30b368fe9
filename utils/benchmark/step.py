"""The time of a whole training step, from the plain form to ours, with one change added per row.

A step is device preprocessing, forward, backward, optimizer and bank, on a synthetic batch on the device. All rows run
the same batch in the same process, in turns. The plain form: float32 (TF32 on a GPU), 3D convolutions on NCDHW memory,
negatives drawn on the CPU, unfused Adam and, on a CPU, freed memory returned to the system. In all rows the audio
network is the same, and cuDNN chooses its kernels by timing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.benchmark.forms import Form, Step, forms_of, synthetic_batch, with_options
from utils.benchmark.tools import (
    Run,
    Timing,
    bar_chart,
    copy_bandwidth,
    count_bytes,
    count_flops,
    host_times,
    kernel_times,
    machine,
    matrix_ceiling,
    queueing_seconds,
    table,
    time_in_turns,
    wait,
    write_json,
)
from utils.cli import at_least
from utils.config import load_config
from utils.errors import RunFailed, UserError
from utils.memory import default_device
from utils.pictures import picture
from utils.trial import attempt

COLUMNS = (
    "variant",
    "ms/step",
    "min-max",
    "clips/s",
    "ratio",
    "TFLOP/s",
    "of ceiling",
    "GB moved",
    "of copy",
    "GB peak",
    "s first",
    "host ms",
    "kernel ms",
)
LEGEND = """\
ratio: clips/s over the plain form's. TFLOP/s: convolutions and matrix products, counted in the plain form, over time.
of ceiling: TFLOP/s relative to square matrix products in the row's precision, measured here. GB moved: inputs and
outputs of each operator once, without views (unfused; not counted for a compiled step). of copy: GB moved per second as
a share of a copy's bandwidth. GB peak: GPU memory without other rows' models. s first: first call, with compilation.
host ms: until the host has queued a step for an idle GPU, the median of five. kernel ms: the GPU's kernels, summed. The
larger of the two limits the step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `step`."""
    parser.add_argument("cfg", metavar="CFG", help="YAML of an xID or VICReg pre-training")
    add_measuring_arguments(parser)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by `step` and `inference`."""
    parser.add_argument("--batch-size", type=at_least(1), metavar="N", help="clips; default: the YAML's")
    parser.add_argument("--crop", type=at_least(1), metavar="N", help="pixels; default: the YAML's")
    parser.add_argument("--steps", type=at_least(1), default=10, metavar="N", help="steps per variant and round")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="rounds; the median is reported")
    parser.add_argument(
        "--top-kernels",
        type=at_least(0),
        default=0,
        metavar="N",
        help="list the N slowest kernels of the last row, and of the host's operators while it queues them",
    )
    parser.add_argument(
        "--inductor",
        metavar="KEY=VALUE[,...]",
        action="append",
        default=[],
        help="one more row, compiled with options of torch.compile's inductor, e.g. combo_kernels=true; repeatable",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--png", type=picture, metavar="FILE", help="draw clips per second")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key; repeatable")


def configured(args: argparse.Namespace) -> dict:
    """Load the configuration, with sizes from the command line."""
    cfg = load_config(args.cfg, args.set)
    cfg["dataset"]["batch_size"] = args.batch_size or cfg["dataset"]["batch_size"]
    cfg["dataset"]["crop_size"] = args.crop or cfg["dataset"]["crop_size"]
    return cfg


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the requested files."""
    device = default_device()
    cfg = configured(args)
    if "benchmark" in cfg:
        raise UserError(f"{args.cfg}: configures an evaluation; use python3 -m utils.benchmark inference")
    batch = synthetic_batch(cfg, device)
    forms, left_out = forms_of(cfg, device)
    forms = with_options(forms, args.inductor)
    rows, failed = first_calls(forms, lambda form: Step(cfg, form, batch, device), device)
    measure_and_report(args, cfg, device, rows, left_out + failed, "training step")


@dataclass
class Row:
    """A variant and its measurements."""

    form: Form
    run: Run
    first_s: float = 0.0  # seconds of the first call, compilation included
    static: int = 0  # device bytes held between calls
    timing: Timing | None = None
    moved: int | None = None  # bytes
    peak: float | None = None  # GB
    host_s: float | None = None  # seconds until a call is queued on an idle GPU
    kernels: list[dict] = field(default_factory=list)  # of a call on a GPU, from `kernel_times`

    def figures(self, plain: "Row", clips: int, flops: int, ceiling: float, bandwidth: float) -> dict:
        """The figures for the report."""
        seconds = self.timing.median
        return {
            "variant": self.form.name,
            "ms": seconds * 1e3,
            "ms_rounds": [second * 1e3 for second in self.timing.rounds],
            "clips_per_s": clips / seconds,
            "ratio": plain.timing.median / seconds,
            "tflops": flops / seconds / 1e12,
            "of_ceiling": flops / seconds / ceiling,
            "gb_moved": None if self.moved is None else self.moved / 1e9,
            "of_copy": None if self.moved is None else self.moved / seconds / bandwidth,
            "peak_gb": self.peak,
            "first_step_s": self.first_s,
            "host_ms": None if self.host_s is None else self.host_s * 1e3,
            "kernel_ms": sum(kernel["ms"] for kernel in self.kernels) if self.kernels else None,
        }


def first_calls(
    forms: Iterable[Form], build: Callable[[Form], Callable[[], Tensor]], device: torch.device
) -> tuple[list[Row], list[str]]:
    """Build each form and time its first call; return the rows, and a line for each that could not be compiled.

    The time of a first call is printed at once: compiling takes long.

    Raises:
        RunFailed: the result of a form is not finite.
    """
    rows, failed = [], []
    for form in forms:
        before, call = held(device), build(form)
        row = Row(form, call)
        if form.compiled:
            row.first_s, reason = attempt(lambda call=call: seconds_of(call, device))
            if reason is None and (form.graphs or form.options):  # CUDA graphs are recorded, then replayed
                _, reason = attempt(lambda call=call: [call(), call()], memory_too=True)
            if reason is not None:
                failed.append(f"{form.name}: left out, it failed: {reason}")
                continue
        else:
            row.first_s = seconds_of(call, device)
        check_finite(form.name, call)
        row.static = held(device) - before
        rows.append(row)
        print(f"{form.name}: first call {row.first_s:.1f} s", file=sys.stderr)
    return rows, failed


def check_finite(name: str, run: Callable[[], Tensor]) -> None:
    """Call a step that was called before: its loss reflects the gradients of the first call.

    Raises:
        RunFailed: the result is not finite, so that timing it is pointless.
    """
    if not run().isfinite().all():
        raise RunFailed(f"{name}: after the first call, what it computes is not finite; nothing was measured")


def measure_and_report(
    args: argparse.Namespace, cfg: dict, device: torch.device, rows: list[Row], left_out: list[str], what: str
) -> None:
    """Count operations, time the rows in turns, print their table, write JSON and chart."""
    flops = count_flops(rows[0].run)
    for row in rows:
        row.moved = None if row.form.compiled else count_bytes(row.run)
    timings = time_in_turns([row.run for row in rows], args.steps, args.rounds, device)
    for row, timing in zip(rows, timings, strict=True):
        row.timing, row.peak = timing, _peak(row, device)
        if device.type == "cuda":
            row.host_s, row.kernels = queueing_seconds(row.run, device), kernel_times(row.run, device)
    ceilings = {name: matrix_ceiling(device, name) for name in {row.form.precision for row in rows}}
    bandwidth, clips = copy_bandwidth(device), cfg["dataset"]["batch_size"]
    figures = [row.figures(rows[0], clips, flops, ceilings[row.form.precision], bandwidth) for row in rows]
    frames = round(cfg["dataset"]["video_clip_duration"] * cfg["dataset"]["video_fps"])
    size = cfg["dataset"]["crop_size"]
    title = f"{what}, {args.cfg}, batch {clips}, {frames} x {size} x {size}, {machine(device)['device']}"
    print(f"{title}, torch {torch.__version__}\n")
    print(table(COLUMNS, [_cells(row) for row in figures]))
    print(f"\n{LEGEND}")
    named = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in ceilings.items())
    print(f"measured here: matrix products {named}; copy {bandwidth / 1e9:.3g} GB/s")
    print(f"counted: {flops / clips / 1e9:.4g} GFLOP per clip")
    for line in left_out:
        print(line)
    kernels, host = [], []
    if args.top_kernels:
        kernels = (rows[-1].kernels or kernel_times(rows[-1].run, device))[: args.top_kernels]
        host = host_times(rows[-1].run, device)[: args.top_kernels] if device.type == "cuda" else []
    for where, slowest in (("kernels", kernels), ("host", host)):
        for one in slowest:
            print(f"{where:8}{one['ms']:8.2f} ms  {one['calls']:6.0f} calls  {one['name'][:100]}")
    if args.json:
        report = {"what": what, "cfg": args.cfg, "batch_size": clips, "frames": frames, "crop": size, **machine(device)}
        report |= {"flops_a_step": flops, "ceilings_flops": ceilings, "copy_bytes_per_s": bandwidth}
        write_json(args.json, report | {"rows": figures, "left_out": left_out, "kernels": kernels, "host": host})
    if args.png:
        names, speeds = [row["variant"] for row in figures], [row["clips_per_s"] for row in figures]
        bar_chart(args.png, title, names, speeds, "clips/s")


def _cells(row: dict) -> list[str]:
    def optional(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    spread = f"{min(row['ms_rounds']):.1f}-{max(row['ms_rounds']):.1f}"
    return [
        row["variant"],
        f"{row['ms']:.1f}",
        spread,
        f"{row['clips_per_s']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['tflops']:.3g}",
        f"{row['of_ceiling']:.0%}",
        optional(row["gb_moved"], ".2f"),
        optional(row["of_copy"], ".0%"),
        optional(row["peak_gb"], ".2f"),
        f"{row['first_step_s']:.1f}",
        optional(row["host_ms"], ".1f"),
        optional(row["kernel_ms"], ".1f"),
    ]


def seconds_of(run: Run, device: torch.device) -> float:
    """Seconds of one call."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def allocated(device: torch.device) -> int:
    """Bytes in use on a GPU; 0 on a CPU, whose allocator does not report them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def held(device: torch.device) -> int:
    """Bytes held between calls: those in use, and what CUDA graphs keep unused in memory pools of their own."""
    if device.type != "cuda":
        return 0
    pools = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return allocated(device) + sum(segment["total_size"] - segment["allocated_size"] for segment in pools)


def _peak(row: Row, device: torch.device) -> float | None:
    """Peak memory of a call in GB, counting only this variant."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = allocated(device)
    row.run()
    return (torch.cuda.max_memory_allocated(device) - before + row.static) / 1e9
