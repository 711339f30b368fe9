"""utils.config: what is refused, what is completed, and the thesis' files."""

import inspect
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from criterions import CRITERIONS
from datasets import SCALE_TOLERANCE
from datasets.video_dataset import ClipRecipe
from utils.config import EVALUATION, LOSS_ARGS, PRETRAINING, REQUIRED, Key, Switch, flatten, load_config
from utils.errors import UserError

REPO = Path(__file__).resolve().parents[2]
THESIS = REPO / "configs/VGGSound-N1024.yaml"


def write(tmp_path, change):
    raw = yaml.safe_load(THESIS.read_text())
    change(raw)
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_thesis_file_keeps_its_meaning():
    cfg = load_config(THESIS)
    raw = yaml.safe_load(THESIS.read_text())
    for section in ("dataset", "optimizer", "model", "loss"):
        for key, value in raw[section].items():
            if not isinstance(value, dict):
                assert cfg[section][key] == value
    assert cfg["loss"]["args"]["q_max"] == 0.4 and cfg["loss"]["args"]["temperature"] == 0.07
    assert cfg["model"]["args"]["proj_norm"] is None and cfg["dataset"]["color"] == [0.4, 0.4, 0.4, 0.2]
    assert cfg["seed"] == 0 and cfg["accumulate"] == 1 and cfg["precision"] is None


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("**/*.yaml")), ids=lambda f: f.name)
def test_every_shipped_file_loads(file):
    load_config(file)


def test_runs_that_we_watch_are_measured_on_crops_like_those_of_their_training():
    watched = 0
    for file in (REPO / "configs").glob("**/*.yaml"):
        cfg = load_config(file)
        if cfg.get("monitor_every"):
            recipe = ClipRecipe.from_config(cfg["dataset"], augment=not cfg["dataset"]["train"]["plain_epochs"])
            assert abs(recipe.test_scale - recipe.mean_scale) < SCALE_TOLERANCE, file
            watched += 1
    assert watched >= 7


def schedule(rate, decay, epochs, gamma, milestones):
    adam = {"name": "adam", "weight_decay": decay, "betas": [0.9, 0.999], "num_epochs": epochs}
    lr = {"name": "multistep", "base_lr": rate, "gamma": gamma, "milestones": milestones, "warmup_epochs": 0}
    return flatten({"dataset.batch_size": 32, "dataset.crop_size": 224, "optimizer": adam | {"lr": lr}})


CLIPS = {"dataset.video_clip_duration": 0.5, "dataset.video_fps": 16, "dataset.test_dense.clips_per_video": 10}
TRAINING = {"dataset.train.use_augmentation": True, "dataset.train.drop_last": True}
LINEAR = {
    **schedule(1e-4, 0, 50, 0.3, [20, 30, 40]),
    **CLIPS,
    **TRAINING,
    "dataset.transforms": "crop+color",
    "dataset.color": [0, 0, 0, 0],
    "dataset.train.clips_per_video": 1,
    "dataset.test.final_clips_per_video": 25,
    "model.args.feat_names": ["pool"],
    "encoder_bn": "eval",
    "few_shot_seed": 42,
}
TUNED = {
    **CLIPS,
    **TRAINING,
    "dataset.transforms": "msc+color",
    "dataset.test.final_clips_per_video": 25,
    "model.args.use_dropout": True,
    "model.args.dropout": 0.5,
    "few_shot_seed": 42,
}
UCF_CLIPS = {"dataset.color": [0.4, 0.4, 0.4, 0.2], "dataset.train.clips_per_video": 10}
HMDB_CLIPS = {"dataset.color": [1, 1, 1, 0.2], "dataset.train.clips_per_video": 25}
WARM_UP = {"optimizer.warmup_classifier": True, "optimizer.warmup_epochs": 5}
NO_WARM_UP = {"optimizer.warmup_classifier": False}
UCF = schedule(1e-4, 0, 16, 0.3, [6, 10, 14]) | TUNED | UCF_CLIPS | WARM_UP
UCF_RANDOM = schedule(1e-4, 0, 100, 0.3, [30, 60, 80]) | TUNED | UCF_CLIPS | NO_WARM_UP
HMDB = schedule(1e-4, 0, 10, 0.3, [3, 6, 8]) | TUNED | HMDB_CLIPS | NO_WARM_UP
HMDB_RANDOM = schedule(1e-4, 0, 100, 0.3, [30, 60, 80]) | TUNED | HMDB_CLIPS | NO_WARM_UP
TENS = list(range(10, 100, 10))
SECOND = {
    **TRAINING,
    "dataset.video_clip_duration": 1,
    "dataset.video_fps": 16,
    "dataset.transforms": "msc+color",
    "dataset.color": [0.4, 0.4, 0.4, 0.2],
    "dataset.train.split": "train_subset",
    "dataset.train.clips_per_video": 5,
    "dataset.test.split": "test",
    "model.args.video_backbone": "R2Plus1d",
    "model.args.video_backbone_args.depth": 18,
}
SOUND = {
    "dataset.audio_clip_duration": 2,
    "dataset.audio_srate": 16000,
    "dataset.spec_params": {"n_fft": 512, "hop_length": 256, "n_mels": 128},
    "dataset.tfmask_params": {
        "time_mask_ratio": 0.2,
        "time_mask_size": 5,
        "freq_mask_ratio": 0.2,
        "freq_mask_size": 3,
        "var_masks": True,
    },
    "dataset.train.video_only": False,
    "model.args.audio_backbone": "Conv2DNet",
    "model.args.audio_backbone_args.depth": 10,
}
XID = {
    **schedule(5e-4, 1e-5, 100, 0.9, TENS),
    **SECOND,
    **flatten(SOUND),
    "model.args.proj_dim": [512, 512, 128],
    "loss.args.num_negatives": 1024,
    "loss.args.N_hard": None,
    "loss.args.momentum": 0.5,
    "loss.args.q": 0.001,
    "loss.args.lam": 0.01,
}
VICREG = {
    **schedule(5e-4, 1e-6, 100, 0.9, TENS),
    **SECOND,
    "model.args.exp_dim": [4096, 4096, 4096],
    "loss.args.sim_coeff": 25,
    "loss.args.std_coeff": 25,
    "loss.args.cov_coeff": 1,
}


@pytest.mark.parametrize(
    ("file", "recipe"),
    [
        ("VGGSound-N1024", XID),
        ("VGGSound-VICReg", VICREG | flatten(SOUND)),
        ("VGGSound-VICReg-Video", VICREG | {"dataset.train.video_only": True}),
        ("ucf/8at16-linear", LINEAR),
        ("ucf/8at16-linear-random", LINEAR),
        ("hmdb51/8at16-linear", LINEAR),
        ("hmdb51/8at16-linear-random", LINEAR),
        ("ucf/8at16-fold1", UCF),
        ("ucf/8at16-fold1-random", UCF_RANDOM),
        ("hmdb51/8at16-fold1", HMDB),
        ("hmdb51/8at16-fold1-random", HMDB_RANDOM),
    ],
)
def test_shipped_files_hold_the_recipes_of_the_thesis(file, recipe):
    cfg = flatten(load_config(REPO / f"configs/{file}.yaml"))
    assert {key: cfg[key] for key in recipe} == recipe


def test_defaults_of_a_loss_are_those_of_its_class():
    for name, kind in CRITERIONS.items():
        for key, parameter in inspect.signature(kind).parameters.items():
            if key in LOSS_ARGS[name] and parameter.default is not parameter.empty:
                assert LOSS_ARGS[name][key].default == parameter.default, f"{name} {key}"


def keys(table, prefix=""):
    """Dotted keys of a configuration's table, with their rules; those of all kinds where a section has several."""
    for name, rule in table.items():
        if isinstance(rule, Key):
            yield prefix + name, rule
        else:
            for section in rule.tables.values() if isinstance(rule, Switch) else (rule,):
                yield from keys(section, f"{prefix}{name}.")


def told(text):
    """Dotted keys that tables tell of, with their defaults as YAML; None: required."""
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| `")]
    return {key.split("`")[1]: default.strip("`") or None for key, default, _ in rows}


def test_the_reference_tells_of_every_key_and_its_default():
    text = (REPO / "configs/README.md").read_text()
    pretraining, evaluation = (told(part) for part in text.split("## Evaluation"))
    for table, reference in ((PRETRAINING, pretraining), (EVALUATION, pretraining | evaluation)):
        for key, rule in keys(table):
            assert key in reference, key
            default = None if reference[key] is None else yaml.safe_load(reference[key])
            assert default == (None if rule.default is REQUIRED else rule.default), key
            assert (reference[key] is None) == (rule.default is REQUIRED), key
    known = {key for table in (PRETRAINING, EVALUATION) for key, _ in keys(table)}
    assert pretraining.keys() | evaluation.keys() == known


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.crop_sizee=3", ["dataset.crop_sizee", "did you mean crop_size?", "VGGSound-N1024.yaml"]),
        ("optimiser.num_epochs=3", ["unknown key optimiser", "optimizer"]),
        ("dataset.batch_size=many", ["dataset.batch_size", "a whole number", "'many'"]),
        ("dataset.batch_size=true", ["dataset.batch_size", "a whole number", "True"]),
        ("dataset.batch_size=0", ["dataset.batch_size", "above 0", "found 0"]),
        ("seed=99999999999999999999", ["seed", "from 0 to 2**63 - 1", "found 99999999999999999999"]),
        ("dataset.video_clip_duration=1e308", ["dataset.video_clip_duration", "at most 3600", "found '1e308'"]),
        ("dataset.batch_size=2.5", ["dataset.batch_size", "2.5"]),
        ("loss.name=XID", ["loss.name", "xID, VICLoss"]),
        ("loss.name=xid2", ["loss.name", "xID"]),
        ("loss.args.num_negativs=3", ["loss.args.num_negativs", "num_negatives"]),
        ("model.arch=av_wraper", ["model.arch", "did you mean av_wrapper?"]),
        ("model.args.exp_dim=[1]", ["model.args.exp_dim", "proj_dim"]),
        ("model.args.proj_dim=[a, b]", ["model.args.proj_dim", "whole numbers"]),
        ("model.args.proj_dim=[0]", ["model.args.proj_dim", "each above 0"]),
        ("model.args.proj_dim=[]", ["model.args.proj_dim", "one or more"]),
        ("max_bad_fraction=2", ["max_bad_fraction", "from 0 to 1"]),
        ("precision=fp64", ["precision", "fp32, tf32, bf16, fp16"]),
        ("dataset.color=[1, 1]", ["dataset.color", "4 values"]),
        ("dataset.color=[0.4, -0.4, 0, 0]", ["dataset.color", "0 or above"]),
        ("dataset.color=[0.4, 0.4, 0.4, 0.6]", ["dataset.color", "the last at most 0.5"]),
        ("dataset.aspect_ratio=[2, 0.5]", ["dataset.aspect_ratio", "the smaller first"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas", "from 0 to below 1"]),
        ("dataset.video_fps=0.1", ["dataset.video_fps", "0.1 frames", "at least one"]),
        ("dataset.frame_size=200", ["dataset.frame_size", "224", "200"]),
        ("dataset.train.plain_epochs=101", ["dataset.train.plain_epochs", "101 of 100 epochs", "optimizer.num_epochs"]),
        ("dataset.spec_params.hop_length=600", ["spec_params.hop_length", "600", "512"]),
        ("dataset.spec_params.n_fft=40000", ["spec_params.n_fft", "40000", "32000"]),
        ("dataset.video_fps=.inf", ["dataset.video_fps", "a number"]),
        ("model.name=2026-13-40", ["--set model.name", "not valid YAML"]),
        (f"model.name={1000 * '['}", ["--set model.name", "not valid YAML"]),
        ('model.name="a\\0b"', ["model.name", "text", "'a\\x00b'"]),
        ("dataset.train=3", ["dataset.train", "section"]),
        ("resume", ["--set resume", "KEY=VALUE"]),
    ],
)
def test_bad_values_are_named(override, words):
    with pytest.raises(UserError) as error:
        load_config(THESIS, [override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_epochs_without_augmentation_need_others_with_it():
    for augments, plain in ((True, 0), (True, 100), (False, 0)):
        load_config(THESIS, [f"dataset.train.use_augmentation={augments}", f"dataset.train.plain_epochs={plain}"])
    with pytest.raises(UserError, match="plain_epochs: 1 has no effect with use_augmentation: false; remove one"):
        load_config(THESIS, ["dataset.train.use_augmentation=false", "dataset.train.plain_epochs=1"])


@pytest.mark.parametrize(("file", "kind"), [("ucf/8at16-linear", "pre-training"), ("demo/xid", "evaluation")])
def test_a_file_of_the_other_kind_is_told(file, kind):
    path = f"configs/{file}.yaml"
    with pytest.raises(UserError, match=f"{path}: .*expected the YAML of an? {kind}, such as configs/demo/"):
        load_config(REPO / path, kind=kind)
    load_config(REPO / path)


def test_a_missing_key_is_named(tmp_path):
    file = write(tmp_path, lambda raw: raw["optimizer"].pop("num_epochs"))
    with pytest.raises(UserError, match="optimizer.num_epochs is missing.*whole number"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n", "mapping"), ("a: [", "YAML"), ("!!python/object:os.x {}", "YAML"), ("a: " + 3000 * "[", "YAML")],
)
def test_files_that_are_no_configuration(tmp_path, text, words):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(file)
    with pytest.raises(UserError, match="no such configuration"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text", ["seed: 1\nnum_workers: 2\nseed: 3\n", "dataset: {root: a,\n  name: b,\n\n\n  name: c}\n"]
)
def test_a_key_that_comes_twice(tmp_path, text):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    key, lines = ("seed", "1 and 3") if text.startswith("seed") else ("name", "2 and 5")
    with pytest.raises(UserError, match=f"twice.yaml: not valid YAML: key {key} comes twice, in lines {lines}; keep"):
        load_config(file)


def test_a_section_may_build_on_another(tmp_path):
    raw = THESIS.read_text().replace("  test:\n", "  test: &test\n", 1)
    file = tmp_path / "merged.yaml"
    file.write_text(raw + "\n_: &more {momentum: 0.1}\n")
    with pytest.raises(UserError, match="unknown key _"):
        load_config(file)
    file.write_text(
        raw.replace("optimizer:\n", "optimizer:\n  <<: {weight_decay: 0.5, num_epochs: 3}\n").replace(
            "  weight_decay:", "  # weight_decay:"
        )
    )
    cfg = load_config(file)
    assert cfg["optimizer"]["weight_decay"] == 0.5
    assert cfg["optimizer"]["num_epochs"] == load_config(THESIS)["optimizer"]["num_epochs"]


def test_overrides_and_numbers_as_yaml_reads_them(tmp_path):
    cfg = load_config(THESIS, ["optimizer.weight_decay=1e-6", "dataset.batch_size=16.0", "loss.args.N_hard=null"])
    assert cfg["optimizer"]["weight_decay"] == 1e-6
    assert cfg["dataset"]["batch_size"] == 16 and isinstance(cfg["dataset"]["batch_size"], int)
    cfg = load_config(THESIS, ["dataset.root=/some/where", "dataset.train.clips_per_video=2"])
    assert cfg["dataset"]["root"] == "/some/where" and cfg["dataset"]["train"]["clips_per_video"] == 2


def test_a_resolved_configuration_is_a_configuration(tmp_path):
    cfg = load_config(THESIS)
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(cfg))
    assert load_config(file) == cfg


def test_an_override_changes_no_section_that_is_an_alias_of_another(tmp_path):
    file = tmp_path / "alias.yaml"
    raw = yaml.safe_load((REPO / "configs/ucf/8at16-linear.yaml").read_text())
    raw["dataset"]["test_dense"]["split"] = raw["dataset"]["test"]["split"] = "testlist01"
    raw["dataset"]["train"] = raw["dataset"]["test"]  # written once, with an alias
    file.write_text(yaml.safe_dump(raw))
    assert "*id" in file.read_text()
    cfg = load_config(file, ["dataset.train.split=trainlist01", "dataset.train.clips_per_video=7"])
    assert cfg["dataset"]["train"]["split"] == "trainlist01" and cfg["dataset"]["test"]["split"] == "testlist01"
    assert cfg["dataset"]["test"]["clips_per_video"] == raw["dataset"]["test"].get("clips_per_video", 1)


@pytest.mark.parametrize(
    ("file", "overrides", "good"),
    [
        ("hmdb51", ["dataset.test_dense.split=test-split1"], True),
        ("hmdb51", ["dataset.test_dense.split=test-split1", "dataset.fold=2"], False),
        ("ucf", ["dataset.test_dense.split=testlist01"], True),
        ("ucf", ["dataset.test_dense.split=testlist01", "dataset.num_folds=3"], False),
        ("ucf", ["dataset.test.split=list{fold.x}"], False),
    ],
)
def test_both_tests_are_on_the_same_videos_in_each_fold(file, overrides, good):
    with nullcontext() if good else pytest.raises(UserError, match="test_dense.split|in braces"):
        load_config(REPO / f"configs/{file}/8at16-linear.yaml", overrides)


def test_an_override_is_called_by_its_option_and_may_hold_a_hash(tmp_path):
    cfg = REPO / "configs/VGGSound-N1024.yaml"
    with pytest.raises(
        UserError, match="--set model.args.checkpoint=: the value is empty.* model.args.checkpoint=null"
    ):
        load_config(REPO / "configs/demo/xid.yaml", ["model.args.checkpoint="])
    with pytest.raises(UserError, match="model.name: expected text, found 123; YAML reads it as a number.*in quotes"):
        load_config(REPO / "configs/demo/xid.yaml", ["model.name=123"])
    quoted = load_config(REPO / "configs/demo/xid.yaml", ['model.name="123"', "dataset.root=~/videos"])
    assert quoted["model"]["name"] == "123" and quoted["dataset"]["root"] == os.path.expanduser("~/videos")
    with pytest.raises(UserError, match="--set-model oops: expected KEY=VALUE"):
        load_config(cfg, ["oops"], option="--set-model")
    assert load_config(cfg, ["dataset.root=/mnt/disk #2"])["dataset"]["root"] == "/mnt/disk #2"
    assert load_config(cfg, ["dataset.batch_size=16 # of all"])["dataset"]["batch_size"] == 16
    assert load_config(cfg, ["dataset.root='/mnt/disk' # 2"])["dataset"]["root"] == "/mnt/disk"
