"""datasets.hmdb: HMDB-51 as published, odd names included."""

import logging

import pytest

from datasets import build_videos
from utils.config import load_config
from utils.errors import UserError

ODD = "(HQ)_#1_Don't_stop!_&_go_[x]_shake_hands_f_cm_np2_le_med_6.avi"
SPACED = "a name with spaces_shake_hands_u_nm_np1_fr_bad_0.avi"


def dataset(root, **changes):
    section = load_config("configs/hmdb51/8at16-linear.yaml", [f"dataset.root={root}"])["dataset"]
    return section | changes


@pytest.fixture
def root(tmp_path):
    (tmp_path / "videos").mkdir()
    splits = tmp_path / "splits"
    splits.mkdir()
    for fold in (1, 2):
        first = "1" if fold == 1 else "2"
        (splits / f"shake_hands_test_split{fold}.txt").write_text(f"{ODD} {first} \n{SPACED} 2 \nnot_used.avi 0 \n")
        (splits / f"brush_hair_test_split{fold}.txt").write_bytes(b"caf\xe9_brush_hair.avi 1 \r\nb.avi 2 \r\n")
    return tmp_path


def test_names_labels_and_classes(root):
    (root / "splits/._brush_hair_test_split1.txt").write_bytes(b"\0\5\x16\7")  # macOS leaves such files
    train, test = build_videos(dataset(root), "train-split{fold}"), build_videos(dataset(root), "test-split1")
    assert train.classes == ("brush_hair", "shake_hands") == test.classes
    assert [train.name(i) for i in range(2)][1] == f"videos/shake_hands/{ODD}"
    assert bytes(train.path(0)).endswith(b"videos/brush_hair/caf\xe9_brush_hair.avi")
    assert [test.name(i) for i in range(len(test))] == ["videos/brush_hair/b.avi", f"videos/shake_hands/{SPACED}"]
    assert train.labels.tolist() == [0, 1] == test.labels.tolist()
    second = build_videos(dataset(root, fold=2), "train-split{fold}")
    assert len(second) == 1


def test_signs_that_break_lines_elsewhere(root):
    names = ["x\u0085y.avi", "z\u2028w.avi", "v\x0bu.avi"]
    (root / "splits/brush_hair_test_split1.txt").write_text("".join(f"{name} 2 \r\n" for name in names), newline="")
    test = build_videos(dataset(root), "test-split1")
    assert set(test.names()) >= {f"videos/brush_hair/{name}" for name in names}


def test_a_video_that_is_listed_twice_counts_once(root, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("avssrl"), "propagate", True)
    with (root / "splits/brush_hair_test_split1.txt").open("a") as file:
        file.write("b.avi 2\nc.avi 2\n")
    test = build_videos(dataset(root), "test-split1")
    assert test.names() == ["videos/brush_hair/b.avi", "videos/brush_hair/c.avi", f"videos/shake_hands/{SPACED}"]
    assert test.labels.tolist() == [0, 0, 1]
    assert "brush_hair_test_split1.txt: 1 lines name a video" in caplog.text


@pytest.mark.parametrize(
    ("split", "fold", "words"),
    [("trainlist{fold:02d}", 1, "train-split"), ("train-split{fold}", 7, "no file \\*_test_split7.txt")],
)
def test_other_splits_are_refused(root, split, fold, words):
    with pytest.raises(UserError, match=words):
        build_videos(dataset(root, fold=fold), split)


def test_broken_layouts_are_named(root):
    (root / "splits/shake_hands_test_split1.txt").write_text("only_a_name.avi\n")
    with pytest.raises(UserError, match="expected a file name and 0, 1 or 2"):
        build_videos(dataset(root), "train-split1")
    (root / "videos").rmdir()
    with pytest.raises(UserError, match="neither videos/ nor hmdb51_org/ is there"):
        build_videos(dataset(root), "train-split1")


def test_the_published_files_are_read(clips_root):
    train = build_videos(dataset(clips_root / "fixtures/hmdb51"), "train-split1")
    assert len(train) == 2 and all(train.path(i).is_file() for i in range(2)) and train.classes == ("cartwheel", "wave")
