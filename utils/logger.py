"""Logging of a run: the log, progress lines, metrics for TensorBoard and metrics.jsonl, and provenance."""

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml

from utils.config import run_folder
from utils.distributed import is_main, rank, world_size
from utils.errors import UserError
from utils.files import lock, write_whole
from utils.metrics import collapse_warning

log = logging.getLogger("avssrl")

LOG = "train.log"
"""A run's log file; its writer holds a lock on it."""


def setup_logging(folder: Path, quiet: bool, alone: bool = True) -> None:
    """Send the log of rank 0 to the console (unless `quiet`) and to `<folder>/train.log`.

    Other ranks log only warnings, to the console or, with `quiet`, to that file.

    Raises:
        UserError: with `alone`, another process already writes to this folder.
    """
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False
    who = "" if is_main() else f"[rank {rank()}] "
    handlers: list[logging.Handler] = []
    if is_main() or quiet:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / LOG, encoding="utf-8", errors="surrogateescape"))
        if is_main() and alone:
            try:
                lock(handlers[0].stream, folder)
            except UserError:
                handlers[0].close()  # not ours to write to
                raise
    if not quiet:
        handlers.append(logging.StreamHandler(sys.stdout if is_main() else sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def is_quiet() -> bool:
    """Whether `setup_logging` was called with `quiet`: nothing may be written to the console."""
    return bool(log.handlers) and not any(type(handler) is logging.StreamHandler for handler in log.handlers)


def stage(title: str) -> None:
    """Log a line that marks the beginning of a stage of the run."""
    log.info("---- %s %s", title, "-" * (70 - len(title)))


def start_run(config: Mapping, quiet: bool, folder: Path | None = None) -> Path:
    """Open the run's folder (default: `<model_dir>/<name>`), set up logging, and record the run's provenance.

    Rank 0 appends a line for each start to `runs.jsonl`.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = folder or run_folder(config)
    try:
        setup_logging(folder, quiet, alone=not config.get("test_only", False))
        stage("Run")
        if is_main():
            record = provenance()
            with (folder / "runs.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            log.info("%s", record["command"])
            log.info("git %s, python %s, torch %s", record["git"], record["python"], record["torch"])
            log.info("%s, %d processes; output in %s", record["device"], world_size(), folder)
    except OSError as error:
        raise UserError(f"model.model_dir: {folder}: cannot be written: {error}") from None
    return folder


def write_config(folder: Path, config: Mapping) -> None:
    """Write the resolved configuration to `<folder>/config.yaml` on rank 0; call it after checking any stored run."""
    if is_main():
        write_whole(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def provenance() -> dict:
    """The command, versions, git revision and machine of this process."""
    import av
    import numpy

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "folder": os.getcwd(),
        "git": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
        "numpy": numpy.__version__,
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "world_size": world_size(),
    }


def git_revision() -> str:
    """The commit of the source tree, with `+changes` if files differ from it; `unknown` outside git."""
    source = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(["git", *command], cwd=source, capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answers[0].strip() + ("+changes" if answers[1].strip() else "")


class MetricsWriter:
    """Writes rank 0's metrics to TensorBoard and to `metrics.jsonl`, one JSON object per line.

    `resume_step` is the step that the run resumes from. Lines of later steps, written by a run that was killed before
    its next checkpoint, are dropped, so that the files look like an uninterrupted run. None keeps all lines, including
    those that a killed run will write again.

    Raises:
        UserError: metrics could not be written.
    """

    def __init__(self, folder: Path, resume_step: int | None = 0) -> None:
        self._path = folder / "metrics.jsonl"
        self._kept: list[str] = []
        if not is_main():
            return
        from torch.utils.tensorboard import SummaryWriter

        lines = self._path.read_text().splitlines() if self._path.exists() else []
        last = math.inf if resume_step is None else resume_step
        self._kept = kept = [line for line in lines if _step_of(line) <= last] if resume_step != 0 else []
        if kept != lines:
            write_whole(self._path, "".join(line + "\n" for line in kept))
        purge = resume_step + 1 if resume_step else resume_step
        self._board = SummaryWriter(folder / "tensorboard", purge_step=purge)

    def write(self, group: str, step: int, figures: Mapping[str, float]) -> None:
        """Write metrics of a group (`train`, `retrieval`, ...) after the run's `step`-th step."""
        if not is_main():
            return
        for name, value in figures.items():
            self._board.add_scalar(f"{group}/{name}", value, step)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"group": group, "step": step, **figures}) + "\n")
        except OSError as error:
            raise UserError(f"{self._path}: could not be written: {error}") from None

    def wrote(self, group: str, step: int) -> bool:
        """Whether an earlier start of the run wrote metrics of this group at this step; valid on rank 0."""
        return any((record["group"], record["step"]) == (group, step) for record in map(json.loads, self._kept))

    def close(self) -> None:
        """Flush to disk."""
        if is_main():
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a partial line from a killed run
        return math.nan


def read_metrics(folder: str | Path, group: str) -> list[dict]:
    """The lines of one group in a run's `metrics.jsonl`, except for a partial last line left by a kill.

    Raises:
        UserError: there is no such file.
    """
    file = Path(folder) / "metrics.jsonl"
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{file}: no such metrics; start the run first") from None
    whole = lines if not lines or lines[-1].endswith("}") else lines[:-1]
    return [record for record in map(json.loads, whole) if record["group"] == group]


class StepClock:
    """Timing of a training loop: clips per second and the fraction of time spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new measurement."""
        self._start = time.perf_counter()
        self._waited, self._clips = 0.0, 0

    def timed(self, batches: Iterable) -> Iterable:
        """Iterate over `batches`, recording the time spent waiting for each."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    def count(self, clips: int) -> None:
        """Count clips that were trained on, over all processes."""
        self._clips += clips

    def read(self) -> dict[str, float]:
        """`clips_per_s` and `wait_share` (0 to 1) since the last restart."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {"clips_per_s": self._clips / seconds, "wait_share": self._waited / seconds}


def duration(seconds: float) -> str:
    """Format seconds for people: `48 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def parameter_summary(model: torch.nn.Module) -> str:
    """One-line summary of a model: its parts and their parameter counts in millions."""
    parts = [f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for name, part in model.named_children()]
    total = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}: {total:.2f} M parameters ({', '.join(parts)})"


class TrainingLog:
    """Reports training progress: a progress line, the same figures as metrics, and a warning on collapse.

    Args:
        writer: for the metrics.
        num_epochs, steps: epochs of the run, and steps per epoch.
        batch_size: clips per step, over all processes.
    """

    def __init__(self, writer: MetricsWriter, num_epochs: int, steps: int, batch_size: int) -> None:
        self.writer, self.num_epochs, self.steps, self.batch_size = writer, num_epochs, steps, batch_size

    def report(self, epoch: int, steps_done: int, figures: Mapping[str, float]) -> None:
        """Report the figures of the last steps, `steps_done` into `epoch` (from 0); no loss if all were skipped.

        The metrics get all figures, the progress line only those worth watching.
        """
        steps_left = (self.num_epochs - epoch) * self.steps - steps_done
        left = duration(steps_left * self.batch_size / max(figures["clips_per_s"], 1e-9))
        unseen = ("grad_norm", "video_dims", "audio_dims")
        shown = in_words({name: value for name, value in figures.items() if name not in unseen})
        place = f"epoch {epoch + 1}/{self.num_epochs} step {steps_done}/{self.steps}"
        log.info("%s | %s left | %s", place, left, shown)
        figures = {"epoch": epoch, **figures, "memory_gb": memory_gb()}
        self.writer.write("train", epoch * self.steps + steps_done, figures)
        if "loss" in figures and (warning := collapse_warning(figures)) is not None:
            log.warning("%s", warning)


def in_words(figures: Mapping[str, float]) -> str:
    """Format figures in one line: `loss 1.234, lr 1.00e-03, clips_per_s 25.1`."""
    forms = {"lr": ".2e", "clips_per_s": ".1f", "wait_share": ".0%"}
    return ", ".join(f"{name} {value:{forms.get(name, '.3f')}}" for name, value in figures.items())


def percentages(figures: Mapping[str, float]) -> str:
    """Format figures in percent in one line: `v2a_R@1 3.1, v2a_R@5 12.5`."""
    return ", ".join(f"{name} {value:.1f}" for name, value in figures.items())


def memory_gb() -> float:
    """Peak memory of this process in GB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
