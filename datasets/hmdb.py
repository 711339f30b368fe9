"""HMDB-51 as published: `<root>/videos/<class>/*` (or `hmdb51_org/`) and `splits/<class>_test_split<k>.txt`."""

import re
from pathlib import Path

from datasets.video_dataset import VideoList, each_once, read_list
from utils.config import split_of_fold
from utils.errors import UserError

HELP = (
    "expected HMDB-51 as published: videos/<class>/*.avi (or hmdb51_org/) and splits/<class>_test_split<k>.txt; see "
    "datasets/README.md"
)
MARKS = {"train": "1", "test": "2"}  # in the split files; 0: in neither split


def list_videos(dataset: dict, split: str) -> VideoList:
    """List the videos of `train-split<k>` or `test-split<k>`; `{fold}` is replaced by `dataset.fold`.

    The classes are those with a split file, in alphabetical order. A video's class is that of its folder.

    Raises:
        UserError: the split is unknown, or lists or videos are not in their place.
    """
    root = Path(dataset["root"])
    wanted = re.fullmatch(r"(train|test)-split(\d+)", split_of_fold(split, dataset["fold"]))
    if wanted is None:
        raise UserError(f"dataset.*.split: {split!r}: HMDB-51 has train-split{{fold}} and test-split{{fold}}")
    mark, ending = MARKS[wanted[1]], f"_test_split{wanted[2]}.txt"
    lists = _first_folder(root, ("splits", "testTrainMulti_7030_splits"))
    videos = _first_folder(root, ("videos", "hmdb51_org"))
    files = [file for file in lists.glob(f"*{ending}") if not file.name.startswith(".")]  # macOS adds ._ files
    files.sort(key=lambda file: file.name.removesuffix(ending))
    if not files:
        raise UserError(f"{lists}: no file *{ending}; {HELP}")
    names, labels = [], []
    for label, file in enumerate(files):
        listed = []
        for line in read_list(file, HELP):
            name, _, found = line.rstrip().rpartition(" ")
            if found not in ("0", "1", "2"):
                raise UserError(f"{file}: {line!r}: expected a file name and 0, 1 or 2")
            if found == mark:
                listed.append(f"{videos.name}/{file.name.removesuffix(ending)}/{name.rstrip()}")
        names += each_once(file, listed)
        labels += [label] * (len(names) - len(labels))
    if not names:
        raise UserError(f"{lists}: its {len(files)} files *{ending} list no video for {wanted[0]}")
    return VideoList(root, names, labels, [file.name.removesuffix(ending) for file in files])


def _first_folder(root: Path, names: tuple[str, str]) -> Path:
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: neither {names[0]}/ nor {names[1]}/ is there; {HELP}")
    return folder
