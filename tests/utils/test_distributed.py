"""utils.distributed: which processes a command line and an environment ask for."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from datasets import _workers
from tests.tiny import ENV, TORCHRUN, Started, wait_until, write_config
from utils import distributed
from utils.cli import pretraining_parser
from utils.distributed import _first_host, _run_one, _tasks_on_node, plan_processes, rank
from utils.errors import UserError

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
SLURM_NODE = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """No launcher's variables, and no GPU unless a test says so."""
    for name in LAUNCHERS + SLURM + SLURM_NODE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def options(*words) -> argparse.Namespace:
    return pretraining_parser("").parse_args(["cfg.yaml", *words])


def test_nothing_set_is_one_process():
    assert plan_processes(options()) is None
    assert plan_processes(options("--world-size", "1", "--rank", "0")) is None


def test_dashes_and_underscores_are_the_same():
    words = ("--world_size", "2", "--rank", "1", "--dist_url", "tcp://a:1", "--multiprocessing_distributed")
    assert options(*words) == options(*(word.replace("_", "-") for word in words))
    assert options("--distributed").distributed and options("--dist_backend", "gloo").dist_backend == "gloo"


def test_one_node():
    plan = plan_processes(options("--distributed", "--nproc", "3"))
    assert (plan.world_size, plan.first_rank, plan.local, plan.backend) == (3, 0, 3, "gloo")
    assert plan.url.startswith("tcp://127.0.0.1:")
    assert plan_processes(options("--distributed")).local == 1


def test_several_nodes(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    words = ("--distributed", "--world-size", "4", "--rank", "2", "--dist-url", "tcp://first:5000")
    plan = plan_processes(options(*words))
    assert (plan.world_size, plan.first_rank, plan.local, plan.here, plan.backend) == (32, 16, 8, 8, "nccl")
    assert plan.url == "tcp://first:5000"
    plan = plan_processes(options(*words[1:]))  # a process started by hand on each node
    assert (plan.world_size, plan.first_rank, plan.local, plan.here) == (4, 2, None, 1)


def test_torchrun(monkeypatch):
    for name, value in zip(LAUNCHERS, ("5", "8", "1", "host", "1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    plan = plan_processes(options())
    assert (plan.world_size, plan.first_rank, plan.local, plan.here) == (8, 5, None, 4)
    assert (plan.local_rank, plan.url) == (1, "env://")
    with pytest.raises(UserError, match="torchrun started 8"):
        plan_processes(options("--world-size", "2"))
    for words in (("--gpu", "0"), ("--nproc", "4"), ("--rank", "0"), ("--dist-url", "tcp://a:1")):
        for more in ((), ("--distributed",), ("--world-size", "8")):
            with pytest.raises(UserError, match=" ".join(words)):
                plan_processes(options(*words, *more))
    assert plan_processes(options("--distributed", "--world-size", "8")) == plan


def test_a_launcher_that_starts_more_processes_than_gpus(monkeypatch):
    def on_gpus(count, *words):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        return plan_processes(options(*words)).here

    def check(launcher):
        with pytest.raises(UserError, match=f"{launcher} started 4 processes on this node, but 2 GPUs are visible"):
            on_gpus(2)
        assert on_gpus(2, "--dist-backend", "gloo") == on_gpus(4) == on_gpus(0) == 4
        assert on_gpus(1) == 4  # each process sees its own alone

    with monkeypatch.context() as torchrun:
        for name, value in zip(LAUNCHERS, ("5", "8", "1", "host", "1", "4"), strict=True):
            torchrun.setenv(name, value)
        check("torchrun")
    for name, value in zip((*SLURM, *SLURM_NODE), ("5", "1", "8", "gpu[1-2]", "1", "4(x2)", "1"), strict=True):
        monkeypatch.setenv(name, value)
    check("Slurm")


def test_slurm(monkeypatch):
    for name, value in zip(SLURM, ("5", "1", "8", "gpu[007-010,12]", "1234567"), strict=True):
        monkeypatch.setenv(name, value)
    plan = plan_processes(options())
    assert (plan.world_size, plan.first_rank, plan.local, plan.local_rank) == (8, 5, None, 1)
    assert plan.url == "tcp://gpu007:34567"
    for name, value in zip(SLURM_NODE, ("2(x3),3", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert plan_processes(options()).here == 3
    assert plan_processes(options("--distributed")) == plan_processes(options())  # a process a task, as under torchrun
    for words in (("--gpu", "0"), ("--rank", "2"), ("--nproc", "3"), ("--nproc", "3", "--distributed")):
        with pytest.raises(UserError, match=" ".join(words[:2])):
            plan_processes(options(*words))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x8)")
    plan = plan_processes(options("--distributed", "--nproc", "4"))  # a task a node, which starts four
    assert (plan.world_size, plan.first_rank, plan.local, plan.here) == (32, 20, 4, 4)
    assert plan.url == "tcp://gpu007:34567"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a batch script: the options decide
    assert plan_processes(options()) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node1", "node1"), ("a[3-5]", "a3"), ("a[003,7],b2", "a003"), ("a,b[1-2]", "a"), ("r[1-2]x", "r1x")]
    + [("rack[1-2]n[3-4]", "rack1n3"), ("r[01,3]n[4-6,9]-ib,x[1-2]", "r01n4-ib"), ("a[2-3]b,c[1-2]", "a2b")],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert _first_host(nodes) == host


def test_a_slurm_list_without_a_host():
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST='': names no host"):
        _first_host("")


@pytest.mark.parametrize(
    ("tasks", "node", "count"), [("8(x4)", 3, 8), ("8(x3),4", 2, 8), ("8(x3),4", 3, 4), ("2,1", 1, 1), ("", 0, 1)]
)
def test_tasks_on_a_node_of_a_slurm_list(tasks, node, count):
    assert _tasks_on_node(tasks, node) == count


def _count_workers(device, folder: Path) -> None:
    (folder / f"{rank()}").write_text(str(_workers({"num_workers": 64})))


def _rank_of_two_nodes(own_rank: int, folder: Path) -> None:
    words = ("--distributed", "--nproc", "2", "--world-size", "2", "--rank", own_rank // 2)
    plan = plan_processes(options(*map(str, words), "--dist-url", f"file://{folder}/store"))
    _run_one(plan, own_rank, own_rank % 2, _count_workers, (folder,))


def test_a_node_s_workers_are_shared_by_its_own_processes_alone(tmp_path, monkeypatch, run_ranks):
    """Two nodes of two processes: each gets half of its node's 64, not a quarter."""
    run_ranks(_rank_of_two_nodes, 4, tmp_path)
    assert [(tmp_path / f"{r}").read_text() for r in range(4)] == ["32"] * 4


class _SlowStore(dist.Store):
    """A store that answers late, so that its rank is still connecting when the others have done so."""

    def __init__(self, store: dist.Store):
        super().__init__()
        self.store = store

    def set(self, key, value):
        self.store.set(key, value)

    def wait(self, keys, *timeout):
        self.store.wait(keys, *timeout)

    def get(self, key):
        time.sleep(0.05)
        return self.store.get(key)


def _end_at_once(own_rank: int, folder: Path) -> None:
    if own_rank == 0:
        in_time = distributed._clean_store
        distributed._clean_store = lambda *args: _SlowStore(in_time(*args))
    for group in range(12):  # which of two connects to the other hangs on their ports, and what is lost on that
        url = f"file://{folder}/store{group}"
        plan = plan_processes(options("--distributed", "--nproc", "3", "--dist-url", url))
        _run_one(plan, own_rank, own_rank, str, ())


def test_ranks_that_end_at_once_do_not_break_the_connecting_of_a_slow_one(tmp_path, run_ranks):
    """gloo takes a peer that is gone for one that crashed, even if it had nothing left to do."""
    run_ranks(_end_at_once, 3, tmp_path)


@pytest.mark.parametrize("seed", ["-1", "1.5", str(2**63), "x"])
def test_seeds_that_are_none(seed, capsys):
    with pytest.raises(SystemExit) as end:
        options("--seed", seed)
    assert end.value.code == 2 and f"found {seed}" in capsys.readouterr().err
    assert options("--seed", str(2**63 - 1)).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--world-size", "0"), "expected 1 or more"),
        (("--distributed", "--nproc", "0"), "expected 1 or more"),
        (("--world-size", "2", "--dist-url", "tcp://a:1"), "--rank None: with --world-size 2 expected 0 to 1"),
        (("--world-size", "2", "--rank", "2", "--dist-url", "tcp://a:1"), "--rank 2"),
        (("--world-size", "2", "--rank", "0"), "--dist-url"),
        (("--dist-backend", "nccl"), "needs GPUs"),
        (("--distributed", "--gpu", "1"), "--gpu 1"),
        (("--nproc", "3"), "--nproc 3: is for several processes; add --distributed"),
        (("--nproc", "3", "--world-size", "1"), "--nproc 3: is for several processes; add --distributed"),
        (("--nproc", "3", "--world-size", "2", "--rank", "0", "--dist-url", "tcp://h:1"), "--nproc 3: is for several"),
        (("--rank", "5", "--world-size", "1"), "--rank 5: is for several processes"),
        (("--rank", "7"), "--rank 7: is for several processes"),
        (("--dist-url", "tcp://a:1"), "--dist-url tcp://a:1: is for several processes"),
        (("--distributed", "--dist-url", "tcp://:1234"), "--dist-url tcp://:1234: expected tcp://HOST:PORT"),
        (("--distributed", "--dist-url", "tcp://:1?x"), "--dist-url tcp://:1.x: expected tcp://HOST:PORT"),
        (("--distributed", "--dist-url", "tcp://node1"), "--dist-url tcp://node1: expected tcp://HOST:PORT"),
    ],
)
def test_options_that_do_not_fit(words, message):
    with pytest.raises(UserError, match=message):
        plan_processes(options(*words))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE.* found 'two'"),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "a"},
            "SLURM_LOCALID.* found nothing",
        ),
    ],
)
def test_a_launcher_s_variables_that_are_no_numbers(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        plan_processes(options())


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="one process a GPU"):
        plan_processes(options("--distributed", "--nproc", "2"))
    assert plan_processes(options("--distributed", "--nproc", "2", "--dist-backend", "gloo")).local == 2


DIES_ONCE = """
import os, signal, sys, time
import torch
from utils.cli import pretraining_parser
from utils.distributed import all_reduce_sum, launch, rank

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def worker(device):
    if attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    total = all_reduce_sum(torch.tensor(rank() + 1)).item()
    sys.stdout.write(f"rank {rank()}: sum {total}\\n")  # in one piece, which print does not do

if attempt == 1 and os.environ["RANK"] == "0":
    time.sleep(2)  # rank 1 is there first, and finds in torchrun's store what the dead rank 0 wrote
launch(worker, pretraining_parser("").parse_args(["any.yaml"]))
"""


def test_processes_that_torchrun_starts_again_find_each_other(tmp_path):
    """torchrun keeps its store, and the addresses of the dead ranks in it (pytorch#135712)."""
    file = tmp_path / "dies_once.py"
    file.write_text(DIES_ONCE)
    command = [sys.executable, *TORCHRUN, "--max-restarts=1", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0: sum 3", "rank 1: sum 3"]


WAITS = """
import os, sys, time
from pathlib import Path
from utils.cli import pretraining_parser
from utils.distributed import launch, rank

def worker(device):
    Path(__file__).with_name(f"pid{rank()}").write_text(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    launch(worker, pretraining_parser("").parse_args(["any.yaml", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that the one which started it died")
def test_ranks_end_with_their_torchrun(tmp_path):
    ranks_end_after(tmp_path, signal.SIGKILL, launcher=TORCHRUN)


def test_an_interrupt_of_the_launcher_alone_ends_its_ranks(tmp_path):
    ranks_end_after(tmp_path, signal.SIGINT, "--distributed", "--nproc", "2")


def test_an_interrupt_ends_a_rank_that_waits_for_the_others(tmp_path, videos):
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)  # of a rank 0 that never answers
    address = f"tcp://127.0.0.1:{store.port}"
    waiting = Started(write_config(tmp_path, videos), "--world-size", 2, "--rank", 1, "--dist-url", address)
    wait_until(lambda: store.check(["question/1"]))
    assert waiting.running
    waiting.signal(signal.SIGINT)
    assert waiting.wait(20).returncode in (-signal.SIGINT, 130)


STARTS_SLOWLY = """
import time
from pathlib import Path

if __name__ == "__mp_main__":  # a rank that still imports
    Path(__file__).with_name("started").touch()
    time.sleep(100)

from utils.cli import pretraining_parser, run_script
from utils.distributed import launch

def main():
    launch(print, pretraining_parser("").parse_args(["any.yaml", "--distributed", "--nproc", "2"]))

if __name__ == "__main__":
    run_script(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_before_the_first_step_is_no_failure(tmp_path, number, send):
    file = tmp_path / "starts_slowly.py"
    file.write_text(STARTS_SLOWLY)
    started = Started(launcher=(str(file),))
    wait_until((tmp_path / "started").exists)
    started.signal(number, send)
    ended = started.wait(60)
    assert ended.returncode == 75, ended.stderr
    assert f"preempted: stopped by {number.name} before the first step; run it again to go on" in ended.stderr


def ranks_end_after(folder, number, *options, launcher=()):
    """Start two ranks that wait, send a signal to the process that started them, and see them end."""
    (folder / "waits.py").write_text(WAITS)
    files = [folder / f"pid{own_rank}" for own_rank in range(2)]
    command = [sys.executable, *launcher, str(folder / "waits.py"), *options]

    def heed_interrupts():  # which a shell tells what it starts in the background to ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts) as process:
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        process.send_signal(number)
        wait_until(lambda: not any(Path("/proc", file.read_text(), "cmdline").exists() for file in files))
