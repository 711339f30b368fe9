"""Break a run in the ways that happen on shared clusters, and report the outcome.

    python3 -m tests.faults [WORD ...]

Prints a Markdown table: the fault, what happened, and the seconds from the fault to the end of the run. Each run is
then started again; "nothing lost" means that it ended with the weights, optimizer and memory bank of an undisturbed
run, bit for bit.
"""

import argparse
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import _make_video
from tests.tiny import ENV, EVERY_STEP, REPO, TORCHRUN, children, command, differences, run, write_config
from utils import checkpoint

TWO = ("--distributed", "--nproc", 2)
NAN_IN_STEP_3 = """
import runpy, sys
from datasets.preprocessing import BatchPrep
plain, calls = BatchPrep.forward, []
def poisoned(self, batch):
    calls.append(1)
    video, audio = plain(self, batch)
    return (video * float("nan") if len(calls) == 3 else video), audio
BatchPrep.forward = poisoned
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Bench:
    """A folder of videos, and runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.videos = folder, folder / "videos"
        self.videos.mkdir()
        for i in range(10):
            _make_video(self.videos / f"clip{i}.mp4", seconds=1.6, fps=16, size=(64, 48))
        self.whole = {}
        for name, options in (("one", ()), ("two", TWO)):
            run(self.config(name), *options)
            self.whole[options] = self.state(name)

    def config(self, name: str, **changes: object) -> Path:
        return write_config(self.folder, self.videos, name, save_every_minutes=EVERY_STEP, **changes)

    def state(self, name: str) -> dict:
        return checkpoint.load(self.folder / "runs" / name / checkpoint.LATEST)

    def start(self, file: Path, *options: object, launcher: tuple = ()) -> subprocess.Popen:
        """Start a run and wait until it has saved its second step."""
        full = command(file, *options, launcher=launcher)
        process = subprocess.Popen(
            full, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        metrics = self.folder / "runs" / file.stem / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
            time.sleep(0.002)
        return process

    def again(self, file: Path, *options: object) -> str:
        """Start the run again; report whether it ended like an undisturbed one."""
        run(file, *options)
        lost = differences(self.state(file.stem), self.whole[options])
        return f"different: {', '.join(lost)}" if lost else "nothing lost"


def is_rank(pid: int) -> bool:
    """Whether a process is one that mp.spawn started, not the resource tracker."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def ended(process: subprocess.Popen, limit: float = 60) -> tuple[str, float]:
    """Wait for the end; return exit status with last line, and seconds taken. A hanging run is killed and reported."""
    start = time.monotonic()
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return "HANGS", limit
    lines = [line for line in output.splitlines() if line.startswith(("error:", "failed:", "preempted:"))]
    said = lines[-1] if lines else output.splitlines()[-1]
    return f"status {process.returncode}: `{said[:170]}`", time.monotonic() - start


def kill_rank(bench: Bench) -> tuple:
    file = bench.config("kill-rank")
    process = bench.start(file, *TWO)
    os.kill([pid for pid in children(process.pid) if is_rank(pid)][1], signal.SIGKILL)
    return *ended(process), bench.again(file, *TWO)


def kill_rank_torchrun(bench: Bench) -> tuple:
    file = bench.config("kill-torchrun")
    process = bench.start(file, launcher=(*TORCHRUN, "--max-restarts=2"))
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said, seconds = ended(process, 120)
    lost = differences(bench.state(file.stem), bench.whole[TWO])
    return said.split(": `")[0] + ", went on by itself", seconds, ", ".join(lost) or "nothing lost"


def kill_worker(bench: Bench) -> tuple:
    file = bench.config("kill-worker")
    process = bench.start(file)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    return *ended(process), bench.again(file)


def ask_to_stop(name: str, number: signal.Signals, send: Callable, *options: object) -> Callable:
    """A fault that sends a signal to one process or, with `send` os.killpg, to all processes of a run."""

    def fault(bench: Bench) -> tuple:
        file = bench.config(name)
        process = bench.start(file, *options)
        send(process.pid, number)
        return *ended(process), bench.again(file, *options)

    return fault


def full_disk(bench: Bench) -> tuple:
    file = bench.config("full-disk")
    process = bench.start(file)
    process.kill()
    process.wait()
    start = time.monotonic()
    limit = 2**20
    done = run(file, status=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return f"status 2: `{done.stderr.strip()[:170]}`", time.monotonic() - start, bench.again(file)


def damage(bench: Bench, name: str, change: Callable[[bytearray], bytes]) -> tuple:
    file = bench.config(name)
    process = bench.start(file)
    process.kill()
    process.wait()
    latest = bench.folder / "runs" / name / checkpoint.LATEST
    latest.write_bytes(change(bytearray(latest.read_bytes())))
    start = time.monotonic()
    said = next(line for line in run(file).stdout.splitlines() if "Going on from" in line)
    lost = differences(bench.state(name), bench.whole[()])
    said = said.replace(str(latest.parent) + "/", "")[9:]
    return f"`{said[:170]}`", time.monotonic() - start, ", ".join(lost) or "nothing lost"


def cut(bench: Bench) -> tuple:
    return damage(bench, "cut", lambda data: bytes(data[: len(data) // 2]))


def flip(bench: Bench) -> tuple:
    def change(data: bytearray) -> bytes:
        data[len(data) // 2] ^= 1
        return bytes(data)

    return damage(bench, "flip", change)


def nan_in_a_batch(bench: Bench) -> tuple:
    file = bench.config("nan")
    start = time.monotonic()
    done = run(file, launcher=("-c", NAN_IN_STEP_3), status=1)
    seconds = time.monotonic() - start
    report = next((bench.folder / "runs" / "nan").glob("nonfinite-*.json")).read_text()
    assert "clip" in report and '"step": 3' in report
    said = done.stderr.replace(str(bench.folder) + "/", "").strip().splitlines()[-1]
    return f"status 1: `{said[:170]}`", seconds, bench.again(file)


def missing_file(bench: Bench) -> tuple:
    file = bench.config("missing")
    process = bench.start(file)
    gone = bench.videos / "clip7.mp4"
    kept = gone.read_bytes()
    gone.unlink()
    try:
        _, seconds = ended(process)
    finally:
        gone.write_bytes(kept)
    rows = (bench.folder / "runs" / "missing" / "bad-videos.csv").read_text().splitlines()[1:]
    said = "; ".join(rows).replace(str(bench.folder) + "/", "")
    return f"status {process.returncode}, other clips in its place: `{said[:120]}`", seconds, "named and counted"


FAULTS = {
    "SIGKILL of one rank of two": kill_rank,
    "the same under `torchrun --max-restarts`": kill_rank_torchrun,
    "SIGKILL of a data worker": kill_worker,
    "SIGTERM in mid-epoch": ask_to_stop("term", signal.SIGTERM, os.kill),
    "SIGTERM to all processes of a run, as `timeout` sends it": ask_to_stop("term-all", signal.SIGTERM, os.killpg),
    "SIGUSR1 to all processes of two ranks, as Slurm sends it": ask_to_stop(
        "usr1-all", signal.SIGUSR1, os.killpg, *TWO
    ),
    "disk full while saving": full_disk,
    "latest checkpoint cut in half": cut,
    "a bit of the latest checkpoint flipped": flip,
    "NaN in one batch": nan_in_a_batch,
    "a file goes missing during the epoch": missing_file,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", metavar="WORD", nargs="*", help="only faults with one of these in their names; default: all"
    )
    words = parser.parse_args().words
    chosen = [name for name in FAULTS if not words or any(word in name for word in words)]
    if not chosen:
        parser.error(f"no fault has {' or '.join(words)} in its name; there are: {'; '.join(FAULTS)}")
    print("| fault | what happened | seconds | after the same command again |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(REPO)
        bench = Bench(Path(folder))
        for name in chosen:
            said, seconds, again = FAULTS[name](bench)
            print(f"| {name} | {said.replace(folder + '/', '')} | {seconds:.0f} | {again} |", flush=True)


if __name__ == "__main__":
    main()
