"""VGGSound: `<root>/{train,test}/<youtube id>_<start>.mp4` and, for labels, `<root>/vggsound.csv`."""

import csv
import hashlib
import logging
import os
from pathlib import Path

from datasets.manifest import manifest_of
from datasets.video_dataset import VideoList
from utils.errors import UserError

log = logging.getLogger("avssrl")

SUBSET_SIZE = 50_000
HELP = "expected <root>/train/ and <root>/test/ with files <youtube id>_<start second>.mp4; see datasets/README.md"

Clip = tuple[str, int]


def list_videos(dataset: dict, split: str) -> VideoList:
    """List the files of folder `train` or `test`; `train_subset` is a subset of `train`.

    The subset holds the videos named in the file `dataset.list`. Without it, these are the 50,000 videos with the
    smallest SHA-256 of id and start, or all if there are fewer. Labels come from vggsound.csv; -1: not listed. Of two
    files of one clip, with and without leading zeros, the first by name is taken.

    Raises:
        UserError: the split is unknown, the folder is missing or holds no video, or the list cannot be read or matches
            no video.
    """
    root = Path(dataset["root"])
    folders = {"train": "train", "train_subset": "train", "test": "test"}
    if split not in folders:
        raise UserError(f"dataset.*.split: {split!r}: VGGSound has {', '.join(folders)}")
    if split == "train" and dataset["list"] is not None:
        raise UserError(f"dataset.list: {dataset['list']}: is for split train_subset, and the split is train")
    folder = root / folders[split]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {HELP}")
    names = _names(root, folders[split])
    clips = {name: parse_name(name) for name in names}
    names = _one_per_clip(folder, names, clips)
    if split == "train_subset":
        names = _subset(names, clips, dataset["list"])
    if not names:
        raise UserError(f"{folder}: holds no video to use; {HELP}")
    try:
        labels, classes = read_labels(root / "vggsound.csv", [clips[name] for name in names])
    except UserError as error:  # whoever needs labels will miss them
        log.warning("no labels: %s", error)
        labels, classes = None, []
    return VideoList(root, [f"{folders[split]}/{name}" for name in names], labels, classes)


def _names(root: Path, folder: str) -> list[str]:
    """Return the names of a folder's videos, from the manifest or else from the disk."""
    manifest = manifest_of(root)
    if manifest is None:
        return find(root / folder)
    names = (path.removeprefix(f"{folder}/") for path in manifest.paths if path.startswith(f"{folder}/"))
    return sorted(name for name in names if name.endswith(".mp4") and "/" not in name)


def find(folder: Path) -> list[str]:
    """Find the mp4 files directly in a folder, sorted by name; empty if the folder does not exist.

    Names that begin with a dot are skipped: leftovers of killed downloads and macOS metadata files.

    Raises:
        UserError: the folder cannot be listed.
    """
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            names = (entry.name for entry in entries if entry.name.endswith(".mp4") and not entry.is_dir())
            return sorted(name for name in names if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; make it readable") from None


def parse_name(name: str) -> Clip:
    """Parse a file name into YouTube id and start second: `--0PQM4-hqg_000030.mp4` is ('--0PQM4-hqg', 30).

    Any other name is used as the id, with start -1: the video can be used for training but has no label.
    """
    stem = name.removesuffix(".mp4")
    video, _, start = stem.rpartition("_")
    return (video, int(start)) if video and start.isdecimal() else (stem, -1)


def _one_per_clip(folder: Path, names: list[str], clips: dict[str, Clip]) -> list[str]:
    """Keep the first file of each clip: `a_30.mp4` and `a_000030.mp4` are one instance, not each other's negatives."""
    kept = sorted({clips[name]: name for name in reversed(names)}.values())
    if len(kept) < len(names):
        other = min(set(names) - set(kept))
        log.warning(
            "%s: left out %d files of clips that another file holds, such as %s", folder, len(names) - len(kept), other
        )
    return kept


def _subset(names: list[str], clips: dict[str, Clip], list_file: str | None) -> list[str]:
    if list_file is None:
        chosen = sorted(names, key=lambda name: hashlib.sha256("{}_{}".format(*clips[name]).encode()).digest())
        return sorted(chosen[:SUBSET_SIZE])
    try:
        lines = Path(list_file).read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"dataset.list: {list_file}: cannot be read: {error}; expected one name per line. README says where the "
            "thesis' list is; without dataset.list, 50,000 videos are chosen by a rule"
        ) from None
    wanted = {parse_name(line.rsplit("/", 1)[-1]) for line in lines}
    kept = [name for name in names if clips[name] in wanted]
    if not kept:
        raise UserError(f"dataset.list: {list_file}: none of its {len(wanted)} videos is there")
    if len(kept) < len(wanted):
        log.info("dataset.list: %s: of its %d videos, %d were found", list_file, len(wanted), len(kept))
    return kept


def read_labels(file: Path, clips: list[Clip]) -> tuple[list[int] | None, list[str]]:
    """Read each clip's label (-1: none) and the classes from vggsound.csv; without the file, labels are None.

    Raises:
        UserError: the file cannot be read, or has malformed rows.
    """
    if not file.is_file():
        return None, []
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    bad = next((row for row in rows if len(row) < 3 or not row[1].isdecimal()), None)
    if bad is not None:
        raise UserError(f"{file}: expected rows of id, start second, label, split; found {','.join(bad)!r}")
    classes = sorted({row[2] for row in rows})
    number = {label: i for i, label in enumerate(classes)}
    label_of = {(row[0], int(row[1])): number[row[2]] for row in rows}
    return [label_of.get(clip, -1) for clip in clips], classes
