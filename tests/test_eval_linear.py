"""eval-action-recg-linear.py as a user runs it: real files, real processes."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from datasets import build_fresh_clips, build_labelled
from datasets.concepts import Part
from tests import tiny, tiny_evaluation
from utils import checkpoint, results
from utils.config import load_config
from utils.errors import RunFailed, UserError

SCRIPT, CPU = "eval-action-recg-linear.py", torch.device("cpu")


@pytest.fixture(scope="module")
def ucf(tmp_path_factory, make_video):
    return tiny_evaluation.make_ucf(tmp_path_factory.mktemp("ucf"), make_video)


@pytest.fixture
def cfgs(tmp_path, ucf):
    """Writes an evaluation's configuration; returns it and that of the model."""

    def write(**changes):
        root = changes.pop("root", ucf)
        return tiny_evaluation.write_evaluation(tmp_path, root, **changes), tiny.write_config(tmp_path, root)

    return write


def evaluate(folder, *arguments, ranks=1):
    return tiny_evaluation.results(folder, SCRIPT, *arguments, ranks=ranks)


def fail(*arguments):
    return tiny_evaluation.mistake(SCRIPT, *arguments)


def test_results_hold_what_they_promise(cfgs, tmp_path):
    two = {"model__args__feat_names": ["pool", "conv4x"], "model__args__pooling_ops": [None, "AdaptiveAvgPool3d(1)"]}
    shape = {"model__args__feat_dims": [512, 256], "model__args__use_bn": [False, True]}
    cfg, model = cfgs(**two, **shape, feature_views=2, optimizer__other_lrs=[0.1])
    tiny_evaluation.run_here(SCRIPT, cfg, model, "--random-weights", "--quiet")
    folder = tmp_path / "runs/tiny/eval-tiny/fold-01/random-weights"
    found = json.loads((folder / "results.json").read_text())
    for figures in (found["results"]["pool"], found["results"]["conv4x"]):
        assert figures["clips"] == 6 * 4 and figures["clips_in_video_mode"] == 6 * 3 and figures["videos"] == 6
        assert figures["Clip@5"] == figures["Video@5"] == 100  # of two classes
        for name, of in (("Clip@1", 24), ("Video@1", 6)):
            hits = figures[name] * of / 100
            assert 0 <= hits <= of and hits == pytest.approx(round(hits))
    assert set(found["learning_rates"]["all"]) == {"0.01", "0.1"}
    assert set(found["neighbours"]["pool"]) >= {"kNN@1", "kNN@5", "R@1", "R@20"}
    assert found["encoder"]["hash"] == found["encoder"]["hash_after"]
    assert found["recipe"]["dataset.crop_size"] == 32 and found["encoder"]["weights"] == "random weights"
    with (folder / "per-class-conv4x.csv").open() as file:
        assert [row["videos"] for row in csv.DictReader(file)] == ["3", "3"]
    assert (folder / "confusion-pool.png").stat().st_size > 1000
    output = (folder / "train.log").read_text()
    assert "Clip@1" in output and "random weights" in output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    stored = checkpoint.load(folder / checkpoint.LATEST)["parts"]["all"]
    assert stored["epoch"] == 2 and set(stored["heads"]) == {0.01, 0.1}


@pytest.mark.parametrize(
    ("views", "ranks", "started"),
    [
        (0, 3, ()),  # 8 clips in batches of 3: 3, 3, 2
        (2, 1, ("--distributed", "--nproc", 2)),
    ],
)
def test_any_number_of_processes_finds_the_same(cfgs, tmp_path, views, ranks, started):
    cfg, model = cfgs(feature_views=views, optimizer__lr__base_lr=0.001, model__args__use_dropout=True)
    found = {}
    for name, many, options in (("one", 1, ()), ("many", ranks, started)):
        arguments = ("--random-weights", "--set", f"cache_dir={tmp_path / name}", *options)
        found[name] = evaluate(tmp_path, cfg, model, *arguments, ranks=many)
        file = next(tmp_path.glob("runs/**/checkpoint.pth.tar"))
        found[name]["head"] = checkpoint.load(file)["parts"]["all"]["heads"][0.001]
    one, many = found["one"], found["many"]
    heads = one.pop("head")
    for name, value in many.pop("head").items():
        torch.testing.assert_close(value, heads[name], atol=1e-5, rtol=1e-4)
    assert tiny_evaluation.comparable(many) == tiny_evaluation.comparable(one)


def test_the_thesis_bn_drifts_and_weights_do_not(cfgs, tmp_path):
    cfg, model = cfgs(encoder_bn="train", dataset__crop_size=64)
    found = {}
    for name, ranks in (("one", 1), ("three", 3)):  # the last batch has 2 clips
        found[name] = evaluate(tmp_path, cfg, model, "--random-weights", ranks=ranks)
        file = next(tmp_path.glob("runs/**/checkpoint.pth.tar"))
        found[name]["drift"] = checkpoint.load(file)["parts"]["all"]["drift"]
    encoder = found["one"]["encoder"]
    assert encoder["bn"] == "train" and encoder["hash"] != encoder["hash_after"]
    for name, value in found["three"]["drift"].items():
        torch.testing.assert_close(value, found["one"]["drift"][name], atol=2e-3, rtol=2e-2)
    assert "feature_views: 0" in fail(cfg, model, "--random-weights", "--set", "feature_views=1")


def test_features_are_made_once(cfgs, tmp_path):
    cfg, model = cfgs(feature_views=2)
    first = evaluate(tmp_path, cfg, model, "--random-weights")
    folders = sorted((tmp_path / "cache/features").iterdir())
    assert len(folders) == 2
    stored = [np.load(folder / "pool.npy") for folder in folders]
    assert sorted(array.shape for array in stored) == [(6, 7, 512), (8, 2, 512)]
    meanings = [json.loads((folder / "meaning.json").read_text()) for folder in folders]
    assert {meaning["clips"][1]: meaning["recipe"]["augment"] for meaning in meanings} == {2: True, 4: False}
    evaluate(tmp_path, cfg, model, "--random-weights", "--few-shot-ratio", 0.5)
    log = tmp_path / "runs/tiny/eval-tiny/fold-01/random-weights_few-shot-0.5/train.log"
    assert log.read_text().count("features: read from") == 2
    assert evaluate(tmp_path, cfg, model, "--random-weights")["results"] == first["results"]
    evaluate(tmp_path, cfg, model, "--random-weights", "--set", "dataset.video_fps=8")
    assert len(list((tmp_path / "cache/features").iterdir())) == 4
    evaluate(tmp_path, cfg, model, "--random-weights", "--set", "dataset.train.use_augmentation=false")
    assert len(list((tmp_path / "cache/features").iterdir())) == 5  # the test's stay what they were


def test_features_are_kept_for_what_they_were_made_of_alone(cfgs, monkeypatch):
    script, keys = tiny_evaluation.module_of(SCRIPT), set()
    monkeypatch.setattr(script, "stored_clip_outputs", lambda cache, meaning, *rest: keys.add(json.dumps(meaning)))
    file = cfgs()[0]
    videos = build_labelled(load_config(file), "train", 1, allow_missing=False)[0]
    clips = ({}, {"augment": True}, {"num_random": 2}, {"num_dense": 3})
    requests = [("a", videos, (), options) for options in clips]
    requests += [("b", videos, (), {}), ("a", videos.subset(range(4)), (), {})]
    changes = ("seed=1", "precision=bf16", "dataset.crop_size=48", "model.args.feat_names=[conv4x]")
    changes += ("model.args.pooling_ops=['AdaptiveAvgPool3d(1)']",)
    requests += [("a", videos, (change,), {}) for change in changes]
    for weights, of, change, options in requests:
        encoder = Mock(hash=weights, drifts=False, device=CPU)
        script.clip_features(load_config(file, change), of, encoder, None, None, **options)
    assert len(keys) == len(requests)


def test_stored_batches_take_one_of_the_views_at_every_position(cfgs):
    cfg = load_config(cfgs(feature_views=3, dataset__train__clips_per_video=2)[0])
    script, videos = tiny_evaluation.module_of(SCRIPT), torch.arange(8)
    part = Part("all", ("a", "b"), videos, videos % 2, videos[:0], videos[:0])
    views, readable = 10 * videos.float().numpy()[:, None, None] + np.arange(3, dtype=np.float32)[:, None], videos != 5

    def epoch(number):
        batches = list(script.stored_batches(cfg, part, ({"pool": views}, readable.numpy()), number))
        assert [progress for _, _, progress in batches] == [step / 5 for step in range(5)]
        values = torch.cat([features["pool"][:, 0] for features, _, _ in batches]).long()
        assert torch.equal(torch.cat([labels for _, labels, _ in batches]), values // 10 % 2)
        return values

    first, second = epoch(0), epoch(1)
    assert torch.equal(first, epoch(0)) and not torch.equal(first // 10, second // 10)
    assert sorted((first // 10).tolist()) == sorted(2 * videos[readable].tolist())
    assert set((first % 10).tolist()) == {0, 1, 2}
    cfg["dataset"]["train"]["use_shuffle"] = False
    first, second = epoch(0), epoch(1)
    assert (first // 10).tolist() == (second // 10).tolist() == 2 * videos[readable].tolist()
    assert not torch.equal(first % 10, second % 10)


def test_fresh_batches_are_of_new_clips_in_every_epoch(cfgs):
    cfg = load_config(cfgs(dataset__train__use_shuffle=False)[0])
    videos = build_labelled(cfg, "train", 1, allow_missing=False)[0]
    script, loader = tiny_evaluation.module_of(SCRIPT), build_fresh_clips(cfg, videos, CPU)
    encoder = Mock(training_features=lambda batch, shape: {"pool": batch["frames"].float().flatten(1)})

    def epoch(number):
        part, stop = Mock(train_labels=videos.labels), Mock(watch=iter)
        batches = list(script.fresh_batches(encoder, part, loader, Mock(), stop, number))
        assert [progress for _, _, progress in batches] == [0, 1 / 3, 2 / 3]
        assert torch.equal(torch.cat([labels for _, labels, _ in batches]), videos.labels)
        return torch.cat([features["pool"] for features, _, _ in batches])

    first = epoch(0)
    assert torch.equal(first, epoch(0)) and (first != epoch(1)).any(1).all()


def test_unseen_and_seen_classes_and_few_shot_subsets(cfgs, tmp_path):
    cfg, model = cfgs(feature_views=1)
    lists = tmp_path / "rest.txt"
    lists.write_text("# unseen\nhandstand pushups\n")
    more = ("--random-weights", "--use-rest-classes", "--set", f"dataset.rest_classes={lists}")
    found = {}
    for ratio in (0.3, 0.5):
        found[ratio] = evaluate(tmp_path, cfg, model, *more, "--few-shot-ratio", ratio)
        assert set(found[ratio]["results"]) == {"unseen", "seen"}
        assert all(part["pool"]["videos"] == 3 for part in found[ratio]["results"].values())
        assert found[ratio]["few_shot"]["seed"] == 42
    few, half = (found[ratio]["few_shot"]["videos"] for ratio in (0.3, 0.5))
    assert len(few) == 2 and len(half) == 4 and set(few) < set(half)
    (folder,) = tmp_path.glob("runs/tiny/eval-tiny/fold-01/random-weights_few-shot-0.5_rest-classes-*")
    assert (folder / "confusion-unseen-pool.png").is_file() and (folder / "per-class-seen-pool.csv").is_file()
    stored = checkpoint.load(folder / checkpoint.LATEST)
    del stored["parts"]["seen"]  # as if it had been killed before
    checkpoint.save(folder, stored)
    assert "no classifier for the seen classes yet" in fail(cfg, model, *more, "--few-shot-ratio", 0.5, "--test-only")
    lists.write_text("handstand pushup\n")
    assert "the nearest is HandstandPushups" in fail(cfg, model, *more)


def test_resume_and_test_only(cfgs, tmp_path, ucf):
    cfg, model = cfgs()
    base = (cfg, model, "--random-weights")
    assert "no stored classifier" in fail(*base, "--test-only")
    whole = evaluate(tmp_path, *base)
    tested = evaluate(tmp_path, *base, "--test-only")
    assert tested["results"] == whole["results"] and tested["precision"] == "fp32"
    written = next(tmp_path.glob("runs/**/config.yaml"))
    accepted = written.read_text()
    assert (written.parent / "confusion-pool.png").exists()
    assert "256 for feature pool, which has 512 values a clip" in fail(*base, "--set", "model.args.feat_dims=[256]")
    assert json.loads((written.parent / "results.json").read_text()) == tested  # a mistake costs no results
    shutil.copytree(ucf, tmp_path / "ucf", copy_function=shutil.copyfile)  # with other times: the same data
    elsewhere = (*base, "--test-only", "--set", f"dataset.root={tmp_path}/ucf")
    assert evaluate(tmp_path, *elsewhere)["results"] == whole["results"]
    next((tmp_path / "ucf/videos").rglob("*g01_c01.mp4")).write_text("no video")
    told = fail(*base, "--set", f"dataset.root={tmp_path}/ucf")  # with the first features: a new training has begun
    assert "cannot be decoded" in told
    assert not (written.parent / "results.json").exists() and not (written.parent / "confusion-pool.png").exists()
    assert not (written.parent / "checkpoint.pth.tar").exists()  # a later --resume would take the old classifier
    assert evaluate(tmp_path, *base)["results"] == whole["results"]
    assert written.read_text() == accepted
    assert "optimizer.lr.base_lr 0.01, now 0.5" in fail(*base, "--resume", "--set", "optimizer.lr.base_lr=0.5")
    assert written.read_text() == accepted
    assert "was trained with encoder" in fail(
        *base, "--resume", "--set-model", "model.args.video_backbone_args.depth=18"
    )
    evaluate(tmp_path, *base, "--debug", "--set", "optimizer.num_epochs=1")


def test_every_epoch_has_its_own_dropout(cfgs, tmp_path):
    """At a rate that changes nothing, on the same batches."""
    same = {"feature_views": 1, "dataset__train__use_shuffle": False, "optimizer__lr__base_lr": 1e-12}
    cfg, model = cfgs(**same, model__args__use_dropout=True)
    evaluate(tmp_path, cfg, model, "--random-weights")
    lines = map(json.loads, next(tmp_path.glob("runs/**/metrics.jsonl")).read_text().splitlines())
    first, second = (line["loss pool 1e-12"] for line in lines)
    assert first != pytest.approx(second, rel=1e-4)


def test_the_final_test_is_of_the_same_clips_after_any_quick_ones(cfgs, tmp_path, monkeypatch):
    logits, finish = [], results.finish_evaluation

    def finish_evaluation(folder, facts, outcome):
        logits.append(outcome["all"].logits)
        return finish(folder, facts, outcome)

    monkeypatch.setattr(results, "finish_evaluation", finish_evaluation)
    cfg, model = cfgs(feature_views=1, optimizer__num_epochs=1)
    for clips in (1, 6):  # of the final test 4
        evaluate(tmp_path, cfg, model, "--random-weights", "--set", f"dataset.test.clips_per_video={clips}")
    few, many = (found[0.01]["pool"] for found in logits)
    torch.testing.assert_close(many, few, atol=1e-4, rtol=1e-4)


def test_a_stored_classifier_can_be_tested_on_more_clips(cfgs, tmp_path):
    cfg, model = cfgs()
    evaluate(tmp_path, cfg, model, "--random-weights")
    more = ("--test-only", "--set", "dataset.test.final_clips_per_video=7")
    assert evaluate(tmp_path, cfg, model, "--random-weights", *more)["results"]["pool"]["clips"] == 6 * 7


def test_nothing_is_deleted_while_another_process_writes(cfgs, tmp_path):
    cfg, model = cfgs()
    evaluate(tmp_path, cfg, model, "--random-weights")
    folder = next(tmp_path.glob("runs/**/results.json")).parent
    writer = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", writer, folder / "train.log"], **pipes) as other:
        other.stdout.readline()
        assert "another process is writing there" in fail(cfg, model, "--random-weights")
        assert "another process" not in (folder / "train.log").read_text()  # it is the other's log
        assert "another process is writing there" in fail(
            cfg, model, "--random-weights", "--set", "dataset.num_folds=1"
        )
        other.stdin.close()
    assert (folder / "results.json").exists() and (folder / "checkpoint.pth.tar").exists()


def test_mistakes_delete_nothing(cfgs, tmp_path):
    cfg, model = cfgs()
    evaluate(tmp_path, cfg, model, "--random-weights")
    folder = next(tmp_path.glob("runs/**/results.json")).parent
    fail(cfg, model, "--random-weights", "--set", "precision=fp16")
    fail(cfg, model, "--random-weights", "--set", "dataset.root=/nowhere")
    (tmp_path / "file").touch()
    told = fail(cfg, model, "--random-weights", "--set", f"cache_dir={tmp_path}/file")
    assert f"cache_dir: {tmp_path}/file: cannot be created: " in told
    few = ("--set", "dataset.batch_size=100", "--set", "dataset.train.drop_last=true")
    assert "dataset.batch_size: 100 exceeds the 8 clips" in fail(cfg, model, "--random-weights", *few)
    assert "--checkpoint: expected a file, found an empty name" in fail(cfg, model, "--checkpoint", "")
    assert (folder / "results.json").exists() and (folder / "checkpoint.pth.tar").exists()


def test_large_seeds(cfgs, tmp_path):
    cfg, model = cfgs(optimizer__num_epochs=1)
    assert evaluate(tmp_path, cfg, model, "--random-weights", "--seed", 20240115123000)["variant"].endswith("123000")


def test_a_loss_that_is_no_number_stops_it_at_the_headlines_rate_alone(cfgs, tmp_path):
    cfg, model = cfgs()
    other = ("--random-weights", "--set", "optimizer.other_lrs=[1.0e+38]")
    assert evaluate(tmp_path, cfg, model, *other)["epochs"]["all"]["done"] == 2
    with pytest.raises(RunFailed, match="all, epoch 1: the loss is not finite; lower optimizer.lr.base_lr"):
        evaluate(tmp_path, cfg, model, "--random-weights", "--set", "optimizer.lr.base_lr=1.0e+38")


def test_a_signal_between_epochs_saves(cfgs, tmp_path):
    cfg, model = cfgs(feature_views=2, optimizer__num_epochs=200, test_freq=1000)  # else saved at the end alone
    arguments, folder = (cfg, model, "--random-weights"), tmp_path / "runs/tiny/eval-tiny/fold-01/random-weights"
    told = folder / "train.log"
    ended = stop(arguments, signal.SIGUSR1, lambda: told.exists() and "Linear classifiers" in told.read_text())
    epoch = checkpoint.load(folder / "checkpoint.pth.tar")["parts"]["all"]["epoch"]
    assert 0 < epoch < 200 and f"saved at all, epoch {epoch}; run it again with --resume to go on" in ended.stderr
    evaluate(tmp_path, *arguments, "--resume")
    resumed = checkpoint.load(folder / "checkpoint.pth.tar")
    evaluate(tmp_path, *arguments)
    assert tiny.differences(checkpoint.load(folder / "checkpoint.pth.tar"), resumed, ("parts",)) == []


def test_a_table_that_cannot_be_written_ends_in_one_line_which_the_log_has_too(cfgs, tmp_path, monkeypatch):
    cfg, model = cfgs(optimizer__num_epochs=1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    evaluate(tmp_path, cfg, model, "--random-weights")
    monkeypatch.setattr("os.replace", full)
    folder = next(tmp_path.glob("runs/**/results.json")).parent
    arguments = (cfg, model, "--random-weights", "--test-only", "--quiet")
    with pytest.raises(UserError, match="per-class-pool.csv: could not be written: .*No space left"):
        evaluate(tmp_path, *arguments)
    monkeypatch.undo()
    (folder / "checkpoint.pth.tar").unlink()
    error = tiny.run(*arguments, script=SCRIPT, status=2).stderr
    assert "no stored classifier" in error and error.strip() in (folder / "train.log").read_text()


def test_a_signal_while_features_are_made_ends_it(cfgs, tmp_path):
    cfg, model = cfgs(optimizer__num_epochs=100)
    arguments, folder = (cfg, model, "--random-weights"), tmp_path / "runs/tiny/eval-tiny/fold-01/random-weights"
    ended = stop(arguments, signal.SIGTERM, lambda: (folder / "checkpoint.pth.tar").exists())
    assert ended.stderr.splitlines()[-1].endswith("; run it again with --resume to go on")
    assert 0 < checkpoint.load(folder / "checkpoint.pth.tar")["parts"]["all"]["epoch"] < 100


def stop(arguments, number, condition):
    """Start an evaluation, send it a signal once this holds, and see it end as asked."""
    started = tiny.Started(*arguments, script=SCRIPT)
    tiny.wait_until(condition)
    started.signal(number)
    ended = started.wait(60)
    assert ended.returncode == 75, ended.stderr
    assert f"preempted: stopped by {number.name}" in ended.stderr
    return ended


def test_a_resumed_training_ends_as_an_uninterrupted_one(cfgs, tmp_path):
    cfg, model = cfgs(model__args__use_dropout=True)
    evaluate(tmp_path, cfg, model, "--random-weights")
    file = next(tmp_path.glob("runs/**/checkpoint.pth.tar"))
    whole, before = checkpoint.load(file), file.with_name(checkpoint.PREVIOUS)
    file.write_bytes(file.read_bytes()[:2000])
    assert checkpoint.load(before)["parts"]["all"]["epoch"] == 1
    evaluate(tmp_path, cfg, model, "--random-weights", "--resume")
    assert tiny.differences(checkpoint.load(file), whole, ("parts",)) == []
    assert checkpoint.load(before)["parts"]["all"]["epoch"] == 1  # the damaged one did not take its place


def test_a_bn_that_drifted_is_tested_as_it_was_and_parts_keep_their_own(cfgs, tmp_path):
    rest = tmp_path / "rest.txt"
    rest.write_text("HandstandPushups\n")
    crop = {"dataset__crop_size": 64}
    cfg, model = cfgs(encoder_bn="train", dataset__rest_classes=str(rest), dataset__train__drop_last=False, **crop)
    arguments = (cfg, model, "--random-weights", "--use-rest-classes")
    whole = evaluate(tmp_path, *arguments)
    parts = checkpoint.load(next(tmp_path.glob("runs/**/checkpoint.pth.tar")))["parts"]
    name = next(name for name in parts["seen"]["drift"] if name.endswith("running_mean"))
    assert not torch.equal(parts["seen"]["drift"][name], parts["unseen"]["drift"][name])
    steps = [part["drift"][name.replace("running_mean", "num_batches_tracked")].item() for part in parts.values()]
    assert steps == [4, 4]  # 2 epochs of 4 videos in batches of 3: no part goes on from the one before
    for option in ("--test-only", "--resume"):
        again = evaluate(tmp_path, *arguments, option)
        assert again["results"] == whole["results"]
        assert again["encoder"]["hash_after"] == whole["encoder"]["hash_after"]  # a test moves no statistics


def test_clips_are_counted_as_asked_for_and_what_was_left_out_is_kept(cfgs, tmp_path, make_video):
    root = tiny_evaluation.make_ucf(tmp_path / "ucf", make_video)
    bad = next((root / "videos").rglob("*g01_c01.mp4"))
    bad.write_text("no video")
    cfg, model = cfgs(root=root, dataset__test__clips_per_video=5)  # while training; of the final test 4
    arguments = (cfg, model, "--random-weights", "--allow-missing")
    found = evaluate(tmp_path, *arguments)
    assert found["results"]["pool"]["clips"] == 6 * 4 and found["results"]["pool"]["clips_in_video_mode"] == 6 * 3
    assert list(found["unreadable"]) == [str(bad.relative_to(root))]
    assert found["epochs"] == {"all": {"done": 2, "asked": 2}} and found["backbone"] == "R2Plus1d depth 10"
    again = evaluate(tmp_path, *arguments, "--test-only")
    assert again["results"] == found["results"] and again["unreadable"] == found["unreadable"]


def test_two_processes_are_told_alike_what_a_cache_could_not_read(cfgs, tmp_path, make_video):
    root = tiny_evaluation.make_ucf(tmp_path / "ucf", make_video)
    next((root / "videos").rglob("*g05_c01.mp4")).write_text("no video")
    cfg, model = cfgs(root=root, feature_views=1)
    evaluate(tmp_path, cfg, model, "--random-weights", "--allow-missing")
    error = tiny.run(cfg, model, "--random-weights", script=SCRIPT, ranks=2, status=2).stderr
    assert "cannot be decoded" in error and "Traceback" not in error


def test_foreign_checkpoints(cfgs, tmp_path):
    from models import build_model
    from utils.config import load_config

    cfg, model = cfgs()
    torch.manual_seed(3)
    weights = build_model(load_config(model)["model"]).state_dict()
    names = {"spatial_": "spt_", "temporal_": "tmp_"}
    avid = weights
    for ours, theirs in names.items():
        avid = {name.replace(f".{ours}", f".{theirs}"): value for name, value in avid.items()}
    states = {
        "thesis\udce9": {"model": {f"module.{name}": value for name, value in weights.items()}, "epoch": 100},
        "avid": {"model": {f"module.{name}": value for name, value in avid.items()}, "epoch": 200},
        "torchvision": {"stem.0.weight": torch.ones(1), "layer1.0.conv1.0.0.weight": torch.ones(1)},
        "other": {"model": {"fc.weight": torch.ones(1)}},
    }
    states["thesis\udce9"]["config"] = {"of": "its own"}
    missing = dict(states["thesis\udce9"]["model"])
    missing.pop("module.video_model.conv4x.out_bn.bias")
    missing["module.video_model.conv1.0.weight"] = torch.ones(32, 3, 3, 7, 7)
    states["missing"] = {"model": missing}
    for name, state in states.items():
        torch.save({"train_criterion": {}, "optimizer": {}, **state} if "model" in state else state, tmp_path / name)
    found = {name: evaluate(tmp_path, cfg, model, "--checkpoint", tmp_path / name) for name in ("thesis\udce9", "avid")}
    assert found["thesis\udce9"]["results"] == found["avid"]["results"]
    assert "the thesis' format after 100 epochs" in found["thesis\udce9"]["encoder"]["weights"]
    assert "AVID-CMA" in found["avid"]["encoder"]["weights"]
    error = fail(cfg, model, "--checkpoint", tmp_path / "missing")
    assert "conv4x.out_bn.bias" in error and "conv1.0.weight is (32, 3, 3, 7, 7), expected (64, 3, 3, 7, 7)" in error
    assert "torchvision R(2+1)D" in fail(cfg, model, "--checkpoint", tmp_path / "torchvision")
    assert "found fc.weight" in fail(cfg, model, "--checkpoint", tmp_path / "other")
    assert "no such checkpoint" in fail(cfg, model)
    (tmp_path / "text").write_text("no checkpoint")
    assert "not a readable checkpoint" in fail(cfg, model, "--checkpoint", tmp_path / "text")


def test_a_folder_of_ones_own(tmp_path, make_video):
    """Every third video is held out; one training video has no label, and one class no video to test on."""
    root, lines = tmp_path / "mine", ["file,speaker,word"]
    root.mkdir()
    for i, word in enumerate(["go", "stop", "stop", "stop", "go", "wait", "go", "", "go"]):
        make_video(root / f"{i}.mp4", seconds=0.6, fps=16, audio_rate=None)
        lines.append(f"{i}.mp4,someone,{word}")
    (root / "labels.csv").write_text("\n".join(lines))
    keys = {"name": "folder", "labels": "labels.csv", "label_column": "word", "holdout_every": 3}
    keys |= {"train__split": "train", "test__split": "test", "test_dense__split": "test"}
    keys = {f"dataset__{key}": value for key, value in keys.items()}
    cfg, model = tiny_evaluation.write_evaluation(tmp_path, root, **keys), tiny.write_config(tmp_path, root)
    found = evaluate(tmp_path, cfg, model, "--random-weights")
    assert found["unlabelled"] == ["7.mp4"] and found["results"]["pool"]["videos"] == 3
    with next(tmp_path.glob("runs/**/per-class-pool.csv")).open() as file:
        videos = [(row["class"], row["videos"]) for row in csv.DictReader(file)]
    assert videos == [("go", "2"), ("stop", "1"), ("wait", "0")]
    message = fail(cfg, model, "--random-weights", "--set", "dataset.labels=null")
    assert "none of the 6 videos of split train has a label" in message


def test_class_names_that_are_no_utf_8(cfgs, tmp_path, make_video):
    root = tiny_evaluation.make_ucf(tmp_path / "ucf", make_video, classes=("HandstandPushups", "Cafe"))
    for path in sorted(root.rglob("*Cafe*"), reverse=True):  # a folder after the files in it
        path.rename(path.with_name(path.name.replace("Cafe", "Caf\udce9")))
    for path in (root / "ucfTrainTestlist").iterdir():
        path.write_bytes(path.read_bytes().replace(b"Cafe", b"Caf\xe9"))
    cfg, model = cfgs(root=root, feature_views=1)
    evaluate(tmp_path, cfg, model, "--random-weights", "--few-shot-ratio", 0.5)
    assert b"Caf\xe9" in next(tmp_path.glob("runs/**/per-class-pool.csv")).read_bytes()


def test_nothing_that_can_be_read_to_test_on(cfgs, tmp_path, ucf):
    root = tmp_path / "ucf"
    shutil.copytree(ucf, root)
    for name in (root / "ucfTrainTestlist/testlist01.txt").read_text().splitlines():
        (root / "videos" / name).write_bytes(b"no video")
    cfg, model = cfgs(root=root)
    assert "none of 6 videos can be read" in fail(cfg, model, "--random-weights", "--allow-missing")


def test_missing_and_unreadable_videos(cfgs, tmp_path, ucf):
    root = tmp_path / "ucf"
    shutil.copytree(ucf, root)
    gone, bad = sorted((root / "videos/HandstandPushups").iterdir())[-2:]
    gone.unlink()
    bad.write_bytes(bad.read_bytes()[:500])
    cfg, model = cfgs(root=root)
    assert "1 of the 6 videos of a list are missing" in fail(cfg, model, "--random-weights")
    found = evaluate(tmp_path, cfg, model, "--random-weights", "--allow-missing", ranks=2)
    assert found["missing"] == [f"videos/HandstandPushups/{gone.name}"]
    assert list(found["unreadable"]) == [f"videos/HandstandPushups/{bad.name}"]
    assert found["results"]["pool"]["videos"] == 4 and found["results"]["pool"]["clips"] == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "model.args.n_classes=101"), ("101", "2 classes")),
        (("--few-shot-ratio", "0"), ("--few-shot-ratio 0", "above 0")),
        (("--few-shot-ratio", "1.5"), ("--few-shot-ratio 1.5", "at most 1")),
        (("--set", "model.args.feat_names=[pol]"), ("'pol'", "conv5x", "pool")),
        (("--set", "model.args.feat_dims=[511]"), ("512", "511")),
        (("--set", "model.args.feat_dims=[0]"), ("feat_dims", "each above 0")),
        (("--set", "model.args.feat_names=[]"), ("feat_names", "one or more of conv1")),
        (("--set", "optimizer.lr.milestones=[-5, 30]"), ("milestones", "each above 0")),
        (("--set", "model.args.pooling_ops=[__import__('os').system('true')]"), ("AdaptiveMaxPool3d",)),
        (("--set", "model.args.pooling_ops=['MaxPool3d((4, 14, 14))']"), ("MaxPool3d", "feature pool, (")),
        (("--set", "model.name=ClassificationWrapper", "--set", "model.args={}"), ("eval-action-recg.py",)),
        (("--set", "dataset.fold=2"), ("trainlist02.txt", "no such list")),
        (("--set", "dataset.test_dense.split=other"), ("test_dense.split: other", "testlist{fold:02d}")),
        (("--set", "dataset.num_folds=2"), ("list02.txt", "no such list")),
        (
            ("--set", "dataset.fold=2", "--set", "dataset.train.split=trainlist01"),
            ("dataset.train.split: trainlist01 is not of fold 2", "{fold}"),
        ),
        (
            ("--set", "dataset.num_folds=2", "--set", "dataset.train.split=trainlist01"),
            ("the same for each of num_folds: 2", "{fold}"),
        ),
        (
            ("--set", "dataset.test.split=trainlist01", "--set", "dataset.test_dense.split=trainlist01"),
            ("8 of its 8 videos are training videos, too, such as videos/",),
        ),
        (("--set", "optimizer.warmup_classifier=true"), ("warmup_classifier: True is for ClassificationWrapper",)),
        (("--set", "dataset.train.drop_last=true", "--set", "dataset.batch_size=99"), ("99", "8 clips")),
        (("--checkpoint", "x"), ("--checkpoint and --random-weights",)),
        (("--set", "benchmrk.name=x"), ("benchmrk", "did you mean benchmark?")),
    ],
)
def test_mistakes_end_in_one_line(cfgs, arguments, words):
    cfg, model = cfgs()
    error = fail(cfg, model, "--random-weights", *arguments)
    for word in words:
        assert word in error


def test_swapped_configurations(cfgs):
    cfg, model = cfgs()
    error = tiny.run(model, cfg, script=SCRIPT, status=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "expected the YAML of an evaluation" in fail(model, cfg, "--random-weights")
    assert "expected the YAML of a pre-training" in fail(cfg, cfg, "--random-weights")
