"""Any folder of videos, with optional labels from a CSV file and a rule for the held-out videos."""

import csv
import logging
import os
from pathlib import Path
from typing import NoReturn

from datasets.manifest import manifest_of
from datasets.video_dataset import VideoList
from utils.errors import UserError

log = logging.getLogger("avssrl")
ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".ogv", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")


def list_videos(dataset: dict, split: str) -> VideoList:
    """List the videos anywhere below the root, sorted by name.

    With `dataset.holdout_every: N`, split `test` holds the videos whose index in this order is a multiple of N, `train`
    the others, and `all` all of them. Videos that could not be prepared keep their index, so that no video changes
    splits. `dataset.labels` is a CSV file below the root with a header: its first column is the video's path below the
    root, and `dataset.label_column` (default: the second column) its label.

    Raises:
        UserError: the split is unknown, there is no video, or the labels cannot be read or match none of the videos.
    """
    root, every = Path(dataset["root"]), dataset["holdout_every"]
    if split not in ("train", "test", "all"):
        raise UserError(f"dataset.*.split: {split!r}: a folder has train, test, all")
    if split != "all" and every is None:
        raise UserError(f"dataset.*.split: {split!r}: set dataset.holdout_every (such as 5), or use split all")
    manifest = manifest_of(root)
    names = sorted(find(root)) if manifest is None else sorted([*manifest.sources, *manifest.errors])
    known = names
    if split != "all":
        names = [name for i, name in enumerate(names) if (i % every == 0) == (split == "test")]
    if known and not names:
        raise UserError(
            f"dataset.holdout_every: {every} holds out all {len(known)} videos; none is left for split {split}"
        )
    if manifest is not None:
        names = [name for name in names if name in manifest.sources]
    if not names:
        raise UserError(f"{root}: holds no video for split {split}; looked for {' '.join(ENDINGS)}")
    labels, classes = _labels(root, dataset["labels"], dataset["label_column"], names, known)
    return VideoList(root, names, labels, classes)


def find(root: Path, endings: tuple[str, ...] = ENDINGS) -> list[str]:
    """Find the videos (or files with the given `endings`) anywhere below a folder, as paths relative to it.

    Links are followed, but each folder is visited once. Names that begin with a dot are skipped.

    Raises:
        UserError: the folder does not exist, or a folder cannot be listed.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set dataset.root to a folder of videos")
    found, visited = [], set()
    for folder, below, files in os.walk(root, onerror=_refuse, followlinks=True):
        # sorted: of two links the same everywhere; only root can list lost+found, which every ext4 disk has
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "lost+found")
        if (place := os.path.realpath(folder)) in visited:
            below.clear()
            continue
        visited.add(place)
        relative = os.path.relpath(folder, root)
        names = (name for name in files if name.lower().endswith(endings) and not name.startswith("."))
        found += [os.path.normpath(os.path.join(relative, name)) for name in names]
    return found


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be listed: {error.strerror}; make it readable, or move it out") from None


def _labels(
    root: Path, labels: str | None, column: str | None, names: list[str], known: list[str]
) -> tuple[list[int] | None, list[str]]:
    """Return the label of each of `names` (-1: none) and the classes. `known` holds the names of all splits."""
    if labels is None:
        return None, []
    file, there = root / labels, set(known)
    label_of = _read_labels(file, column)
    if label_of and label_of.keys().isdisjoint(there):
        raise UserError(f"{file}: names none of the videos: it has {next(iter(label_of))}, the folder has {known[0]}")
    if absent := len(label_of.keys() - there):
        log.info("%s: %d of the %d videos with a label are not in the folder", file, absent, len(label_of))
    classes = sorted({label for name, label in label_of.items() if name in there})
    number = {label: i for i, label in enumerate(classes)}
    found = [number[label_of[name]] if name in label_of else -1 for name in names]
    if -1 in found:
        log.info("%s: no label for %d of %d videos", file, found.count(-1), len(found))
    return found, classes


def _read_labels(file: Path, column: str | None) -> dict[str, str]:
    """Read the label of each video, by its path relative to the root."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row] or [[""]]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: expected a CSV file with a header and rows: {error}") from None
    if len(header) < 2:
        raise UserError(
            f"{file}: expected columns that commas separate, a video's path and its label; found {header[0]!r}"
        )
    if column is not None and column not in header:
        raise UserError(f"{file}: dataset.label_column {column}: the columns are {', '.join(header)}")
    place = 1 if column is None else header.index(column)
    label_of = {}
    for row in rows:
        if len(row) > place and row[place]:
            name, label = os.path.normpath(row[0]), row[place]
            if label_of.setdefault(name, label) != label:
                raise UserError(f"{file}: {name} has two labels, {label_of[name]} and {label}; keep one")
    return label_of
