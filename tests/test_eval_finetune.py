"""eval-action-recg.py as a user runs it: real files, real processes."""

import json
import math
import shutil
import signal

import pytest
import torch

from datasets.preprocessing import VideoPrep
from models.classifiers import ClassificationWrapper
from tests import tiny, tiny_evaluation
from utils import checkpoint

SCRIPT = "eval-action-recg.py"


@pytest.fixture(scope="module")
def ucf(tmp_path_factory, make_video):
    return tiny_evaluation.make_ucf(tmp_path_factory.mktemp("ucf"), make_video)


@pytest.fixture
def cfgs(tmp_path, ucf):
    """Writes an evaluation's configuration; returns it and that of the model."""

    def write(**changes):
        root = changes.pop("root", ucf)
        options = {"model__args__use_dropout": True, "optimizer__lr__base_lr": 1e-3, **changes}
        evaluation = tiny_evaluation.write_evaluation(tmp_path, root, "ClassificationWrapper", **options)
        return evaluation, tiny.write_config(tmp_path, root)

    return write


@pytest.fixture
def two_folds(tmp_path, ucf):
    """A copy of the data with a second split, which is the first one again."""
    root = tmp_path / "ucf"
    shutil.copytree(ucf, root)
    for name in ("train", "test"):
        lists = root / "ucfTrainTestlist"
        shutil.copy(lists / f"{name}list01.txt", lists / f"{name}list02.txt")
    return root


def evaluate(folder, *arguments, ranks=1):
    return tiny_evaluation.results(folder, SCRIPT, *arguments, ranks=ranks)


def stored(folder):
    return checkpoint.load(next(folder.glob("runs/**/checkpoint.pth.tar")))["parts"]["all"]


def test_results_hold_what_they_promise_and_the_encoder_learns(cfgs, tmp_path):
    cfg, model = cfgs(optimizer__warmup_classifier=True, optimizer__warmup_epochs=2, benchmark__name="tiny-random")
    found = evaluate(tmp_path, cfg, model, "--random-weights")
    folder = tmp_path / "runs/tiny/eval-tiny-random/fold-01"  # no variant: the benchmark's name says it
    assert json.loads((folder / "results.json").read_text()) == found
    assert found["results"]["pool"]["clips"] == 24 and found["results"]["pool"]["videos"] == 6
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["group"] == "all train"]
    assert [line["step"] for line in train] == list(range(1, 13))  # 4 epochs of 3
    assert [line["lr"] for line in train] == [1e-3] * 9 + [5e-4] * 3  # a milestone counts from the warm-up's end on
    assert stored(tmp_path)["optimizer"]["param_groups"][0]["lr"] == 5e-4
    log = (folder / "train.log").read_text()
    assert "warm-up epoch 2/4" in log and "warm-up epoch 3/4" not in log and "after epoch 3" in log
    torch.manual_seed(0)
    from models import build_model
    from utils.config import load_config

    fresh = build_model(load_config(model)["model"]).video_model.state_dict()
    name = "conv5x.spatial_conv1.weight"
    evaluate(tmp_path, cfg, model, "--random-weights", "--set", "optimizer.warmup_epochs=4")
    assert not torch.equal(stored(tmp_path)["model"][f"video_model.{name}"], fresh[name])


def test_warm_up_leaves_the_backbone_alone(cfgs, tmp_path):
    cfg, model = cfgs(optimizer__warmup_classifier=True, optimizer__warmup_epochs=1, optimizer__num_epochs=1)
    evaluate(tmp_path, cfg, model, "--random-weights")
    first = checkpoint.load(next(tmp_path.glob("runs/**/checkpoint-previous.pth.tar")))["parts"]["all"]
    from models import build_model
    from utils.config import load_config

    torch.manual_seed(0)
    fresh = build_model(load_config(model)["model"]).video_model.state_dict()
    assert first["epoch"] == 1 and first["warming"]
    backbone = checkpoint.part_of(first["model"], "video_model")
    assert all(torch.equal(backbone[name], value) for name, value in fresh.items())


def test_steps_are_of_augmented_clips_and_the_mean_loss_at_a_rising_rate(cfgs, tmp_path, monkeypatch):
    """With dropout that no other step has."""
    augmented, plain = [], VideoPrep.forward
    masks, draw = [], ClassificationWrapper.draw_dropout

    def prepare(self, frames, augmentation=None):
        augmented.append(augmentation is not None)
        return plain(self, frames, augmentation)

    def draw_dropout(self, batch_size, key):
        masks.append(draw(self, batch_size, key))
        return masks[-1]

    monkeypatch.setattr(VideoPrep, "forward", prepare)
    monkeypatch.setattr(ClassificationWrapper, "draw_dropout", draw_dropout)
    cfg, model = cfgs(optimizer__lr__warmup_epochs=2, optimizer__lr__base_lr=0.1, optimizer__lr__milestones=[])
    evaluate(tmp_path, cfg, model, "--random-weights")
    lines = map(json.loads, next(tmp_path.glob("runs/**/metrics.jsonl")).read_text().splitlines())
    lines = [line for line in lines if line["group"] == "all train"]
    rates, steps = [line["lr"] for line in lines], len(lines)
    assert augmented[:3] == [True] * 3 and augmented.count(True) == steps  # and not in a test
    assert len({tuple(mask[0].tolist()) for mask in masks}) == len(masks) == steps
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.5)  # of 3 clips and 2 classes, told apart by chance
    assert steps >= 4 and rates == pytest.approx([0.1 * step / steps for step in range(steps)], abs=1e-4)


def test_any_number_of_processes_finds_the_same(cfgs, tmp_path):
    """Three processes, 8 clips in batches of 7: shares of 2, 2, 3 and 0, 0, 1. BN and dropout are those of one process.

    By small steps of SGD: BN of so few values magnifies rounding, and Adam makes whole steps of what remains.
    """
    options = {"dataset__batch_size": 7, "dataset__crop_size": 64, "optimizer__num_epochs": 1}
    cfg, model = cfgs(**options, optimizer__name="sgd", optimizer__lr__base_lr=1e-5)
    arguments = (cfg, model, "--random-weights")
    one = evaluate(tmp_path, *arguments)
    weights = stored(tmp_path)["model"]
    three = evaluate(tmp_path, *arguments, ranks=3)
    for name, value in one["results"]["pool"].items():  # rounding may move one undecided clip
        assert three["results"]["pool"][name] == pytest.approx(value, abs=100 / 24 if name == "Clip@1" else 1e-9)
    found = stored(tmp_path)["model"]
    torch.testing.assert_close(found["head.classifier.bias"], weights["head.classifier.bias"], atol=1e-6, rtol=0)
    for name in (name for name in weights if name.endswith(("running_mean", "running_var"))):
        torch.testing.assert_close(found[name], weights[name], atol=2e-2, rtol=2e-2)


def test_a_resumed_training_ends_as_an_uninterrupted_one(cfgs, tmp_path):
    cfg, model = cfgs()
    evaluate(tmp_path, cfg, model, "--random-weights")
    file = next(tmp_path.glob("runs/**/checkpoint.pth.tar"))
    whole = checkpoint.load(file)
    shutil.move(file.with_name(checkpoint.PREVIOUS), file)  # as it was after the first epoch
    older = checkpoint.load(file)
    del older["parts"]["all"]["step"]  # as stored before a signal could come between two epochs
    checkpoint.save(file.parent, older)
    found = evaluate(tmp_path, cfg, model, "--random-weights", "--resume")
    assert tiny.differences(checkpoint.load(file), whole, ("parts",)) == []
    assert evaluate(tmp_path, cfg, model, "--random-weights", "--test-only")["results"] == found["results"]


def test_a_signal_saves_and_two_processes_go_on_in_the_same_bits(cfgs, tmp_path):
    changes = {"optimizer__num_epochs": 2, "optimizer__warmup_classifier": True, "optimizer__warmup_epochs": 1}
    cfg, model = cfgs(**changes, test_freq=100)  # without the signal it would save at the end alone
    arguments, folder = (cfg, model, "--random-weights"), tmp_path / "runs/tiny/eval-tiny/fold-01/random-weights"
    started, metrics = tiny.Started(*arguments, script=SCRIPT, ranks=2), folder / "metrics.jsonl"
    tiny.wait_until(lambda: metrics.exists() and metrics.read_text())
    started.signal(signal.SIGUSR1)
    ended = started.wait(60)
    assert ended.returncode == 75, ended.stderr
    assert "preempted: stopped by SIGUSR1, saved at all, epoch " in ended.stderr
    assert "; run it again with --resume to go on" in ended.stderr and not (folder / "results.json").exists()
    assert 0 < stored(tmp_path)["step"] <= 3 and stored(tmp_path)["epoch"] < 3
    found = evaluate(tmp_path, *arguments, "--resume", ranks=2)
    resumed = checkpoint.load(folder / "checkpoint.pth.tar")
    whole = evaluate(tmp_path, *arguments, ranks=2)
    assert tiny.differences(checkpoint.load(folder / "checkpoint.pth.tar"), resumed, ("parts",)) == []
    assert found["results"] == whole["results"]


def test_parts_each_start_from_the_pretrained_encoder(cfgs, tmp_path):
    cfg, model = cfgs(optimizer__num_epochs=1, dataset__train__drop_last=False)
    lists = tmp_path / "rest.txt"
    lists.write_text("handstand pushups\n")
    found = evaluate(
        tmp_path, cfg, model, "--random-weights", "--use-rest-classes", "--set", f"dataset.rest_classes={lists}",
        "--few-shot-ratio", 0.5,
    )  # fmt: skip
    assert set(found["results"]) == {"unseen", "seen"} and len(found["few_shot"]["videos"]) == 4
    assert found["results"]["seen"]["pool"]["Clip@1"] == 100  # one class
    tiny_steps = ("--set", "optimizer.lr.base_lr=1e-12", "--set", "optimizer.weight_decay=0")
    evaluate(
        tmp_path, cfg, model, "--random-weights", "--use-rest-classes", "--set", f"dataset.rest_classes={lists}",
        *tiny_steps,
    )  # fmt: skip
    states = checkpoint.load(next(tmp_path.glob("runs/**/random-weights_rest-classes-*/checkpoint.pth.tar")))
    counts = [state["model"]["video_model.conv1.1.num_batches_tracked"].item() for state in states["parts"].values()]
    assert counts == [2, 2]  # steps of 4 videos in batches of 3: the second part did not go on from the first
    torch.manual_seed(0)
    first = torch.nn.Linear(512, 1).weight  # of the seed alone, whatever was drawn before
    for state in states["parts"].values():
        torch.testing.assert_close(state["model"]["head.classifier.weight"], first.detach(), atol=1e-6, rtol=0)


def test_the_loss_is_the_mean_over_the_clips_that_can_be_read(cfgs, tmp_path, two_folds):
    """One of three cannot. At a rate that changes nothing, against a batch of the other two."""
    bad, *others = sorted((two_folds / "videos").rglob("*g0[123]_c01.mp4"))
    lists = two_folds / "ucfTrainTestlist/trainlist01.txt"
    losses = {}
    for names in ([bad, *others[:2]], others[:2]):
        lines = [f"{name.parent.name}/{name.name} {1 + (name.parent != bad.parent)}" for name in names]
        lists.write_text("\n".join(lines))
        bad.write_text("no video")
        options = {
            "dataset__batch_size": 3,
            "dataset__train__use_augmentation": False,
            "benchmark__name": f"of-{len(names)}",
        }
        cfg, model = cfgs(root=two_folds, optimizer__num_epochs=1, model__args__use_dropout=False, **options)
        evaluate(tmp_path, cfg, model, "--random-weights", "--allow-missing")
        written = next(tmp_path.glob(f"runs/**/eval-of-{len(names)}/**/metrics.jsonl"))
        losses[len(names)] = json.loads(written.read_text().splitlines()[0])["loss"]
    assert losses[3] == pytest.approx(losses[2], rel=0.05)  # other frames of the same videos


def test_a_copy_of_the_data_is_the_same_data(cfgs, tmp_path, two_folds):
    """With the times of copying; in another place, such as a node's own disk."""
    cfg, model = cfgs(root=two_folds, optimizer__num_epochs=1)
    found = evaluate(tmp_path, cfg, model, "--random-weights")
    copy = tmp_path / "copy"
    shutil.copytree(two_folds, copy, copy_function=shutil.copyfile)
    again = evaluate(tmp_path, cfg, model, "--random-weights", "--test-only", "--set", f"dataset.root={copy}")
    assert again["results"] == found["results"]
    with next((copy / "videos").rglob("*.mp4")).open("ab") as changed:
        changed.write(b"more")
    more = ("--test-only", "--set", f"dataset.root={copy}")
    told = tiny_evaluation.mistake(SCRIPT, cfg, model, "--random-weights", *more)
    assert "was trained with data" in told and "names, labels and sizes" in told


def test_a_width_that_the_feature_has_not_costs_no_results(cfgs, tmp_path):
    cfg, model = cfgs(optimizer__num_epochs=1)
    evaluate(tmp_path, cfg, model, "--random-weights")
    told = tiny_evaluation.mistake(SCRIPT, cfg, model, "--random-weights", "--set", "model.args.feat_dim=256")
    assert "256 for feature pool, which has 512 values a clip" in told
    assert next(tmp_path.glob("runs/**/results.json")) and stored(tmp_path)["epoch"] == 1


def test_a_batch_without_a_readable_clip_is_no_step(cfgs, tmp_path, ucf):
    root = tmp_path / "ucf"
    shutil.copytree(ucf, root)
    next((root / "videos").rglob("*g01_c01.mp4")).write_text("no video")
    cfg, model = cfgs(root=root, optimizer__num_epochs=1)
    evaluate(tmp_path, cfg, model, "--random-weights", "--allow-missing", "--debug")  # batches of one clip
    weights = stored(tmp_path)["model"]
    assert weights["video_model.conv1.1.num_batches_tracked"] == 7  # of 8 training videos
    assert all(value.isfinite().all() for value in weights.values())


def test_the_classifiers_warm_up_has_the_base_rate_and_the_schedule_follows(cfgs, tmp_path):
    rate = {"name": "cosine", "base_lr": 1e-3, "warmup_epochs": 1}
    cfg, model = cfgs(optimizer__warmup_classifier=True, optimizer__warmup_epochs=2, optimizer__lr=rate)
    evaluate(tmp_path, cfg, model, "--random-weights")
    lines = map(json.loads, next(tmp_path.glob("runs/**/metrics.jsonl")).read_text().splitlines())
    rates = [line["lr"] for line in lines if line["group"] == "all train"]  # 3 steps an epoch
    assert rates[:6] == [1e-3] * 6
    assert rates[6] < rates[7] < rates[8] > rates[9] > rates[10] > rates[11]


def test_stages_behind_the_feature_are_not_waited_for(cfgs, tmp_path):
    args = {"feat_name": "conv4x", "feat_dim": 256, "pooling_op": "AdaptiveMaxPool3d((1, 1, 1))"}
    cfg, model = cfgs(model__args=args)
    found = evaluate(tmp_path, cfg, model, "--random-weights", ranks=2)
    assert found["epochs"]["all"]["done"] == 2


def test_a_test_that_a_signal_cut_short_is_made_up_for(cfgs, tmp_path):
    cfg, model = cfgs()
    evaluate(tmp_path, cfg, model, "--random-weights")
    folder = next(tmp_path.glob("runs/**/metrics.jsonl")).parent
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(whole[3])["group"] == "all test"
    shutil.move(folder / checkpoint.PREVIOUS, folder / checkpoint.LATEST)  # as it was after the first epoch
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in whole[:3]))
    evaluate(tmp_path, cfg, model, "--random-weights", "--resume")
    assert (folder / "metrics.jsonl").read_text().splitlines()[3] == whole[3]


def test_a_start_from_scratch_forgets_the_classifiers_of_all_folds(cfgs, tmp_path, two_folds):
    cfg, model = cfgs(root=two_folds, optimizer__num_epochs=1)
    evaluate(tmp_path, cfg, model, "--random-weights", "--set", "dataset.num_folds=2")
    first, second = sorted(tmp_path.glob("runs/**/checkpoint.pth.tar"))
    tiny_evaluation.mistake(SCRIPT, cfg, model, "--random-weights", "--set", "precision=fp16")
    assert first.exists() and second.exists()
    longer = ("--set", "dataset.num_folds=2", "--set", "optimizer.num_epochs=500")  # it will not reach the second fold
    started = tiny.Started(cfg, model, "--random-weights", *longer, script=SCRIPT)
    tiny.wait_until(lambda: not second.exists())
    started.signal(signal.SIGUSR1)
    assert started.wait(60).returncode == 75
    assert not second.exists()  # or --resume would take it up


def test_an_optimizer_of_other_parameters_ends_in_one_line(cfgs, tmp_path):
    """As stored by an older version, which also trained the stages behind the feature."""
    args = {"feat_name": "conv4x", "feat_dim": 256, "pooling_op": "AdaptiveMaxPool3d((1, 1, 1))"}
    cfg, model = cfgs(model__args=args, optimizer__num_epochs=1)
    evaluate(tmp_path, cfg, model, "--random-weights")
    file = next(tmp_path.glob("runs/**/checkpoint.pth.tar"))
    older = checkpoint.load(file)
    older["parts"]["all"]["epoch"] = 0
    older["parts"]["all"]["optimizer"]["param_groups"][0]["params"].append(999)
    checkpoint.save(file.parent, older)
    error = tiny_evaluation.mistake(SCRIPT, cfg, model, "--random-weights", "--resume")
    assert str(file) in error and "start from scratch with --set resume=false" in error


def test_folds_that_are_there_are_taken_into_the_mean(cfgs, tmp_path, two_folds):
    cfg, model = cfgs(root=two_folds, optimizer__num_epochs=1)
    for fold in (1, 2):
        evaluate(tmp_path, cfg, model, "--random-weights", "--set", f"dataset.fold={fold}")
    files = sorted(tmp_path.glob("runs/**/checkpoint.pth.tar"))
    before = [file.read_bytes() for file in files]
    evaluate(tmp_path, cfg, model, "--random-weights", "--set", "dataset.num_folds=2", "--test-only")
    assert [file.read_bytes() for file in files] == before
    mean = next(tmp_path.glob("runs/**/folds-random-weights.json"))
    assert json.loads(mean.read_text())["folds"] == [1, 2]
    evaluate(tmp_path, cfg, model, "--random-weights", "--set", "dataset.fold=2")
    assert not mean.exists()  # one of its folds is another


def test_a_loss_that_is_no_number_stops_it(cfgs):
    cfg, model = cfgs(optimizer__lr__base_lr=1e30)
    error = tiny.run(cfg, model, "--random-weights", script=SCRIPT, status=1).stderr
    assert error.startswith("failed: all, epoch ") and "the loss is not finite" in error


def test_mistakes_end_in_one_line(cfgs):
    cfg, model = cfgs()
    error = tiny.run(cfg, model, "--set", "model.args.n_classes=7", "--random-weights", script=SCRIPT, status=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1 and "7" in error and "2 classes" in error
    assert "no such checkpoint" in tiny_evaluation.mistake(SCRIPT, cfg, model)
    other = ("--set", "model.name=MOSTWrapper", "--set", "model.args={feat_names: [pool], feat_dims: [512]}")
    assert "eval-action-recg-linear.py" in tiny_evaluation.mistake(SCRIPT, cfg, model, *other)
    for key in ("feature_views=2", "encoder_bn=train", "optimizer.other_lrs=[1.0]"):
        error = tiny_evaluation.mistake(SCRIPT, cfg, model, "--random-weights", "--set", key)
        assert f"{key.partition('=')[0]}: " in error and "is for MOSTWrapper, not for ClassificationWrapper" in error
