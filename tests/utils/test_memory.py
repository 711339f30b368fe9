"""utils.memory: freed memory stays with a training process, and its data workers give theirs back."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from datasets.video_dataset import make_loader
from utils.memory import default_device, keep_freed_memory

PIECES, PIECE = 8, 40  # MB
STATUS_FILE = Path("/proc/self/status")


def resident_mb() -> float:
    """Memory of this process alone, in MB: not what it shares with others."""
    lines = STATUS_FILE.read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def left_behind() -> float:
    """How many MB more this process holds after tensors of 320 MB came and went."""
    before = resident_mb()
    tensors = [torch.ones(PIECE * 250_000) for _ in range(PIECES)]
    del tensors
    return resident_mb() - before


class Measure(Dataset):
    """One sample: what a function answers."""

    def __init__(self, function: Callable[[], float]) -> None:
        self.function = function

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        return self.function()


def in_worker(function: Callable[[], float]) -> float:
    """What a function answers in a data worker of this process."""
    return next(iter(make_loader(Measure(function), 1, collate_fn=sum)))


def answers(code: str) -> list[float]:
    """What the code prints, run in a process of its own: the setting is the process'."""
    code = f"from tests.utils.test_memory import *\n{code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(line) for line in run.stdout.split()]


needs_glibc = pytest.mark.skipif(
    not (keep_freed_memory(False) and STATUS_FILE.exists()), reason="no mallopt in this C library, or no /proc"
)


@needs_glibc
def test_freed_memory_is_kept_and_given_back():
    given, kept = answers("print(left_behind())\nprint(keep_freed_memory() and left_behind())")
    assert given < 0.2 * PIECES * PIECE
    assert kept > 0.8 * PIECES * PIECE


@needs_glibc
@pytest.mark.skipif(torch.cuda.is_available(), reason="the default device is a GPU here")
def test_a_run_on_a_cpu_keeps_its_own_and_not_its_workers():
    (workers,) = answers("default_device()\nprint(in_worker(left_behind))")
    assert workers < 0.2 * PIECES * PIECE
    own, held, workers = answers("default_device()\nprint(left_behind(), resident_mb(), in_worker(resident_mb))")
    assert own > 0.8 * PIECES * PIECE
    assert workers < held - 0.8 * PIECES * PIECE


def test_an_older_glibc_takes_the_most_that_it_accepts(monkeypatch):
    """Where every size is refused, nothing is set."""
    for most, expected in ((32 << 20, [(-3, 32 << 20), (-1, -1)]), (0, [])):
        accepted = []

        def mallopt(parameter, value, most=most, accepted=accepted):
            taken = parameter != -3 or value <= most
            accepted += [(parameter, value)] * taken
            return int(taken)

        monkeypatch.setattr("ctypes.CDLL", lambda name, mallopt=mallopt: SimpleNamespace(mallopt=mallopt))
        assert keep_freed_memory() is bool(expected) and accepted == expected


def test_the_default_device_is_the_gpu_if_there_is_one():
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(False)
