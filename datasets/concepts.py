"""Select the classes and training videos of an evaluation: seen and unseen concepts, few-shot subsets."""

import difflib
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.video_dataset import VideoList
from utils.errors import UserError

REST_CLASSES = {  # the thesis' unseen concepts: classes not covered by any VGGSound label
    "ucf101": Path(__file__).parent / "rest_classes/ucf_rest_classes.txt",
    "hmdb51": Path(__file__).parent / "rest_classes/hmdb_rest_classes.txt",
}


@dataclass(frozen=True)
class Part:
    """A group of classes with its own classifier, and the videos of these classes.

    `train` and `test` are rows of the training and test lists (int64). The labels number this part's classes from 0.
    """

    name: str  # all, unseen or seen
    classes: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def __str__(self) -> str:
        return f"{self.name}: {len(self.classes)} classes, {len(self.train)} training and {len(self.test)} test videos"


def rest_classes_file(dataset: dict) -> Path:
    """Return the list of unseen classes: `dataset.rest_classes`, else the thesis' list for this data set.

    Raises:
        UserError: there is neither.
    """
    if dataset["rest_classes"] is not None:
        return Path(dataset["rest_classes"])
    if dataset["name"] not in REST_CLASSES:
        raise UserError(
            f"--use-rest-classes: no list for data set {dataset['name']}; set dataset.rest_classes to a file"
        )
    return REST_CLASSES[dataset["name"]]


def make_parts(
    train: VideoList, test: VideoList, chosen: np.ndarray, rest_classes: str | Path | None = None
) -> list[Part]:
    """Return the parts of an evaluation: `all`, or `unseen` and `seen` if a file of unseen classes is given.

    Args:
        chosen: rows of the training list to train on (see `few_shot_rows`).

    Raises:
        UserError: a name in the file is not a class, or a part has no training or no test video.
    """
    groups = {"all": list(train.classes)}
    if rest_classes is not None:
        unseen = set(read_unseen(rest_classes, train.classes))
        groups = {
            "unseen": [name for name in train.classes if name in unseen],
            "seen": [name for name in train.classes if name not in unseen],
        }
    return [_make_part(name, classes, train, test, chosen) for name, classes in groups.items()]


def _make_part(name: str, classes: list[str], train: VideoList, test: VideoList, chosen: np.ndarray) -> Part:
    number = torch.full((len(train.classes),), -1)
    number[[train.classes.index(c) for c in classes]] = torch.arange(len(classes))
    train_rows, test_rows = torch.from_numpy(np.sort(chosen)), torch.arange(len(test))
    train_rows = train_rows[number[train.labels[train_rows]] >= 0]
    test_rows = test_rows[number[test.labels] >= 0]
    for kind, rows in (("training", train_rows), ("test", test_rows)):
        if not len(rows):
            raise UserError(f"{train.root}: no {kind} video in the {len(classes)} {name} classes")
    labels = number[train.labels[train_rows]], number[test.labels[test_rows]]
    return Part(name, tuple(classes), train_rows, labels[0], test_rows, labels[1])


def read_unseen(file: str | Path, classes: tuple[str, ...]) -> list[str]:
    """Read a list of classes, one per line (# starts a comment line), and return them in the data set's spelling.

    Only letters and digits are compared, ignoring case: `HandstandPushups` matches `handstand pushups`.

    Raises:
        UserError: the file cannot be read, or a name is not a class of the data set (the nearest one is suggested).
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset.rest_classes: {file}: cannot be read: {error}") from None
    by_letters = {_letters(name): name for name in classes}
    unseen = []
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        letters = _letters(line)
        if letters not in by_letters:
            close = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.0)
            hint = f"; the nearest is {by_letters[close[0]]}" if close else ""
            raise UserError(f"{file}: {line.strip()!r} is none of the {len(classes)} classes of the data set{hint}")
        unseen.append(by_letters[letters])
    return unseen


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def few_shot_rows(videos: VideoList, ratio: float | None, seed: int) -> np.ndarray:
    """Select rows of a training list: floor(ratio * n) of each class's n videos, at least one (int64, ascending).

    The first videos of each class are kept, in an order that depends only on the seed, the class and the names. So
    larger ratios contain the subsets of smaller ones, and a class has the same subset in every part. A ratio of None
    keeps all videos.

    Raises:
        UserError: the ratio is not in (0, 1].
    """
    if ratio is None:
        return np.arange(len(videos))
    if not 0 < ratio <= 1:
        raise UserError(f"--few-shot-ratio {ratio:g}: expected above 0 and at most 1")
    labels, kept = videos.labels.numpy(), []
    for label in np.unique(labels):
        rows = sorted(np.flatnonzero(labels == label).tolist(), key=videos.name)
        name = videos.classes[label]
        order = np.random.default_rng((seed, zlib.crc32(os.fsencode(name)))).permutation(len(rows))
        count = max(1, int(ratio * len(rows) + 1e-9))
        kept += [rows[i] for i in order[:count]]
    return np.sort(np.array(kept, dtype=np.int64))
