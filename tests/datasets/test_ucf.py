"""datasets.ucf: UCF-101 as published."""

import logging
import shutil

import pytest

from datasets import build_videos
from utils.config import load_config
from utils.errors import UserError


def dataset(root, **changes):
    return load_config("configs/ucf/8at16-linear.yaml", [f"dataset.root={root}"])["dataset"] | changes


@pytest.fixture
def root(tmp_path):
    (tmp_path / "UCF-101").mkdir()
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("2 Basketball\r\n1 HandstandPushups\r\n\r\n")
    (lists / "trainlist02.txt").write_text(
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 1\r\nBasketball/v_Basketball (1) & more_g08_c01.avi 2\r\n"
    )
    (lists / "testlist02.txt").write_text("Basketball/v_Basketball_g01_c01.avi\n")
    return tmp_path


def test_names_labels_and_classes(root):
    train = build_videos(dataset(root, fold=2), "trainlist{fold:02d}")
    assert train.classes == ("HandstandPushups", "Basketball") and train.labels.tolist() == [0, 1]
    assert train.name(0) == "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi"
    assert train.name(1) == "UCF-101/Basketball/v_Basketball (1) & more_g08_c01.avi"
    assert build_videos(dataset(root), "testlist02").labels.tolist() == [1]


def test_a_video_that_is_listed_twice_counts_once(root, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("avssrl"), "propagate", True)
    with (root / "ucfTrainTestlist/testlist02.txt").open("a") as file:
        file.write("HandstandPushups/h.avi\nBasketball/v_Basketball_g01_c01.avi\n")
    assert build_videos(dataset(root), "testlist02").labels.tolist() == [1, 0]
    assert "testlist02.txt: 1 lines name a video that an earlier line names" in caplog.text


def test_broken_layouts_are_named(root):
    with pytest.raises(UserError, match="trainlist01.txt: no such list; expected UCF-101 as published"):
        build_videos(dataset(root), "trainlist{fold:02d}")
    (root / "ucfTrainTestlist/testlist03.txt").mkdir()
    with pytest.raises(
        UserError, match="testlist03.txt: cannot be read: Is a directory; expected UCF-101 as published"
    ):
        build_videos(dataset(root), "testlist03")
    with pytest.raises(UserError, match="only {fold} may stand in braces"):
        build_videos(dataset(root), "trainlist{x}")
    (root / "ucfTrainTestlist/testlist02.txt").write_text("Golf/v_Golf_g01_c01.avi\n")
    with pytest.raises(UserError, match="its folder is no class of classInd.txt"):
        build_videos(dataset(root), "testlist02")
    (root / "ucfTrainTestlist/testlist02.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no video"):
        build_videos(dataset(root), "testlist02")
    (root / "ucfTrainTestlist/classInd.txt").write_text("Golf\n")
    with pytest.raises(UserError, match="expected a number and a class name"):
        build_videos(dataset(root), "testlist02")


def test_lists_in_one_file_are_named(root):
    shutil.rmtree(root / "ucfTrainTestlist")
    (root / "ucfTrainTestlist").write_text("Basketball/v_Basketball_g01_c01.avi 1")
    with pytest.raises(UserError, match="classInd.txt: cannot be read: Not a directory; expected UCF-101 as published"):
        build_videos(dataset(root), "testlist02")


def test_the_published_files_are_read(clips_root):
    for split in ("trainlist01", "testlist01"):
        videos = build_videos(dataset(clips_root / "fixtures/ucf101"), split)
        assert len(videos) == 2 and all(videos.path(i).is_file() for i in range(2))
