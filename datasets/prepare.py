"""Prepare raw downloads: convert them to training-ready files and write a manifest.

    python3 -m datasets.prepare vggsound --root RAW --out PREPARED --workers 16
    python3 -m datasets.prepare ucf101 --root RAW --out PREPARED --shard 3/8     # one of eight jobs, shared disk
    python3 -m datasets.prepare vggsound --root RAW --check                      # write no videos, only report

PREPARED has RAW's layout and file names (even if they end in .avi; readers detect the format from the content), so
every configuration works with either. An interrupted run resumes: finished files are skipped while the raw file (size,
modification time), the options and the encoder's settings are unchanged. A video that cannot be prepared does not
affect the others, even if it crashes the decoder or exceeds `--time-limit`; its line in manifest.csv gives the reason.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import folder, vggsound
from datasets.contact_sheet import draw_contact_sheet
from datasets.manifest import FILE, append_rows, read_rows, size_and_time, write_rows
from datasets.transcode import Facts, recipe, recipe_of_inspection
from datasets.work_pool import TRY_AGAIN, run_jobs
from utils.cli import at_least, run_script
from utils.errors import UserError
from utils.files import lock, write_whole
from utils.processes import cores
from utils.progress import progress_bar

LISTS = {  # files of a data set other than its videos
    "vggsound": ("vggsound.csv",),
    "ucf101": ("ucfTrainTestlist",),
    "hmdb51": ("splits", "testTrainMulti_7030_splits"),
    "folder": (".",),  # its CSV files
}
LONGEST = 1_000_000  # seconds; limit of --time-limit: more than any video takes, and a time for which one can wait
SHORT = 0.5  # seconds by which a video may end before its declared end
PART = "manifest-part-{}-of-{}.csv"
RETRACTED = (0, 0)  # the part that an earlier manifest becomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=LISTS)
    parser.add_argument("--root", required=True, metavar="RAW", help="the data set as downloaded; only read")
    parser.add_argument("--out", metavar="PREPARED", help="where the prepared data set goes")
    parser.add_argument("--workers", type=at_least(1), default=cores(), help="processes; default: one per core")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="prepare only shard I of N")
    parser.add_argument("--short-side", type=at_least(1), default=256, metavar="PX", help="maximum; default: 256")
    parser.add_argument("--fps", default="keep", help="frames per second, or keep (default)")
    parser.add_argument("--time-limit", type=float, default=120.0, metavar="S", help="seconds per video; default: 120")
    parser.add_argument("--check", action="store_true", help="write no videos, only inspect RAW and report")
    args = parser.parse_args()
    prepare(args)


def prepare(args: argparse.Namespace) -> None:
    """Check the arguments, find the videos and prepare one shard, which is locked against other processes."""
    raw, out = Path(args.root), Path(args.out) if args.out else None
    shard, shards = _shard(args.shard)
    fps = None if args.fps == "keep" else _positive(args.fps)
    if not 0 < args.time_limit <= LONGEST:
        raise UserError(f"--time-limit {args.time_limit:g}: expected seconds above 0, at most {LONGEST}")
    if not raw.is_dir():
        raise UserError(f"--root {raw}: no such folder")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is no folder")
    if (out is None) != args.check:
        raise UserError("give --out PREPARED, or --check to write only a report")
    if out is not None and raw.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out}: is in the raw folder, which is only read; choose another folder")
    names = sorted(find_videos(args.dataset, raw))
    if not names:
        raise UserError(f"--root {raw}: no video found for {args.dataset}; looked for {' '.join(folder.ENDINGS)}")
    report = out or Path.cwd() / f"check-{raw.resolve().name}"
    part = report / PART.format(shard, shards)
    locked = report / f".{part.name}.lock"
    try:
        report.mkdir(parents=True, exist_ok=True)
        locked.touch()
    except OSError as error:
        raise UserError(f"{report}: cannot be written to: {error}") from None
    with locked.open("a") as held:
        lock(held, part)
        merged = write_shard(args, names, (shard, shards), fps, part)
        sum_up(part, merged, raw if out is None else out)


def write_shard(
    args: argparse.Namespace, names: list[str], shard: tuple[int, int], fps: float | None, part: Path
) -> bool:
    """Prepare the missing videos of a shard (number, count), write its `part` of the manifest and merge the parts.

    Returns:
        Whether the manifest was written: every video has a line.
    """
    raw, out, report = Path(args.root), Path(args.out) if args.out else None, part.parent
    meaning = recipe_of_inspection() if args.check else recipe(args.short_side, fps)
    prints = {name: fingerprint(raw / name, meaning) for name in names}
    known = collect_rows(report, prints, out)
    own = names[shard[0] - 1 :: shard[1]]
    rows = {name: known[name] for name in own if name in known}
    if out is not None:
        copy_lists(args.dataset, raw, out)

    labels = label_of(args.dataset, raw, names)
    todo = [name for name in own if name not in rows]
    print(
        f"{len(names)} videos below {raw}, shard {shard[0]} of {shard[1]}: {len(rows)} done before, {len(todo)} to do"
    )
    if again := _prepared_before(report, todo):
        print(f"{again} of these were prepared before, from another file, with other options or by another version")
    jobs = [(name, (raw / name, out and out / name, args.short_side, fps)) for name in todo]
    write_rows(part, rows.values())
    if out is not None:
        retract_manifest(report, todo)
    outcomes = without_leftovers(run_jobs(jobs, args.workers, args.time_limit), out)
    done = (row_of(name, labels[name], outcome, prints[name], out) for name, outcome in outcomes)
    for _ in progress_bar(append_rows(part, done), total=len(jobs), unit="video", disable=not jobs):
        pass
    merged = merge_parts(report, prints, out, part if shard[1] == 1 else None)
    if out is not None:
        clear_leftovers(out, args.time_limit)
    return merged


def sum_up(part: Path, merged: bool, videos: Path) -> None:
    """Print the summary of the `merged` manifest or of one part, write it beside them, and draw the contact sheet.

    The sheet shows videos below `videos`.
    """
    report = part.parent
    rows = {row["path"]: row for row in read_rows(report / FILE if merged else part)}
    summary = summarise(list(rows.values()))
    write_whole(report / "summary.txt", summary, errors="surrogateescape")
    print(summary, end="")
    readable = [row for row in rows.values() if not row["error"]]
    if readable:
        draw_contact_sheet(videos, [row["path"] for row in readable], report / "contact-sheet.png")
        print(f"contact sheet: {report / 'contact-sheet.png'}")


def find_videos(dataset: str, raw: Path) -> Iterator[str]:
    """Find the videos of a data set in its layout, as paths relative to the root."""
    if dataset == "vggsound":
        for top in ("train", "test"):
            yield from (f"{top}/{name}" for name in vggsound.find(raw / top))
        return
    tops = {
        "ucf101": ("videos", "UCF-101"),
        "hmdb51": ("videos", "hmdb51_org"),
        "folder": (".",),
    }[dataset]
    for top in tops:
        if (raw / top).is_dir():
            yield from (os.path.normpath(os.path.join(top, name)) for name in folder.find(raw / top))


def fingerprint(file: Path, meaning: str) -> str:
    """Hash a raw file's size and modification time and the recipe, to detect outdated prepared files."""
    return hashlib.sha256(f"{size_and_time(file)} {meaning}".encode()).hexdigest()[:16]


def is_done(row: dict, source: str | None, out: Path | None) -> bool:
    """Whether a line of a manifest is still valid and its file, if it should have one, is still the one it is of.

    Another recipe may have replaced the file since. A crash or timeout may have been the machine's fault, so such a
    video is tried again.
    """
    if row["source"] != source:
        return False
    if row["error"]:
        return not any(reason in row["error"] for reason in TRY_AGAIN)
    return out is None or row.get("bytes") == _size(out / row["path"])


def _size(file: Path) -> str:
    """Return a file's size in bytes as text, or `absent`."""
    try:
        return str(file.stat().st_size)
    except OSError:
        return "absent"


def _prepared_before(report: Path, names: list[str]) -> int:
    """Count the names of which the manifest or a part says that they were prepared."""
    files = [report / FILE, *report.glob(PART.format("*", "*"))]
    listed = {row["path"] for file in files for row in read_rows(file) if not row["error"]}
    return len(listed.intersection(names))


def collect_rows(report: Path, prints: dict[str, str], out: Path | None, all_errors: bool = False) -> dict[str, dict]:
    """Collect the lines of the manifest and its parts that are valid for the current raw files and options, by path.

    Without `all_errors`, lines of videos that are to be tried again are skipped.
    """
    found = {}
    for file in (report / FILE, *sorted(report.glob(PART.format("*", "*")))):
        for row in read_rows(file):
            source = prints.get(row["path"])
            if row["error"] and row["path"] in found:  # another line already covers this video
                continue
            if is_done(row, source, out) or (all_errors and row["error"] and row["source"] == source):
                found[row["path"]] = row
    return found


def copy_lists(dataset: str, raw: Path, out: Path) -> None:
    """Copy the lists and labels of the data set: their contents, not their file permissions.

    Raises:
        UserError: one of them cannot be read, or not be written.
    """
    endings = (".csv",) if dataset == "folder" else ("",)
    for top in LISTS[dataset]:
        names = [top] if (raw / top).is_file() else []
        if (raw / top).is_dir():
            names = [os.path.join(top, name) for name in folder.find(raw / top, endings)]
        for name in names:
            try:
                content, copy = (raw / name).read_bytes(), out / name
            except OSError as error:
                raise UserError(f"{raw / name}: cannot be read: {error.strerror}; make it readable") from None
            if copy.name != FILE and not (copy.is_file() and copy.read_bytes() == content):
                write_whole(copy, content)


def label_of(dataset: str, raw: Path, names: list[str]) -> dict[str, str]:
    """Return the label of each video (empty if none): from the CSV for VGGSound, else from the video's folder."""
    if dataset == "vggsound":
        clips = [vggsound.parse_name(Path(name).name) for name in names]
        numbers, classes = vggsound.read_labels(raw / "vggsound.csv", clips)
        found = [classes[number] if number >= 0 else "" for number in numbers or [-1] * len(names)]
        return dict(zip(names, found, strict=True))
    return {name: Path(name).parent.name if dataset != "folder" else "" for name in names}


def row_of(name: str, label: str, outcome: Facts | str, source: str, out: Path | None) -> dict:
    """Make a line of the manifest, with the facts or the error."""
    split = name.split(os.sep)[0] if name.split(os.sep)[0] in ("train", "test") else ""
    row = {"path": name, "label": label, "split": split, "source": source, "error": ""}
    if isinstance(outcome, str):
        return row | {"error": outcome}
    size = {} if out is None else {"bytes": _size(out / name)}
    return row | dataclasses.asdict(outcome) | {"still": int(outcome.still)} | size


def without_leftovers(
    outcomes: Iterable[tuple[str, Facts | str]], out: Path | None
) -> Iterator[tuple[str, Facts | str]]:
    """Yield the outcomes. A video that could not be prepared leaves no older file, as its line says that there is none.

    Raises:
        UserError: the older file cannot be deleted.
    """
    for name, outcome in outcomes:
        if out is not None and isinstance(outcome, str):
            try:
                (out / name).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{out / name}: is outdated and cannot be deleted: {error.strerror}") from None
        yield name, outcome


def retract_manifest(report: Path, todo: list[str]) -> None:
    """Make the manifest a part if files that it lists are about to be replaced: it must never be untrue."""
    listed = {row["path"] for row in read_rows(report / FILE) if not row["error"]}
    if not listed.isdisjoint(todo):
        with contextlib.suppress(FileNotFoundError):  # another shard was faster
            os.replace(report / FILE, report / PART.format(*RETRACTED))


def merge_parts(report: Path, prints: dict[str, str], out: Path | None, only_part: Path | None) -> bool:
    """Write the manifest once every video has a line, and return whether that is so.

    `only_part`, the part of a single shard, is then removed, and so is a manifest that was retracted.
    """
    rows = collect_rows(report, prints, out, all_errors=True)
    absent = len(prints) - len(rows)
    if absent:
        print(f"{absent} of {len(prints)} videos are not in any part yet: run the other shards, then any one again")
        return False
    write_rows(report / FILE, rows.values())
    print(f"manifest: {report / FILE}")
    if only_part is not None:
        only_part.unlink()
    (report / PART.format(*RETRACTED)).unlink(missing_ok=True)
    return True


def clear_leftovers(out: Path, time_limit: float) -> None:
    """Delete unfinished files of killed workers: those unchanged for `time_limit` seconds, the limit of one video."""
    for half in out.rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another shard has just finished it
            if time.time() - half.stat().st_mtime > time_limit:
                half.unlink()


def summarise(rows: list[dict]) -> str:
    """Summarise as text what was prepared, and what was dropped and why."""
    good, bad = ([row for row in rows if bool(row["error"]) == failed] for failed in (False, True))
    hours = sum(float(row["duration"]) for row in good) / 3600
    lines = [f"{len(good)} videos, {hours:.2f} hours; {len(bad)} dropped"]
    kinds = collections.Counter(row["audio"] for row in good)
    lines.append("sound: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    broken = [row["path"] for row in good if row["audio"] == "broken"]
    lines.append(f"sound lost, at least in part, and left out: {_some(broken)}")
    short = [row["path"] for row in good if float(row["declared"]) - float(row["duration"]) > SHORT]
    lines.append(f"shorter than declared: {_some(short)}")
    still = [row["path"] for row in good if row["still"] == "1"]
    lines.append(f"still pictures: {_some(still)}")
    reasons = collections.Counter(row["error"].rpartition("found: ")[2] for row in bad)
    lines += [f"dropped, {count}: {reason}" for reason, count in reasons.most_common(20)]
    lines += [f"    {row['path']}: {row['error']}" for row in bad[:1000]]
    return "\n".join(lines) + "\n"


def _some(names: list[str]) -> str:
    """Format the number of names and the first five."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} ({shown})" if names else "0"


def _shard(text: str) -> tuple[int, int]:
    one, _, of = text.partition("/")
    if not (one.isdecimal() and of.isdecimal() and 1 <= int(one) <= int(of)):
        raise UserError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 3/8")
    return int(one), int(of)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1000:
        raise UserError(f"--fps {text}: expected keep, or frames per second above 0")
    return value


if __name__ == "__main__":
    run_script(main)
