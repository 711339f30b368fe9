"""Run damaged copies of real files through the decoder and `prepare`: none may crash, hang or go unreported.

    python3 -m tests.fuzz --root DIR [--count 1000] [--seed 0]

Each copy is read whole, read as a training clip, and prepared, by a worker process that is killed after
`--time-limit` seconds. It must be decoded, or reported with a reason. The exit status is 1 if any copy crashed, hung or
raised another error; those files are kept.
"""

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.decoding import DecodeError, VideoFile, read_clip
from datasets.folder import find
from datasets.transcode import transcode
from datasets.work_pool import run_jobs

DAMAGES = (
    "bits flipped",
    "bytes replaced",
    "cut",
    "a hole of zeros",
    "head of another file",
    "head replaced",
    "empty",
    "a text file",
    "another ending",
    "a named pipe",
    "a directory",
)
WEIGHTS = np.array([20, 20, 15, 10, 10, 10, 2, 2, 5, 2, 2], dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="a folder of real files")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="number of copies; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds per file")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for files that fail")
    args = parser.parse_args()
    files = sorted(args.root / name for name in find(args.root))
    if not files:
        sys.exit(f"error: {args.root}: holds no video")
    with tempfile.TemporaryDirectory() as folder:
        failures = fuzz(files, Path(folder), args.count, args.seed, args.workers, args.time_limit, args.keep)
    sys.exit(1 if failures else 0)


def fuzz(
    files: Sequence[Path], folder: Path, count: int, seed: int, workers: int, time_limit: float, keep: Path
) -> list[str]:
    """Damage files, try them, print a Markdown table of outcomes by damage; return a line per failure."""
    made, started = {}, time.monotonic()
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        damage = DAMAGES[rng.choice(len(DAMAGES), p=WEIGHTS / WEIGHTS.sum())]
        source, other = (files[k] for k in rng.integers(len(files), size=2))
        path = folder / f"{i:05d}{'.txt' if damage == 'another ending' else source.suffix}"
        make_damaged(path, source, other, damage, rng)
        made[path.name] = damage
    jobs = [(name, (folder / name,)) for name in made]
    outcomes = collections.defaultdict(collections.Counter)
    failures = []
    for name, outcome in run_jobs(jobs, workers, time_limit, do=attempt):
        if not isinstance(outcome, dict):
            failures.append(f"{made[name]}: {name}: {outcome}")
            outcome = {"all": "failed"}
            keep.mkdir(exist_ok=True)
            if (folder / name).is_file():
                shutil.copy(folder / name, keep)
        for what, how in outcome.items():
            outcomes[made[name]][what, how] += 1
    columns = [(what, how) for what in ("read whole", "read a clip", "prepare") for how in ("decoded", "named")]
    columns.append(("all", "failed"))
    print("| damage | files | " + " | ".join(f"{what}: {how}" for what, how in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    counts = collections.Counter(made.values())
    for damage in DAMAGES:
        if counts[damage]:
            cells = [str(outcomes[damage][column]) for column in columns]
            print(f"| {damage} | {counts[damage]} | " + " | ".join(cells) + " |")
    print(f"\n{count} files, {len(failures)} failures, {time.monotonic() - started:.0f} s")
    for line in failures:
        print(line)
    return failures


def make_damaged(path: Path, source: Path, other: Path, damage: str, rng: np.random.Generator) -> None:
    """Write a copy of `source` with this kind of damage."""
    if damage == "a named pipe":
        os.mkfifo(path)
        return
    if damage == "a directory":
        path.mkdir()
        return
    data = np.frombuffer(source.read_bytes(), np.uint8).copy()
    if damage in ("bits flipped", "bytes replaced"):
        at = rng.integers(len(data), size=int(10 ** rng.uniform(0, 3)))
        new = (
            data[at] ^ (1 << rng.integers(8, size=len(at)))
            if damage == "bits flipped"
            else rng.integers(256, size=len(at))
        )
        data[at] = new.astype(np.uint8)
    elif damage == "cut":
        data = data[: rng.integers(1, len(data))]
    elif damage == "a hole of zeros":
        begin = rng.integers(len(data))
        data[begin : begin + int(len(data) * rng.uniform(0.01, 0.5))] = 0
    elif damage == "head of another file":
        head = np.frombuffer(other.read_bytes(), np.uint8)[: rng.integers(16, 5000)]
        data[: len(head)] = head[: len(data)]
    elif damage == "head replaced":
        at = rng.integers(min(2000, len(data)), size=int(10 ** rng.uniform(0, 2)))  # where sizes and offsets are stored
        data[at] = rng.integers(256, size=len(at))
    elif damage == "empty":
        data = data[:0]
    elif damage == "a text file":
        data = np.frombuffer(b"This is no video.\n" * int(rng.integers(1, 1000)), np.uint8)
    path.write_bytes(data.tobytes())


def attempt(path: Path) -> dict[str, str]:
    """Read a file whole, read a clip of it, prepare it; return `decoded` or `named` for each."""
    target = path.with_name(f"{path.name}.prepared")
    tries = {
        "read whole": lambda: read_clip(path),
        "read a clip": lambda: _clip(path),
        "prepare": lambda: transcode(path, target, short_side=64),
    }
    outcomes = {}
    for what, read in tries.items():
        try:
            read()
            outcomes[what] = "decoded"
        except DecodeError as error:
            if str(path) not in str(error):
                raise RuntimeError(f"an error that does not name its file: {error}") from None
            outcomes[what] = "named"
    target.unlink(missing_ok=True)
    return outcomes


def _clip(path: Path) -> None:
    with VideoFile(path) as file:
        info = file.info.video or file.info.audio
        start = info.start + max(info.duration - 1.0, 0.0) / 2
        if file.info.video:
            file.read(video_start=start, video_seconds=0.5, fps=16)
        if file.info.audio:
            file.read(audio_start=start, audio_seconds=1.0, sample_rate=16000)


if __name__ == "__main__":
    main()
