"""A run that trains in seconds on a CPU, for tests that start the scripts as a user does."""

import copy
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml

from utils.distributed import _free_port

REPO = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))  # PyAV may be on the second
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
EVERY_STEP = 1e-9  # minutes between checkpoints
LOSSES = {"main-ssl.py": {"name": "xID", "args": {"num_negatives": 6}}, "main-vicreg.py": {"name": "VICLoss"}}
HEADS = {"main-ssl.py": ("av_wrapper", "proj_dim"), "main-vicreg.py": ("vicreg_wrapper", "exp_dim")}


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() and not os.environ.get("AVSSRL_NEEDS_GPU"), reason="PyTorch finds no GPU"
)


def write_config(folder: Path, videos: Path, name: str = "tiny", script: str = "main-ssl.py", **changes) -> Path:
    """Write `<folder>/<name>.yaml`, for a run in `<folder>/runs/<name>`; `changes` are keys with __ for dots."""
    arch, dims = HEADS[script]
    cfg = {
        "num_workers": 1,
        "print_freq": 1,
        "save_every_minutes": 60,
        "max_bad_fraction": 0.2,
        "cache_dir": str(folder / "cache"),
        "dataset": {
            "name": "folder",
            "root": str(videos),
            "holdout_every": 5,
            "batch_size": 4,
            "video_clip_duration": 0.25,
            "video_fps": 16,
            "crop_size": 32,
            "transforms": "msc+color",
            "audio_clip_duration": 0.5,
            "spec_params": {"n_fft": 256, "hop_length": 128, "n_mels": 32},
            "train": {"split": "train", "use_augmentation": True, "drop_last": True, "clips_per_video": 2},
            "test": {"split": "test"},
        },
        "optimizer": {"num_epochs": 2, "lr": {"base_lr": 0.001, "milestones": [1], "gamma": 0.5}},
        "model": {
            "name": name,
            "model_dir": str(folder / "runs"),
            "arch": arch,
            "args": {dims: [32, 32, 16], "video_backbone_args": {"depth": 10}},
        },
        "loss": copy.deepcopy(LOSSES[script]),
    }
    for key, value in changes.items():
        section = cfg
        *parents, last = key.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(cfg))
    return file


def command(*arguments: object, script: str = "main-ssl.py", launcher: tuple = ()) -> list[str]:
    """The command line of a script."""
    return [sys.executable, *launcher, str(REPO / script), *map(str, arguments)]


def run(
    *arguments: object,
    script: str = "main-ssl.py",
    launcher: tuple = (),
    ranks: int = 1,
    status: int = 0,
    env: dict[str, str] = ENV,
    **options: object,
) -> subprocess.CompletedProcess:
    """Run a script to its end and assert its exit status; several `ranks` run as under torchrun.

    A new Python is started only if needed: for Python's options in `launcher`, `options` of subprocess.run, or another
    environment (forks of a process that has looked for CUDA cannot use it).
    """
    if options or env is not ENV or launcher and launcher[0].startswith("-"):
        full = command(*arguments, script=script, launcher=launcher)
        done = subprocess.run(full, capture_output=True, text=True, env=env, timeout=300, **options)
    else:
        done = Started(*arguments, script=script, launcher=launcher, ranks=ranks).wait()
    assert done.returncode == status, done.stdout + done.stderr
    return done


class Started:
    """A script in separate processes, each the leader of a process group, as a shell or torchrun starts it.

    They are forked from a process that has imported PyTorch, which saves the seconds that a new Python takes for it.
    """

    def __init__(
        self,
        *arguments: object,
        script: str = "main-ssl.py",
        launcher: tuple = (),
        ranks: int = 1,
    ) -> None:
        self.argv = command(*arguments, script=script, launcher=launcher)[1:]
        self.outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.processes = [self._start(env) for env in _environments(ranks)]

    def _start(self, env: dict[str, str]) -> BaseProcess:
        outputs = [reduction.DupFd(file.fileno()) for file in self.outputs]
        process = multiprocessing.get_context("forkserver").Process(target=_become, args=(self.argv, env, outputs))
        process.start()
        return process

    @property
    def running(self) -> bool:
        """Whether all its processes are still running."""
        return all(process.is_alive() for process in self.processes)

    def signal(self, number: int, send: Callable = os.kill) -> None:
        """Send a signal to each process, or to each group by `os.killpg`."""
        for process in self.processes:
            send(process.pid, number)

    def wait(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """Wait for all to end; return their output and exit status, which must be the same for all."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        late = any(process.is_alive() for process in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        out, err = map(_text, self.outputs)
        assert not late, f"still running after {seconds} s: {out}{err}"
        statuses = [process.exitcode for process in self.processes]
        assert len(set(statuses)) == 1, f"the ranks ended with {statuses}: {out}{err}"
        return subprocess.CompletedProcess(self.argv, statuses[0], out, err)


def _environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun sets it; for a single process, the plain one."""
    if ranks == 1:
        return [ENV]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    own = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{**ENV, **{name: str(value) for name, value in names.items()}} for names in own]


def _become(argv: list[str], env: dict[str, str], outputs: list) -> None:
    os.setsid()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.detach(), number)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv, sys.path[0:0] = argv, [str(REPO)]
    runpy.run_path(argv[0], run_name="__main__")


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `condition` holds because of another process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def interrupted(arguments: list, condition: Callable[[], object]) -> str:
    """Run a module, press Ctrl-C when `condition` holds, and return what it wrote to stderr."""
    command = [sys.executable, "-m", *map(str, arguments)]
    run = subprocess.Popen(command, cwd=REPO, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(condition)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all processes
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 130, told
    return told


def children(pid: int) -> list[int]:
    """The child processes of a process, from Linux's /proc."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


TRAINED = ("model", "optimizer", "train_criterion", "audio_stats", "bad_videos", "guard", "epoch", "step")


def differences(a: dict, b: dict, parts: tuple = TRAINED) -> list[str]:
    """The parts in which two states are not bit-identical."""
    return [part for part in parts if not _equal(a[part], b[part])]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
