"""UCF-101 as published: `<root>/videos/<Class>/*` (or `UCF-101/`) and `ucfTrainTestlist/`."""

from pathlib import Path

from datasets.video_dataset import VideoList
from utils.errors import UserError

HELP = "expected UCF-101 as published: videos/<Class>/*.avi (or UCF-101/) and ucfTrainTestlist/"


def list_videos(dataset: dict, split: str) -> VideoList:
    """The videos of one published list, such as `trainlist01`, or by `trainlist{fold:02d}` the one of `dataset.fold`.

    The class of a video is its folder's, since test lists carry no label. Labels follow classInd.txt.
    """
    root = Path(dataset["root"])
    lists = root / "ucfTrainTestlist"
    try:
        file = lists / f"{split.format(fold=dataset['fold'])}.txt"
    except (KeyError, IndexError, ValueError):
        raise UserError(f"dataset split {split!r}: only {{fold}} may stand in braces") from None
    classes = [line.split()[1] for line in _lines(lists / "classInd.txt")]
    names = [line.split()[0] for line in _lines(file)]
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


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{file}: no such list; {HELP}") from None
