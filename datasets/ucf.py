"""UCF-101 as published: `<root>/videos/<Class>/*` (or `UCF-101/`) and `ucfTrainTestlist/`."""

import re
from pathlib import Path

from datasets.video_dataset import VideoList, each_once, read_list
from utils.config import split_of_fold
from utils.errors import UserError

HELP = "expected UCF-101 as published: videos/<Class>/*.avi (or UCF-101/) and ucfTrainTestlist/; see datasets/README.md"


def list_videos(dataset: dict, split: str) -> VideoList:
    """List the videos of a published list: `trainlist01`, or `trainlist{fold:02d}` for the one of `dataset.fold`.

    A video's class is that of its folder, since test lists have no labels. Labels follow classInd.txt.

    Raises:
        UserError: the split is unknown, or lists or videos are not in their place.
    """
    root = Path(dataset["root"])
    lists = root / "ucfTrainTestlist"
    file = lists / f"{split_of_fold(split, dataset['fold'])}.txt"
    classes = _classes(lists / "classInd.txt")
    names = each_once(file, [re.sub(r"\s+\d+\s*$", "", line).strip() for line in read_list(file, HELP)])
    folder = next((name for name in ("videos", "UCF-101") if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: neither videos/ nor UCF-101/ is there; {HELP}")
    if not names:
        raise UserError(f"{file}: lists no video")
    number = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name.split("/")[0] not in number), None)
    if unknown is not None:
        raise UserError(f"{file}: {unknown}: its folder is no class of classInd.txt ({len(classes)} classes)")
    labels = [number[name.split("/")[0]] for name in names]
    return VideoList(root, [f"{folder}/{name}" for name in names], labels, classes)


def _classes(file: Path) -> list[str]:
    """Read the class names in the order of their numbers."""
    rows = [line.split(maxsplit=1) for line in read_list(file, HELP)]
    bad = next((row for row in rows if len(row) < 2 or not row[0].isdecimal()), None)
    if bad is not None:
        raise UserError(f"{file}: {' '.join(bad)!r}: expected a number and a class name")
    return [name.strip() for _, name in sorted(rows, key=lambda row: int(row[0]))]
