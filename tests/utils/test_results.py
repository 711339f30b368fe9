"""utils.results and utils.evaluation: accuracies against a slow reference, files, the table of all results."""

import argparse
import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import tiny
from utils import evaluation, report, results
from utils.errors import UserError


def test_accuracies_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    videos, clips, classes = 11, 4, 7
    logits = torch.randn(videos, clips, classes, generator=generator)
    labels = torch.randint(classes, (videos,), generator=generator)
    clip_hits, video_hits = {1: 0, 5: 0}, {1: 0, 5: 0}
    for v in range(videos):
        score = np.zeros(classes)
        for c in range(clips):
            values = logits[v, c].double().numpy()
            exps = [math.exp(value) for value in values]
            score += np.array(exps) / sum(exps) / clips
            for k in clip_hits:
                clip_hits[k] += int(labels[v]) in np.argsort(-values)[:k]
        for k in video_hits:
            video_hits[k] += int(labels[v]) in np.argsort(-score)[:k]
    found = evaluation.clip_accuracies(logits, labels) | evaluation.video_accuracies(logits, labels)
    for k in (1, 5):
        assert found[f"Clip@{k}"] == pytest.approx(100 * clip_hits[k] / (videos * clips))
        assert found[f"Video@{k}"] == pytest.approx(100 * video_hits[k] / videos)
    two = evaluation.clip_accuracies(logits[..., :2], labels.clamp_max(1))
    assert two["Clip@5"] == 100  # of two classes
    tied = evaluation.top_share(torch.zeros(3, 4), torch.tensor([0, 1, 2]), 1)
    assert tied == 0  # a network that tells nothing apart scores nothing
    assert evaluation.top_share(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 2]), 1) == 0


def test_a_video_s_scores_are_the_mean_of_its_clips_probabilities():
    """One clip that is sure does not outvote two: of the logits' mean, (2, 20 / 3), the other class is the largest."""
    logits, sure = torch.tensor([[[0.0, 20.0], [3.0, 0.0], [3.0, 0.0]]]), 1 / (1 + math.exp(-3))
    first = (1 / (1 + math.exp(20)) + 2 * sure) / 3
    assert evaluation.video_scores(logits)[0].exp().tolist() == pytest.approx([first, 1 - first])
    assert evaluation.video_accuracies(logits, torch.tensor([0]))["Video@1"] == 100


def test_a_video_s_probabilities_may_be_smaller_than_any_number():
    logits = torch.full((1, 10, 12), -900.0)
    logits[:, :, 0], logits[:, :, 1] = 0, -800
    assert evaluation.video_accuracies(logits, torch.tensor([1])) == {"Video@1": 0.0, "Video@5": 100.0}


def outcome(classes=3, seed=0, rate=1e-4, epochs=(50, 50)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(4)
    names = [f"class {i}" for i in range(classes)]
    return results.Outcome(
        names, labels, {rate: {"pool": torch.randn(4 * classes, 6, classes, generator=generator)}}, 4, epochs
    )


def facts(fold, **changes):
    named = {"kind": "linear", "benchmark": "ucf101-linear-8at16", "dataset": "ucf101", "model": "VGGSound-N1024"}
    return named | {"arch": "av_wrapper", "variant": "", "fold": fold, "learning_rate": 1e-4, **changes}


def test_per_class_figures_add_up(tmp_path):
    written = results.finish_evaluation(tmp_path, facts(1), {"all": outcome(classes=101)})
    with (tmp_path / "per-class-pool.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 101
    for name in results.ACCURACIES:
        mean = np.mean([float(row[name]) for row in rows])
        assert mean == pytest.approx(written["results"]["pool"][name], abs=0.01)
    assert json.loads((tmp_path / "results.json").read_text()) == written
    assert (tmp_path / "confusion-pool.png").stat().st_size > 20_000


def test_all_results_in_one_table_beside_the_thesis(tmp_path, capsys):
    folds = []
    for fold in (1, 2, 3):
        folder = tmp_path / f"VGGSound-N1024/eval-x/fold-{fold:02d}"
        folder.mkdir(parents=True)
        folds.append(results.finish_evaluation(folder, facts(fold), {"all": outcome(seed=fold)}))
    other = tmp_path / "demo"
    other.mkdir()
    parts = {"unseen": outcome(seed=5), "seen": outcome(seed=6)}
    results.finish_evaluation(other, facts(1, variant="rest-classes", kind="finetune"), parts)
    results.finish_folds(tmp_path / "folds.json", folds)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.json").write_text("{}")
    rows = results.collect(tmp_path)
    assert [(row["kind"], row["part"], row["folds"]) for row in rows] == [
        ("finetune", "seen", 1), ("finetune", "unseen", 1), ("linear", "all", 3)
    ]  # fmt: skip
    values = [fold["results"]["pool"]["Video@1"] for fold in folds]
    assert rows[2]["Video@1"] == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1))}
    kept = json.loads((tmp_path / "folds.json").read_text())
    assert kept["folds"] == [1, 2, 3] and kept["mean"][0]["Video@1"] == rows[2]["Video@1"]
    text, markdown = results.summary(rows, "text"), results.summary(rows, "markdown")
    assert (
        "51.20" in text and "80.91" in text and "does not say" in text and markdown.startswith("| evaluation | data |")
    )
    assert all("thesis" not in results.summary(rows[:2], form) for form in ("text", "markdown"))
    table = list(csv.DictReader(io.StringIO(results.summary(rows, "csv"))))
    assert [row["thesis top-1"] for row in table] == ["", "", "51.20"] and table[2]["folds"] == "3"
    assert results.thesis_figures(rows[2]) == (51.20, 80.91)
    others = {"benchmark": "ucf101-linear-8at16-random"}, {"variant": "few-shot-0.1"}, {"part": "unseen"}
    for other in (*others, {"feature": "conv4x"}):
        assert results.thesis_figures(rows[2] | other) is None
    file = "checkpoint-VGGSound_N1024-best-4e8236"
    assert results.thesis_figures(rows[2] | {"variant": file}) == (51.20, 80.91)
    assert results.thesis_figures(rows[2] | {"variant": f"{file}_few-shot-0.1"}) is None
    command = [sys.executable, "-m", "utils.report", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=tiny.REPO, env=tiny.ENV)
    assert printed.stdout == text
    with pytest.raises(UserError, match="no results.json below it"):
        results.collect(_empty(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        results.collect(tmp_path / "absent")


def test_folds_of_other_recipes_are_not_averaged(tmp_path, caplog):
    for fold, rate in ((1, 0.5), (2, 1e-4), (3, 1e-4)):
        folder = tmp_path / f"VGGSound-N1024/eval-x/fold-{fold:02d}"
        folder.mkdir(parents=True)
        recipe = {"optimizer.lr.base_lr": rate, "dataset.fold": fold, "dataset.train.split": f"trainlist0{fold}"}
        made = facts(fold, learning_rate=rate, recipe=recipe)
        results.finish_evaluation(folder, made, {"all": outcome(seed=fold, rate=rate)})
    assert sorted(row["folds"] for row in results.collect(tmp_path)) == [1, 2]
    assert "these results differ in optimizer.lr.base_lr; evaluate them alike" in caplog.text


def test_runs_of_one_name_are_not_folds_of_each_other(tmp_path):
    for place, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / place / "VGGSound-N1024/eval-x/fold-01"
        folder.mkdir(parents=True)
        results.finish_evaluation(folder, facts(1), {"all": outcome(seed=seed)})
    rows = results.collect(tmp_path)
    assert [row["folds"] for row in rows] == [1, 1]
    table = list(csv.DictReader(io.StringIO(results.summary(rows, "csv"))))
    assert [row["model"] for row in table] == [
        f"VGGSound-N1024 ({tmp_path}/{place}/VGGSound-N1024)" for place in ("a", "b")
    ]
    assert {row["benchmark"] for row in table} == {"ucf101-linear-8at16"}


def test_the_table_tells_what_bn_did(tmp_path):
    for fold, mode in ((1, "eval"), (2, "train")):
        folder = tmp_path / f"VGGSound-N1024/eval-x/fold-{fold:02d}"
        folder.mkdir(parents=True)
        results.finish_evaluation(folder, facts(fold, encoder={"bn": mode}), {"all": outcome()})
    table = list(csv.DictReader(io.StringIO(results.summary(results.collect(tmp_path), "csv"))))
    assert [(row["variant"], row["folds"]) for row in table] == [("", "1"), ("encoder_bn: train", "1")]


def test_the_table_tells_what_is_unfinished_and_what_is_random(tmp_path, caplog):
    rate, kinds = 10**-2.5, {"a": {"epochs": (50, 50)}, "b": {"epochs": (12, 50)}}
    for name, options in kinds.items():
        (tmp_path / name).mkdir()
        weights = {"weights": "random weights" if name == "a" else "ours", "bn": "eval"}
        about = facts(1, benchmark=f"{name}-random", learning_rate=rate, encoder=weights)
        results.finish_evaluation(tmp_path / name, about, {"all": outcome(rate=rate, **options)})
    assert "trained for 12 of 50 epochs" in caplog.text
    table = list(csv.DictReader(io.StringIO(results.summary(results.collect(tmp_path), "csv"))))
    assert [row["variant"] for row in table] == ["random", "unfinished"]


@pytest.mark.parametrize("options", [("--form", "csv", "{}"), ("{}", "--form=csv"), ("results", "{}", "--form", "csv")])
def test_options_may_come_before_the_folder(tmp_path, options, monkeypatch, capsys):
    results.finish_evaluation(tmp_path, facts(1), {"all": outcome()})
    monkeypatch.setattr(sys, "argv", ["report", *(option.format(tmp_path) for option in options)])
    report.main()
    assert capsys.readouterr().out.startswith("evaluation,data,benchmark,model")


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def test_near_neighbours_are_told_apart():
    """Both figures of the nearest one are the same; in float32 these would be equally near, and the first one's."""
    gallery = torch.ones(2000, 512, dtype=torch.float64) + 1e-5 * torch.randn(2000, 512, dtype=torch.float64)
    labels, queries = torch.arange(2000) % 10, gallery + 1e-6 * torch.randn(2000, 512, dtype=torch.float64)
    found = results.neighbours({"pool": gallery[:, None]}, labels, {"pool": queries[:, None]}, labels, num_random=0)[
        "pool"
    ]
    assert found["R@1"] == found["kNN@1"] == 100


def test_a_learning_rate_that_is_nearly_the_base_one_is_no_fold(tmp_path):
    one = outcome(seed=1)
    rates = {1e-4: one.logits[1e-4], 1.0000001e-4: one.logits[1e-4]}
    results.finish_evaluation(tmp_path, facts(1), {"all": dataclasses.replace(one, logits=rates)})
    assert [row["folds"] for row in results.collect(tmp_path)] == [1]


def test_figures_of_a_class_are_of_its_own_videos(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "draw_confusion", lambda confusion, *rest: drawn.append(confusion.tolist()))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])[:, None]  # taken for a, b, b
    results.write_classes(tmp_path, "pool", ("a", "b"), logits, logits, torch.tensor([0, 0, 1]))
    with (tmp_path / "per-class-pool.csv").open() as file:
        a, b = csv.DictReader(file)
    assert (a["videos"], a["Clip@1"], a["Video@1"], a["most often taken for"], a["times"]) == (
        "2", "50.00", "50.00", "b", "1"
    )  # fmt: skip
    assert (b["videos"], b["Clip@1"], b["Video@1"], b["times"]) == ("1", "100.00", "100.00", "0")
    assert drawn == [[[1, 1], [0, 1]]]


def test_neighbours_are_of_the_clips_over_the_whole_video():
    corners = torch.eye(2)
    gallery, labels = corners[:, None], torch.arange(2)
    queries = torch.stack([3 * corners.flip(0), 3 * corners.flip(0), corners], dim=1)  # the first two at random times
    found = results.neighbours({"pool": gallery}, labels, {"pool": queries}, labels, num_random=2)["pool"]
    assert found["kNN@1"] == found["R@1"] == 100


def test_a_training_video_is_the_mean_of_its_views():
    """The first view of each is that of the other class."""
    views = torch.tensor([[[0.0, 1.0], [3.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]])
    labels, queries = torch.arange(2), torch.eye(2)[:, None]
    found = results.neighbours({"pool": views}, labels, {"pool": queries}, labels, num_random=0)["pool"]
    assert found["kNN@1"] == found["R@1"] == 100


def test_a_stored_classifier_goes_on_with_its_encoder_videos_and_recipe_alone(tmp_path, caplog):
    made = {"encoder": "a", "data": "b", "recipe": {"parts": ["all"], "seed": 0}}
    stored = evaluation.StoredClassifier(tmp_path, {"resume": True, "test_only": False}, **made)
    assert stored.load() == {}
    stored.save("all", epoch=3)
    assert stored.load() == {"all": {"epoch": 3}}
    for change, told in (
        ({"encoder": "c"}, "trained with encoder a, now c"),
        ({"data": "c"}, "trained with data b, now c"),
        ({"recipe": {"parts": ["all"], "seed": 1}}, "trained with seed 0, now 1"),
    ):
        with pytest.raises(UserError, match=told):
            evaluation.StoredClassifier(tmp_path, stored.cfg, **{**made, **change}).load()
    with caplog.at_level("WARNING", logger="avssrl"):
        evaluation.StoredClassifier(tmp_path, stored.cfg, **made, precision="bf16").load()
    assert "it was trained in fp32, now bf16" in caplog.text


def test_variants_of_an_evaluation_have_folders_of_their_own(tmp_path):
    plain = {"checkpoint": None, "random_weights": False, "few_shot_ratio": None, "use_rest_classes": False}

    def variant(seed=0, few_shot_seed=42, benchmark="x", rest_classes=None, **options):
        cfg = {"benchmark": {"name": benchmark}, "few_shot_seed": few_shot_seed, "seed": seed}
        cfg["dataset"] = {"rest_classes": rest_classes}
        return evaluation.variant(argparse.Namespace(**{**plain, **options}), cfg)

    assert variant() == "" and variant(seed=1) == "seed-1"
    assert variant(seed=2, few_shot_seed=3, few_shot_ratio=0.1) == "few-shot-0.1-seed-3_seed-2"
    lists = [tmp_path / f"{folder}/mine.txt" for folder in "abc"]
    for file, text in zip(lists, ("x\n", "y\n", "x\n"), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    lists = [variant(use_rest_classes=True, rest_classes=str(file)) for file in lists]
    assert lists[0].startswith("rest-classes-mine-") and lists[0] != lists[1] and lists[0] == lists[2]
    assert variant(benchmark="x-random") == "pretrained" and variant(benchmark="x-random", random_weights=True) == ""
    assert variant(few_shot_ratio=1.0) == "few-shot-1" and variant(few_shot_ratio=1 / 3) == f"few-shot-{1 / 3!r}"
    assert variant(random_weights=True, use_rest_classes=True) == "random-weights_rest-classes"
    assert variant(checkpoint="a/b.pth.tar") != variant(checkpoint="b.pth.tar")


def _rank_with_another_encoder(own_rank, folder):
    store = dist.FileStore(f"{folder}/meet", 2)
    dist.init_process_group("gloo", store=store, rank=own_rank, world_size=2)
    made = {"encoder": f"hash-{own_rank}", "data": "d", "recipe": {"parts": {}}}
    stored = evaluation.StoredClassifier(Path(folder), {"resume": True, "test_only": False}, **made)
    with pytest.raises(UserError, match="loaded different encoders"):
        stored.load()
    dist.destroy_process_group()


def test_processes_that_loaded_different_encoders(run_ranks, tmp_path):
    run_ranks(_rank_with_another_encoder, 2, str(tmp_path))
