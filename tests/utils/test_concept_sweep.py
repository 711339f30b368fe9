"""Concept generalization: results collected over seeds, the table, the CSV and the plot behind them; the sweep."""

import csv
import json
import os
import signal

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tests import tiny
from tests.tiny_evaluation import CLASSES, make_ucf, write_evaluation
from utils import concepts
from utils.errors import UserError
from utils.results import ACCURACIES


def write_result(
    root,
    model="xid",
    ratio=None,
    seed=42,
    top1=50.0,
    fold=1,
    weights="our checkpoint of xid",
    bn="eval",
    name="b",
    variant="rest-classes",
    backbone="R2Plus1d depth 18",
    **recipe,
):
    """A `results.json` as the linear script writes it, with seen concepts 10 points above unseen ones."""
    folder = (
        root / model / f"eval-{name}/fold-{fold:02d}/{ratio}-{seed}-{weights == concepts.RANDOM}-{variant}-{backbone}"
    )
    folder.mkdir(parents=True)
    parts = {
        part: {"pool": dict.fromkeys(ACCURACIES, top1 + more) | {"clips": 40, "videos": 8}}
        for part, more in (("unseen", 0.0), ("seen", 10.0))
    }
    content = {
        "results": parts,
        "kind": "linear",
        "dataset": "ucf101",
        "benchmark": name,
        "model": model,
        "variant": variant,
        "backbone": backbone,
        "encoder": {"weights": weights, "bn": bn},
        "few_shot": ratio and {"ratio": ratio, "seed": seed, "videos": []},
        "recipe": {
            "seed": 0,
            "few_shot_seed": seed,
            **recipe,
            "parts": {"unseen": ["a", "b"], "seen": ["c", "d", "e"]},
        },
    }
    (folder / "results.json").write_text(json.dumps(content))


def test_rows_are_means_and_deviations_over_seeds(tmp_path):
    for seed, top1 in ((1, 40.0), (2, 44.0), (3, 51.0)):
        write_result(tmp_path, ratio=0.1, seed=seed, top1=top1)
    write_result(tmp_path, top1=70.0)
    rows = {(row["part"], row["ratio"]): row for row in concepts.collect_concepts([tmp_path])}
    assert set(rows) == {(part, ratio) for part in ("unseen", "seen") for ratio in (0.1, 1.0)}
    few = rows["unseen", 0.1]
    assert few["Video@1 mean"] == pytest.approx(45.0)
    assert few["Video@1 std"] == pytest.approx(np.std([40, 44, 51], ddof=1))
    assert (few["seeds"], few["classes"], few["videos"]) == (3, 2, 8)
    assert rows["seen", 0.1]["Video@1 mean"] == pytest.approx(55.0)
    assert (rows["unseen", 1.0]["seeds"], rows["unseen", 1.0]["Video@1 std"]) == (1, 0.0)


def test_folds_of_a_seed_are_averaged_first(tmp_path):
    for fold, top1 in ((1, 40.0), (2, 60.0)):
        write_result(tmp_path, ratio=0.1, seed=1, top1=top1, fold=fold)
    write_result(tmp_path, ratio=0.1, seed=2, top1=52.0)
    (row,) = (row for row in concepts.collect_concepts([tmp_path]) if row["part"] == "unseen")
    assert (row["seeds"], row["Video@1 mean"]) == (2, pytest.approx(51.0))


def test_points_of_other_recipes_are_told(tmp_path, caplog):
    write_result(tmp_path, ratio=0.1, seed=1)
    write_result(tmp_path, ratio=0.5, seed=2)
    concepts.collect_concepts([tmp_path])
    assert not caplog.text
    write_result(tmp_path, feature_views=5)
    concepts.collect_concepts([tmp_path])
    assert "ucf101 b xid: these results differ in feature_views" in caplog.text


def test_the_whole_set_has_one_subset_whatever_the_seed(tmp_path):
    write_result(tmp_path, ratio=1.0, seed=1)
    write_result(tmp_path, ratio=1.0, seed=2)
    assert {row["seeds"] for row in concepts.collect_concepts([tmp_path])} == {1}


def test_random_weights_are_a_method_of_their_own(tmp_path):
    write_result(tmp_path)
    write_result(tmp_path, weights=concepts.RANDOM, top1=20.0)
    rows = concepts.collect_concepts([tmp_path])
    assert {row["method"] for row in rows} == {"xid", concepts.RANDOM}


def test_checkpoints_and_random_backbones_are_methods_of_their_own(tmp_path):
    for name, top1 in (("vgg_ep50-90a0ca", 90.0), ("vgg_ep100-0b1c2d", 10.0)):
        write_result(tmp_path, variant=f"checkpoint-{name}_few-shot-0.5_rest-classes", top1=top1)
    for depth, top1 in ((10, 20.0), (18, 30.0)):
        write_result(tmp_path, weights=concepts.RANDOM, backbone=f"R2Plus1d depth {depth}", top1=top1)
    rows = concepts.collect_concepts([tmp_path])
    assert {row["method"]: row["Video@1 mean"] for row in rows if row["part"] == "unseen"} == {
        "xid checkpoint-vgg_ep50-90a0ca": 90.0,
        "xid checkpoint-vgg_ep100-0b1c2d": 10.0,
        "random weights (R2Plus1d depth 10)": 20.0,
        "random weights (R2Plus1d depth 18)": 30.0,
    }


def test_another_list_of_unseen_classes_is_a_line_of_its_own(tmp_path):
    write_result(tmp_path, top1=40.0)
    (row,) = [row for row in concepts.collect_concepts([tmp_path]) if row["part"] == "unseen"]
    assert row["method"] == "xid"
    write_result(tmp_path, variant="rest-classes-mine-0b1c2d", top1=80.0, **{"dataset.rest_classes": "x/mine.txt"})
    rows = [row for row in concepts.collect_concepts([tmp_path]) if row["part"] == "unseen"]
    assert sorted(row["Video@1 mean"] for row in rows) == [40.0, 80.0]
    assert any(row["method"].endswith("mine.txt)") for row in rows)


def test_runs_of_one_name_are_methods_of_their_own(tmp_path):
    for place, top1 in (("a", 40.0), ("b", 60.0)):
        write_result(tmp_path / place, top1=top1)
        write_result(tmp_path / place, weights=concepts.RANDOM)
    rows = concepts.collect_concepts([tmp_path / "a", tmp_path / "b"])
    found = {row["method"]: row["Video@1 mean"] for row in rows if row["part"] == "unseen"}
    assert found == {f"xid ({tmp_path}/a/xid)": 40.0, f"xid ({tmp_path}/b/xid)": 60.0, concepts.RANDOM: 50.0}


def test_benchmarks_and_modes_of_bn_are_told_apart(tmp_path):
    write_result(tmp_path)
    write_result(tmp_path, name="c", bn="train")
    rows = concepts.collect_concepts([tmp_path])
    table = concepts.concepts_table(rows)
    assert "ucf101 (b), xid, unseen" in table and "ucf101 (c), xid encoder_bn: train, unseen" in table
    assert {axes.get_title() for axes in concepts.draw_concepts(rows).axes} == {
        f"ucf101 ({name}), {title} (3 seen, 2 unseen classes)" for name in "bc" for title in ("top-1", "top-5")
    }


def test_csv_table_and_picture(tmp_path):
    write_result(tmp_path, ratio=0.1)
    write_result(tmp_path, ratio=0.5, top1=60.0)
    rows = concepts.collect_concepts([tmp_path])
    concepts.report_concepts([tmp_path], tmp_path / "plot.png")
    with (tmp_path / "plot.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 4
    assert tuple(lines[0]) == concepts.COLUMNS
    assert {float(line["Video@1 mean"]) for line in lines} == {50.0, 60.0, 70.0}
    table = concepts.concepts_table(rows)
    assert "10%" in table and "ucf101, xid, unseen" in table
    figure = concepts.draw_concepts(rows)
    solid, dashed = (line for line in figure.axes[0].get_lines() if line.get_marker() == "o")
    assert solid.get_linestyle() == "-" and dashed.get_linestyle() == "--"
    assert list(solid.get_xdata()) == [0.1, 0.5] and list(solid.get_ydata()) == [50.0, 60.0]
    assert plt.imread(tmp_path / "plot.png").shape[0] > 300


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="--use-rest-classes"):
        concepts.collect_concepts([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        concepts.collect_concepts([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def swept(tmp_path_factory, make_video):
    """A folder, and what starts a sweep over two ratios in it."""
    folder = tmp_path_factory.mktemp("sweep")
    root = make_ucf(folder / "ucf", make_video)
    cfg = write_evaluation(folder, root, dataset__rest_classes=str(folder / "unseen.txt"))
    (folder / "unseen.txt").write_text(f"{CLASSES[0]}\n")
    model = tiny.write_config(folder, folder, "net")
    options = ("--ratios", 0.5, 1, "--seeds", 1, 2, "--set", "feature_views=2", "--out", folder / "out.png")
    (folder / "runs/net").mkdir(parents=True)
    return folder, lambda *more: tiny.Started(cfg, model, *options, *more, script="utils/sweep.py")


def test_a_sweep_says_what_is_missing(swept):
    _, start = swept
    ended = start().wait()  # the model itself was never pre-trained
    assert ended.returncode == 1
    assert (
        "no such checkpoint" in ended.stderr
        and "failed: eval-action-recg-linear.py ended with status 2" in ended.stderr
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_a_sweep_that_is_told_to_end_takes_its_evaluation_along(swept):
    sweep = swept[1]()
    (process,) = sweep.processes
    tiny.wait_until(lambda: tiny.children(process.pid))
    (evaluation,) = tiny.children(process.pid)
    sweep.signal(signal.SIGUSR1)
    ended = sweep.wait()
    assert ended.returncode == 75 and "preempted: stopped by a signal; run it again to go on" in ended.stderr
    assert not os.path.exists(f"/proc/{evaluation}")


def test_a_sweep_makes_features_once_and_goes_on(swept):
    import torch

    from models import build_model
    from utils import checkpoint
    from utils.config import load_config

    folder, start = swept
    torch.manual_seed(1)
    weights = build_model(load_config(folder / "net.yaml")["model"]).state_dict()
    checkpoint.save(folder / "runs/net", {"epoch": 1, "model": weights, "train_criterion": {}})
    ended = start().wait()
    assert ended.returncode == 0, ended.stderr
    assert "3/3" in ended.stdout and (folder / "out.png").is_file()
    logs = sorted((folder / "runs/net").rglob("train.log"))
    assert len(logs) == 3  # two subsets of a half, the whole
    made = [log.read_text().count("kept in") for log in sorted(logs, key=os.path.getmtime)]
    assert made == [2, 0, 0]  # features of the training and of the test videos, once
    with (folder / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["part"], line["ratio"]) for line in lines} == {
        (part, ratio) for part in ("unseen", "seen") for ratio in ("0.5", "1")
    }
    assert {line["seeds"] for line in lines if line["ratio"] == "0.5"} == {"2"}
    again = start("--ratios", 0.5, "--seeds", 2).wait()
    assert again.returncode == 0 and "1/1" in again.stdout, again.stderr
    before, _, last = max(logs, key=os.path.getmtime).read_text().rpartition("---- Run")
    assert "epoch 2/2" in before and "epoch 2/2" not in last  # nothing was trained again
    anew = start("--anew")
    tiny.wait_until(lambda: not any(log.with_name(checkpoint.LATEST).exists() for log in logs[1:]))
    anew.signal(signal.SIGUSR1)
    assert "run it again without --anew to go on" in anew.wait().stderr
    assert checkpoint.load(logs[0].with_name(checkpoint.LATEST))["parts"]  # the first was made anew


def test_a_sweep_that_cannot_begin_anew_deletes_nothing(swept):
    folder, start = swept
    file = folder / "runs/net/eval-tiny/fold-01/few-shot-0.5-seed-1_rest-classes/checkpoint.pth.tar"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert start("--anew", "--set", "dataset.root=/nowhere").wait().returncode == 1
    assert file.exists()
