"""Shared by the benchmarks: timing in turns, counting operations and bytes, the machine's ceilings, tables, charts."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import matplotlib
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from utils.files import write_whole
from utils.pictures import save_picture

Run = Callable[[], object]


@dataclass
class Timing:
    """Seconds per step of one variant, one number per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def time_in_turns(runs: Sequence[Run], steps: int, rounds: int, device: torch.device) -> list[Timing]:
    """Time `steps` calls of each run, round after round, so that a slow phase of the machine affects all alike.

    Each run is called once, untimed, before the first round and before each of its turns, so that what the previous run
    left in caches and in the allocator does not count. On a GPU the host waits only at the beginning and end of a turn.
    """
    for run in runs:
        run()
    timings = [Timing([]) for _ in runs]
    for _ in range(rounds):
        for run, timing in zip(runs, timings, strict=True):
            run()
            wait(device)
            start = time.perf_counter()
            for _ in range(steps):
                run()
            wait(device)
            timing.rounds.append((time.perf_counter() - start) / steps)
    return timings


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(run: Run) -> int:
    """Floating-point operations of convolutions and matrix products in one call (a multiply-add is two)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


FREE = ("empty", "_unsafe_view")  # operators with these in their names move nothing
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")  # these do not read what they write
LOOKS_UP = ("index", "index_select", "gather", "embedding")  # these read no more of their first input than they return
SETS_ROWS = ("index_copy_", "index_put_", "_index_put_impl_", "scatter_")  # these write no more than they are given
ROWS = ("source", "values", "src")  # names of the arguments with the given rows


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes that operators move: each reads its inputs once and writes its outputs once.

    Views and allocations cost nothing; looking up or setting rows of a large tensor costs only these rows. This is the
    minimum for unfused operators: caches save some of it, and what a kernel reads twice is extra.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and not any(name in func.__name__ for name in FREE):
            self.bytes += _bytes_moved(func, args, kwargs, result)
        return result


def _bytes_moved(func: Callable, args: tuple, kwargs: dict, result: object) -> int:
    name, arguments, returns = func.__name__.partition(".")[0], func._schema.arguments, func._schema.returns
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    sizes = {key: _nbytes(value) for key, value in given.items()}
    if name in SETS_ROWS:
        rows = sum(sizes.get(key, 0) for key in ROWS)
        return sum(sizes.values()) - sizes["self"] + (2 * rows if given.get("accumulate") else rows)
    if name in LOOKS_UP:
        sizes[arguments[0].name] = _nbytes(result)
    changed = [argument for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
    written = sum(
        sizes.get(argument.name, 0) for argument in changed if argument.name != "grads"
    )  # of fused optimizers
    unread = {argument.name for argument in changed if argument.is_out or name in OVERWRITES}
    made = zip(returns, [result] if len(returns) == 1 else result or (), strict=True)
    new = sum(_nbytes(value) for returned, value in made if returned.alias_info is None)
    return sum(size for key, size in sizes.items() if key not in unread) + written + new


def _nbytes(values: object) -> int:
    return sum(x.nbytes for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def count_bytes(run: Run) -> int:
    """Bytes that one call moves, by `ByteCounter`."""
    with ByteCounter() as counter:
        run()
    return counter.bytes


class CollectiveCounter(TorchDispatchMode):
    """Counts, by kind, the collective calls of this process and the bytes passed to them.

    `wire` is the minimum that it must send: with W processes, 2 (W - 1) / W of an all-reduce's bytes, and (W - 1) / W
    of the output of an all-gather or an all-to-all.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.calls: dict[str, int] = {}
        self.payload: dict[str, int] = {}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func.namespace == "c10d":
            kind = func.__name__.split(".")[0].strip("_")
            first = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]  # what it writes
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self.payload[kind] = self.payload.get(kind, 0) + sum(x.nbytes for x in first)
        return func(*args, **(kwargs or {}))

    @property
    def wire(self) -> float:
        share = (self.world_size - 1) / self.world_size
        return sum(share * (2 if kind.startswith("allreduce") else 1) * n for kind, n in self.payload.items())


def matrix_ceiling(device: torch.device, precision: str, seconds: float = 0.5) -> float:
    """The highest FLOP/s of square matrix products in a precision (fp32, tf32, bf16, fp16) on this device."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return 2 * size**3 / _fastest(lambda: a @ b, device, seconds)


def copy_bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second of a large copy on the device, counting reads and writes."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, seconds)


def _fastest(run: Run, device: torch.device, seconds: float) -> float:
    """Time of the fastest of at least five calls, repeated for about `seconds`."""
    run()
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < deadline:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def queueing_seconds(run: Run, device: torch.device, calls: int = 5) -> float:
    """Median seconds until a call returns that begins on an idle device: what the host takes to queue its work."""
    times = []
    for _ in range(calls):
        wait(device)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    wait(device)
    return statistics.median(times)


def kernel_times(run: Run, device: torch.device, steps: int = 3) -> list[dict]:
    """A GPU's kernels, most time first: `name`, `ms` per step, `calls` per step. On a CPU as `host_times`."""
    return _profiled(run, device, steps, of_gpu=True) if device.type == "cuda" else host_times(run, device, steps)


def host_times(run: Run, device: torch.device, steps: int = 3) -> list[dict]:
    """The host's operators and calls of the driver, most self time first, as `kernel_times`. Profiling slows them."""
    return _profiled(run, device, steps, of_gpu=False)


def _profiled(run: Run, device: torch.device, steps: int, of_gpu: bool) -> list[dict]:
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA] * (device.type == "cuda") + [kinds.CPU] * (not of_gpu)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            run()
        wait(device)
    events = profile.key_averages()
    times = [
        (e.key, e.self_device_time_total if of_gpu else e.self_cpu_time_total, e.count)
        for e in events
        if not e.is_user_annotation
    ]
    times.sort(key=lambda kernel: -kernel[1])
    return [{"name": name, "ms": us / 1e3 / steps, "calls": calls / steps} for name, us, calls in times]


def machine(device: torch.device) -> dict:
    """Describe the machine: device name, threads, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({_processor()}), {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows of text under column headers, the first column aligned left, the others right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(columns), "  ".join("-" * w for w in widths), *map(line, rows)])


def bar_chart(file: str | Path, title: str, names: Sequence[str], values: Sequence[float], unit: str) -> None:
    """Draw horizontal bars, the first on top, each with its value and its ratio to the first."""
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.45 * len(names)), layout="constrained")
    bars = axes.barh(range(len(names)), values, color=["#9aa5b1", *["#2f6f9f"] * (len(names) - 1)])
    labels = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values]
    axes.bar_label(bars, [f"{n}  ({v / values[0]:.2f}x)" for n, v in zip(labels, values, strict=True)], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.3)
    axes.set_xlabel(unit)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, file, dpi=120)
    plt.close(figure)


def write_json(file: str | Path, report: dict) -> None:
    """Write the report as JSON; dataclasses as dicts, paths as text."""

    def plain(value: object) -> object:
        return asdict(value) if is_dataclass(value) else str(value)

    write_whole(Path(file), json.dumps(report, indent=1, default=plain) + "\n")
