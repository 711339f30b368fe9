"""datasets.concepts: unseen classes in either spelling, nested few-shot subsets."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from datasets import build_fold
from datasets.concepts import REST_CLASSES, few_shot_rows, make_parts, read_unseen, rest_classes_file
from datasets.video_dataset import VideoList
from utils.config import load_config
from utils.errors import UserError

CLASSES = ("HandstandPushups", "YoYo", "shake_hands")


def videos(counts, order=None):
    names = [(f"{CLASSES[label]}/{i}.mp4", label) for label, count in enumerate(counts) for i in range(count)]
    names = names if order is None else [names[i] for i in order]
    return VideoList("/data", [name for name, _ in names], [label for _, label in names], CLASSES)


def names_of(found, rows):
    return {found.name(row) for row in rows}


def test_few_shot_subsets_are_floored_nested_and_free_of_the_list_order():
    full = videos((10, 7, 1))
    rows = {ratio: few_shot_rows(full, ratio, 42) for ratio in (0.1, 0.2, 0.3, 0.7, 1.0)}
    for ratio, counts in ((0.1, [1, 1, 1]), (0.2, [2, 1, 1]), (0.3, [3, 2, 1]), (0.7, [7, 4, 1]), (1.0, [10, 7, 1])):
        assert np.bincount(full.labels[rows[ratio]].numpy()).tolist() == counts
    subsets = [names_of(full, rows[ratio]) for ratio in sorted(rows)]
    assert all(small <= large for small, large in zip(subsets, subsets[1:]))
    turned = videos((10, 7, 1), order=np.random.default_rng(0).permutation(18))
    assert names_of(turned, few_shot_rows(turned, 0.3, 42)) == names_of(full, rows[0.3])
    alone = full.subset(range(10))
    assert names_of(alone, few_shot_rows(alone, 0.3, 42)) < names_of(full, rows[0.3])
    assert names_of(full, few_shot_rows(full, 0.3, 7)) != names_of(full, rows[0.3])
    assert few_shot_rows(full, None, 42).tolist() == list(range(18))
    assert len(few_shot_rows(videos((100,)), 0.29, 42)) == 29  # 0.29 * 100 is a little less


def test_a_folds_few_shot_subset_has_a_seed_of_its_own(monkeypatch):
    train, test = videos((10, 7, 4)), VideoList("/data", [f"{i}.mp4" for i in range(3)], range(3), CLASSES)
    lists = {"train": train, "test": test}
    monkeypatch.setattr("datasets.build_labelled", lambda cfg, part, fold, allow_missing: (lists[part], [], []))
    args = Namespace(few_shot_ratio=0.5, use_rest_classes=False, allow_missing=False)
    for seed, few_shot_seed in ((0, 42), (3, 42), (3, 7)):
        changes = [f"seed={seed}", f"few_shot_seed={few_shot_seed}", "model.args.n_classes=3"]
        data = build_fold(load_config("configs/ucf/8at16-linear.yaml", changes), 1, args)
        assert data.chosen.tolist() == few_shot_rows(train, 0.5, few_shot_seed).tolist()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_other_ratios_are_refused(ratio):
    with pytest.raises(UserError, match="--few-shot-ratio"):
        few_shot_rows(videos((2, 2, 2)), ratio, 42)


def test_unseen_classes_in_either_spelling(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("# two of them\nhandstand pushups\n\nShake Hands\n")
    assert read_unseen(file, CLASSES) == ["HandstandPushups", "shake_hands"]
    file.write_text("shake hand\n")
    with pytest.raises(UserError, match="'shake hand' is none of the 3 classes.*nearest is shake_hands"):
        read_unseen(file, CLASSES)
    with pytest.raises(UserError, match="dataset.rest_classes: .*cannot be read"):
        read_unseen(tmp_path / "absent", CLASSES)


def test_parts_have_labels_of_their_own(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("yo yo\n")
    train, test = videos((3, 2, 2)), videos((1, 1, 2))
    unseen, seen = make_parts(train, test, few_shot_rows(train, 0.5, 42), file)
    assert (unseen.name, unseen.classes, seen.classes) == ("unseen", ("YoYo",), ("HandstandPushups", "shake_hands"))
    assert unseen.test.tolist() == [1] and unseen.test_labels.tolist() == [0] and len(unseen.train) == 1
    assert seen.test.tolist() == [0, 2, 3] and seen.test_labels.tolist() == [0, 1, 1]
    assert seen.train_labels.tolist() == [0, 1] and set(seen.train.tolist()).isdisjoint(unseen.train.tolist())
    (everything,) = make_parts(train, test, np.arange(7))
    assert everything.name == "all" and everything.test_labels.tolist() == test.labels.tolist()
    file.write_text("\n".join(CLASSES))
    with pytest.raises(UserError, match="no training video in the 0 seen classes"):
        make_parts(train, test, np.arange(7), file)


def test_the_thesis_lists(tmp_path):
    labels = Path(__file__).parents[2] / "datasets/labels"
    for name, count in (("ucf101", 47), ("hmdb51", 29)):
        lines = (labels / f"{name}.txt").read_text().splitlines()
        classes = tuple(line for line in lines if line and not line.startswith("#"))
        assert len(set(read_unseen(REST_CLASSES[name], classes))) == count
    assert rest_classes_file({"rest_classes": "mine.txt", "name": "demo"}) == Path("mine.txt")
    with pytest.raises(UserError, match="no list for data set demo"):
        rest_classes_file({"rest_classes": None, "name": "demo"})
