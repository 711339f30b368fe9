"""Download VGGSound's ten-second clips from YouTube with yt-dlp, to `<out>/<split>/<youtube id>_<start>.mp4`.

    pip install -r requirements-download.txt           # also needs the ffmpeg program, with which yt-dlp cuts clips
    python3 -m datasets.download_vggsound --csv vggsound.csv --out RAW [--split train] [--limit N] [--workers 4]

An interrupted download resumes where it stopped. `<out>/download.csv` lists the state of each clip: done, gone
(removed, private, not available here; never tried again), or failed (tried again next time). When YouTube asks to slow
down, all workers wait, twice as long each time.
"""

import argparse
import csv
import math
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

from utils.cli import at_least, run_script
from utils.errors import UserError
from utils.files import write_whole
from utils.progress import progress_bar

SECONDS = 10
FATES = "download.csv"
COLUMNS = ("id", "start", "split", "fate", "reason", "time")
GONE = re.compile(
    r"private video|video (is |has been )?(private|removed|unavailable|not available)|no longer available|"
    r"account .{0,60}terminated|copyright|members.only|confirm your age|not available in your country",
    re.IGNORECASE,
)
TOO_FAST = re.compile(r"\b429\b|too many requests|rate.?limit|confirm you.?re not a bot", re.IGNORECASE)
FIRST_WAIT, LONGEST_WAIT = 30.0, 3600.0  # seconds
REFUSALS = (OSError, RuntimeError, ValueError)  # what a downloader raises for a reason; others are faults in it
FAULTS = (ArithmeticError, AssertionError, AttributeError, EOFError, HTTPException, LookupError, SyntaxError, TypeError)
TRIES = 6  # attempts per clip when asked to slow down

Clip = tuple[str, int, str]
Download = Callable[[Clip, Path], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True, metavar="FILE", help="vggsound.csv: id, start second, label, split")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--split", choices=("train", "test"), help="default: both")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="stop after trying N clips")
    parser.add_argument("--workers", type=at_least(1), default=4, metavar="N")
    args = parser.parse_args()
    clips = [clip for clip in read_clips(args.csv) if args.split in (None, clip[2])]
    try:
        counts = download_all(clips, Path(args.out), yt_dlp_download(), args.workers, args.limit)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written: {error}") from None
    copy = Path(args.out) / "vggsound.csv"
    if not (copy.exists() and copy.samefile(args.csv)):
        write_whole(copy, Path(args.csv).read_bytes())
    print(", ".join(f"{fate} {count}" for fate, count in counts.items()) + f"; see {Path(args.out) / FATES}")


def read_clips(file: str | Path) -> list[Clip]:
    """Read (id, start second, split) from each line of vggsound.csv. Raises UserError for any other file."""
    try:
        with Path(file).open(newline="", encoding="utf-8-sig") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv {file}: cannot be read: {error}") from None
    for row in rows:
        if len(row) != 4 or not row[1].isdecimal() or row[3] not in ("train", "test"):
            raise UserError(f"--csv {file}: expected rows of id, start second, label, split; found {','.join(row)!r}")
    return [(row[0], int(row[1]), row[3]) for row in rows]


def download_all(
    clips: Iterable[Clip],
    out: Path,
    download: Download,
    workers: int = 4,
    limit: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Counter:
    """Download the missing clips. Returns the number of clips per fate, including those of earlier calls.

    `download` writes a clip to a path, or raises an exception (`REFUSALS` or `FAULTS`) with the reason.
    """
    out.mkdir(parents=True, exist_ok=True)
    fates = read_fates(out / FATES)
    todo = [clip for clip in clips if not is_settled(clip, out, fates)][:limit]
    lock, pause = threading.Lock(), Pause(sleep, clock)
    with (out / FATES).open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        elif not (out / FATES).read_bytes().endswith(b"\n"):  # incomplete last line of a killed run
            file.write("\n")

        def fetch(clip: Clip) -> None:
            fate, reason = fetch_one(clip, out, download, pause)
            with lock:
                fates[clip[:2]] = fate
                writer.writerow([*clip, fate, reason, time.strftime("%Y-%m-%dT%H:%M:%S%z")])
                file.flush()

        with ThreadPoolExecutor(workers) as pool:
            for _ in progress_bar(pool.map(fetch, todo), total=len(todo), unit="clip", disable=not todo):
                pass
    return Counter(fates.values())


def fetch_one(clip: Clip, out: Path, download: Download, pause: "Pause") -> tuple[str, str]:
    """Download one clip. Returns its fate and, unless it is done, the reason in one line."""
    target = path_of(clip, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.stem}.part")  # a folder: a downloader leaves other files beside its target
    reason = ""
    for _ in range(TRIES):
        began = pause.wait()
        shutil.rmtree(building, ignore_errors=True)  # left by a killed process
        try:
            building.mkdir()
            download(clip, building / target.name)
            os.replace(building / target.name, target)
        except (*REFUSALS, *FAULTS) as error:
            reason = " ".join(str(error).replace(clip[0], "").split())[:300]  # an id may match one of the patterns
            if not isinstance(error, REFUSALS):
                return "failed", f"{type(error).__name__}: {reason}"
        else:
            pause.relax(began)
            return "done", ""
        finally:
            shutil.rmtree(building, ignore_errors=True)
        if not TOO_FAST.search(reason):
            return ("gone" if GONE.search(reason) else "failed"), reason
        pause.back_off(began)
    return "failed", reason


def path_of(clip: Clip, out: Path) -> Path:
    """Return the path to which a clip is downloaded."""
    video, start, split = clip
    return out / split / f"{video}_{start:06d}.mp4"


def read_fates(file: Path) -> dict[tuple[str, int], str]:
    """Read the last fate of each clip that was tried. An incomplete last line is skipped."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.reader(lines) if len(row) == len(COLUMNS) and row[1].isdecimal()]
    return {(row[0], int(row[1])): row[3] for row in rows}


def is_settled(clip: Clip, out: Path, fates: dict[tuple[str, int], str]) -> bool:
    """Whether a clip is downloaded or known to be gone."""
    return fates.get(clip[:2]) == "gone" or path_of(clip, out).is_file()


class Pause:
    """Pause of all workers when the site asks to slow down: twice as long each time, reset by a success.

    The answers to requests sent before a pause belong to what caused it: they neither lengthen nor reset it.
    """

    def __init__(self, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
        self._sleep, self._clock, self._lock = sleep, clock, threading.Lock()
        self._next, self._until, self._backed_off = FIRST_WAIT, -math.inf, -math.inf  # times on the clock

    def wait(self) -> float:
        """Wait while a pause lasts. Returns the time at which a request may be sent, now."""
        while (now := self._clock()) < self._until:
            self._sleep(self._until - now)
        return now

    def back_off(self, began: float) -> None:
        """Begin a pause, since the site told a request sent at `began` to slow down, and double the next one."""
        with self._lock:
            if began > self._backed_off:
                self._backed_off = self._clock()
                self._until = self._backed_off + self._next
                self._next = min(2 * self._next, LONGEST_WAIT)

    def relax(self, began: float) -> None:
        """Reset the length of pauses after the success of a request sent at `began`."""
        with self._lock:
            if began > self._backed_off:
                self._next = FIRST_WAIT


def yt_dlp_download() -> Download:
    """Return a function that downloads one clip with yt-dlp.

    Raises:
        UserError: the package, or the ffmpeg program that it needs, is not installed.
    """
    try:
        import yt_dlp
    except ImportError:
        raise UserError("yt-dlp is not installed: pip install -r requirements-download.txt") from None
    if shutil.which("ffmpeg") is None:
        raise UserError("the ffmpeg program is not installed; yt-dlp needs it to cut clips from videos")

    def download(clip: Clip, target: Path) -> None:
        video, start, _ = clip
        options = {
            "format": "bv*[height<=360]+ba/b[height<=360]/b",
            "merge_output_format": "mp4",
            "outtmpl": str(target).replace("%", "%%"),
            "download_ranges": yt_dlp.utils.download_range_func(None, [(start, start + SECONDS)]),
            "force_keyframes_at_cuts": True,
            "quiet": True,
            "no_warnings": True,
            "noprogress": True,
        }
        try:
            with yt_dlp.YoutubeDL(options) as downloader:
                downloader.download([f"https://www.youtube.com/watch?v={video}"])
        except yt_dlp.utils.YoutubeDLError as error:
            raise RuntimeError(str(error)) from None

    return download


if __name__ == "__main__":
    run_script(main)
