"""YAML configurations: read safely, checked key by key, completed with defaults.

The tables below define all keys: an unknown key is an error before any work starts, and every known key is used. The
exceptions are keys that the thesis' files set for test splits but measuring ignores (`use_augmentation`, `drop_last`,
`use_shuffle`, `video_only`, `return_labels`), and `mode`, which has a single allowed value in each place. Files written
for the thesis' code load unchanged.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from utils.errors import UserError, allowed, nearest

REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """One configuration key: its allowed values and its default.

    `kind` is a Python type; float also accepts whole numbers and `1e-5`, which YAML reads as text. `items` is the type
    of a list's items, `null_items` lets them be null, `lift` accepts a single value as a list of one. `check` returns
    True for a valid value, and `allowed` describes valid values in messages.
    """

    kind: type
    default: Any = REQUIRED
    choices: tuple = ()
    nullable: bool = False
    items: type | None = None
    null_items: bool = False
    lift: bool = False
    check: Callable[[Any], bool] | None = None
    allowed: str = ""


@dataclass(frozen=True)
class Switch:
    """A section whose keys depend on the value of a sibling key, such as `loss.args` on `loss.name`."""

    on: str
    tables: Mapping[str, Mapping]


def _positive(kind: type, default: Any = REQUIRED, nullable: bool = False) -> Key:
    return Key(kind, default, nullable=nullable, check=lambda v: v > 0, allowed="above 0")


def _seconds(default: Any = REQUIRED) -> Key:
    """The duration of a clip."""
    return Key(float, default, check=lambda v: 0 < v <= 3600, allowed="above 0, at most 3600")


def _seed(default: int) -> Key:
    return Key(int, default, check=lambda v: 0 <= v < 2**63, allowed="from 0 to 2**63 - 1")


def _at_least_0(kind: type, default: Any = REQUIRED, nullable: bool = False) -> Key:
    return Key(kind, default, nullable=nullable, check=lambda v: v >= 0, allowed="0 or above")


def _share(default: float) -> Key:
    return Key(float, default, check=lambda v: 0 <= v <= 1, allowed="from 0 to 1")


def _one_of(*choices: Any, default: Any = REQUIRED, nullable: bool = False) -> Key:
    return Key(type(choices[0]), default, choices=choices, nullable=nullable)


def _widths() -> Key:
    return Key(list, items=int, check=lambda v: v and min(v) > 0, allowed="one or more, each above 0")


def _numbers(default: list[float], check: Callable[[list[float]], bool], allowed: str) -> Key:
    length = len(default)
    return Key(
        list,
        default,
        items=float,
        check=lambda v: len(v) == length and check(v),
        allowed=f"{length} values, {allowed}",
    )


def _flag(default: Any = REQUIRED, nullable: bool = False) -> Key:
    return Key(bool, default, nullable=nullable)


def _text(default: Any = REQUIRED, nullable: bool = False) -> Key:
    return Key(str, default, nullable=nullable)


SPLIT = {
    "split": _text(),
    "use_augmentation": _flag(),
    "drop_last": _flag(),
    "clips_per_video": _positive(int, 1),
    "video_only": _flag(False),
    "return_labels": _flag(False),
}

DATASET = {
    "name": _one_of("vggsound", "ucf101", "folder", "demo"),
    "root": _text(None, nullable=True),
    "batch_size": _positive(int),  # total, over all processes
    "video_clip_duration": _seconds(),
    "video_fps": _positive(float),  # Hz
    "crop_size": _positive(int),  # pixels
    "frame_size": _positive(int, None, nullable=True),  # pixels; null: 8/7 of crop_size (256 for 224)
    "min_area": Key(float, 0.08, check=lambda v: 0 < v <= 1, allowed="above 0, at most 1"),
    "aspect_ratio": _numbers([3 / 4, 4 / 3], lambda v: 0 < v[0] <= v[1], "the smaller first, above 0"),
    "resize": _one_of("bilinear", "nearest", default="bilinear"),
    "transforms": _one_of("msc+color", "crop+color"),
    "color": _numbers(  # brightness, contrast, saturation, hue
        [0.4, 0.4, 0.4, 0.2], lambda v: min(v) >= 0 and v[3] <= 0.5, "0 or above, the last at most 0.5"
    ),
    "train": {**SPLIT, "plain_epochs": _at_least_0(int, 0)},  # the last N epochs without augmentation
    "test": {**SPLIT, "use_augmentation": _flag(False), "drop_last": _flag(False), "split": _text("test")},
    "list": _text(None, nullable=True),  # vggsound, train_subset: a file of names
    "labels": _text(None, nullable=True),  # folder: a CSV file, relative to the root
    "label_column": _text(None, nullable=True),  # folder: a column's name; null: the second
    "holdout_every": _positive(int, None, nullable=True),  # folder: every Nth of the sorted names is held out
    "fold": _positive(int, 1),  # ucf101: which of the published splits
}

AUDIO = {
    "audio_clip_duration": _seconds(2.0),
    "audio_srate": _positive(int, 16000),  # Hz
    "spec_params": {
        "n_fft": _positive(int, 512),
        "hop_length": _positive(int, 256),
        "n_mels": _positive(int, 128),
    },
    "tfmask_params": {
        "time_mask_ratio": _share(0.2),
        "time_mask_size": _positive(int, 5),
        "freq_mask_ratio": _share(0.2),
        "freq_mask_size": _positive(int, 3),
        "var_masks": _flag(True),
    },
}

OPTIMIZER = {
    "name": _one_of("adam", "adamw", "sgd", default="adam"),
    "weight_decay": _at_least_0(float, 0.0),
    "betas": _numbers([0.9, 0.999], lambda v: min(v) >= 0 and max(v) < 1, "from 0 to below 1"),
    "num_epochs": _positive(int),
    "lr": {
        "name": _one_of("multistep", "cosine", default="multistep"),
        "base_lr": _positive(float),
        "gamma": _positive(float, 1.0),
        "milestones": Key(list, [], items=int, check=lambda v: all(x > 0 for x in v), allowed="each above 0"),
        "warmup_epochs": _at_least_0(float, 0.0),
    },
}

VIDEO_BACKBONES = {"R2Plus1d": {"depth": _one_of(10, 18, 34, default=18)}}
AUDIO_BACKBONES = {"Conv2DNet": {"depth": _one_of(10, default=10)}}
_VIDEO_ARGS = {
    "backbone_init": _one_of("he", "pytorch", default=None, nullable=True),  # the architecture's own
    "video_backbone": _one_of(*VIDEO_BACKBONES, default="R2Plus1d"),
    "video_backbone_args": Switch("video_backbone", VIDEO_BACKBONES),
    "checkpoint": _text(None, nullable=True),  # start from these weights
}
_AUDIO_ARGS = {
    "audio_backbone": _one_of(*AUDIO_BACKBONES, default="Conv2DNet"),
    "audio_backbone_args": Switch("audio_backbone", AUDIO_BACKBONES),
}
MODEL_ARGS = {
    "av_wrapper": {
        "proj_dim": _widths(),
        "proj_norm": _one_of("bn", default=None, nullable=True),
        **_VIDEO_ARGS,
        **_AUDIO_ARGS,
    },
    "vicreg_wrapper": {"exp_dim": _widths(), **_VIDEO_ARGS, **_AUDIO_ARGS},
    "vicreg_v_wrapper": {"exp_dim": _widths(), **_VIDEO_ARGS},
}

LOSS_ARGS = {
    "xID": {
        "num_instances": _positive(int, None, nullable=True),
        "num_negatives": _at_least_0(int, 1024),
        "momentum": _share(0.5),
        "temperature": _positive(float, 0.07),
        "q": _share(0.001),
        "q_max": _share(0.4),
        "lam": _positive(float, 0.01),
        "hard_neg_epoch": _at_least_0(int, 10),
        "N_hard": _at_least_0(int, None, nullable=True),
        "s": _at_least_0(int, 512),
        "s_prime": _at_least_0(int, 128),
        "live_targets": _flag(False),  # positives, and more negatives, from the batch itself
        "bank_dtype": _one_of("fp32", "bf16", default="fp32"),  # how the bank's rows are stored
        "bank_shards": _flag(False),  # spread the bank's rows over the ranks
        "checkpoint": _text(None, nullable=True),  # start from that run's bank
    },
    "VICLoss": {
        "sim_coeff": _at_least_0(float, 25.0),
        "std_coeff": _at_least_0(float, 25.0),
        "cov_coeff": _at_least_0(float, 1.0),
    },
}

PRETRAINING = {
    "resume": _flag(True),
    "test_only": _flag(False),
    "seed": _seed(0),
    "num_workers": _at_least_0(int, 8),  # in total, over this node's processes
    "test_freq": _positive(int, 1),  # save every N epochs
    "print_freq": _positive(int, 100),  # steps
    "save_every_minutes": _positive(float, 15.0),
    "monitor_every": _at_least_0(int, 0),  # epochs between held-out retrievals; 0: never
    "precision": _one_of("fp32", "tf32", "bf16", "fp16", default=None, nullable=True),  # null: bf16 on a GPU, else fp32
    "compile": _flag(None, nullable=True),  # null: on a GPU
    "cuda_graphs": _flag(True),  # record a single process' compiled steps
    "gradient_compression": _one_of("bf16", default=None, nullable=True),  # between processes; null: float32
    "accumulate": _positive(int, 1),  # micro-batches per batch, one forward and backward pass each
    "max_bad_fraction": _share(0.02),  # fraction of an epoch's samples
    "skip_nonfinite": _at_least_0(int, 0),  # non-finite steps to skip before the run stops
    "keep_last": _at_least_0(int, 0),  # epoch checkpoints to keep besides the latest and the milestones
    "cache_dir": _text("cache"),
    "dataset": {**DATASET, **AUDIO, "decode_once": _flag(False)},  # cache decoded videos below cache_dir
    "optimizer": OPTIMIZER,
    "model": {
        "name": _text(),
        "model_dir": _text("checkpoints"),
        "arch": _one_of(*MODEL_ARGS),
        "args": Switch("arch", MODEL_ARGS),
    },
    "loss": {"name": _one_of(*LOSS_ARGS), "args": Switch("name", LOSS_ARGS)},
}

EVALUATION_SPLIT = {
    "split": _text(),  # {fold} is replaced by the fold number
    "use_augmentation": _flag(False),
    "drop_last": _flag(False),
    "use_shuffle": _flag(False),
    "mode": _one_of("clip", default="clip"),
    "clips_per_video": _positive(int, 1),
}
_VIDEO_MODE = {**EVALUATION_SPLIT, "mode": _one_of("video", default="video"), "clips_per_video": _positive(int, 10)}

FEATURES = ("conv1", "conv2x", "conv3x", "conv4x", "conv5x", "pool")  # of R2Plus1d
_HEAD_ARGS = {
    "n_classes": _positive(int, None, nullable=True),  # null: as in the data
    "use_dropout": _flag(False),
    "dropout": _share(0.5),
}
CLASSIFIER_ARGS = {
    "MOSTWrapper": {  # linear: one classifier per feature; lists hold one value per feature or one for all
        **_HEAD_ARGS,
        "feat_names": Key(
            list,
            items=str,
            check=lambda v: v and set(v) <= set(FEATURES),
            allowed=f"one or more of {' '.join(FEATURES)}",
        ),
        "pooling_ops": Key(list, [None], items=str, null_items=True, lift=True),
        "feat_dims": Key(list, items=int, lift=True, check=lambda v: v and min(v) > 0, allowed="each above 0"),
        "use_bn": Key(list, [False], items=bool, lift=True),
        "l2_norm": Key(list, [False], items=bool, lift=True, null_items=True),
    },
    "ClassificationWrapper": {  # fine-tuning
        **_HEAD_ARGS,
        "feat_name": _one_of(*FEATURES, default="pool"),
        "pooling_op": _text(None, nullable=True),
        "feat_dim": _positive(int, 512),
    },
}

ONLY = {  # evaluation keys that only one kind uses, with their defaults
    "MOSTWrapper": {"feature_views": 0, "encoder_bn": "eval", "optimizer.other_lrs": []},
    "ClassificationWrapper": {"optimizer.warmup_classifier": False, "optimizer.warmup_epochs": 5},
}

EVALUATION = {
    **{
        key: PRETRAINING[key]
        for key in ("test_only", "seed", "num_workers", "test_freq", "print_freq", "precision", "compile", "cache_dir")
    },
    "resume": _flag(False),
    "encoder_bn": _one_of("eval", "train", default="eval"),  # linear; train: what the thesis' script actually did
    "feature_views": _at_least_0(int, 0),  # linear: fixed views per training video; 0: fresh ones every epoch
    "few_shot_seed": _seed(42),
    "benchmark": {"name": _text()},
    "dataset": {
        **DATASET,
        "name": _one_of("ucf101", "hmdb51", "demo", "folder", "vggsound"),
        "num_folds": _positive(int, None, nullable=True),  # folds 1 to this number, instead of `fold`
        "rest_classes": _text(None, nullable=True),  # file of unseen classes; null: the thesis' list
        "train": EVALUATION_SPLIT,
        "test": {**EVALUATION_SPLIT, "final_clips_per_video": _positive(int, 25)},
        "test_dense": _VIDEO_MODE,
    },
    "optimizer": {
        **OPTIMIZER,
        "other_lrs": Key(  # linear: further values of base_lr, trained in the same pass
            list, [], items=float, check=lambda v: all(rate > 0 for rate in v), allowed="above 0"
        ),
        "warmup_classifier": _flag(False),  # fine-tuning: train only the classifier first
        "warmup_epochs": _positive(int, 5),
    },
    "model": {"name": _one_of(*CLASSIFIER_ARGS), "args": Switch("name", CLASSIFIER_ARGS)},
}


def load_config(
    path: str | Path, overrides: Iterable[str] = (), kind: str | None = None, option: str = "--set"
) -> dict:
    """Read a YAML configuration, apply `KEY=VALUE` overrides (dotted keys), check it, fill in defaults.

    A file with a section `benchmark` configures an evaluation, any other file a pre-training. `kind` (`pre-training` or
    `evaluation`) is the expected one; `option` is how the command line calls an override, for messages.

    Raises:
        UserError: the file is missing, not a YAML mapping, or of the other kind; a key is unknown (the message suggests
            the nearest known one), missing, of the wrong type or not allowed. The message names key and file.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2026-13-40, a thousand brackets
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override, option)
    found, table = ("evaluation", EVALUATION) if "benchmark" in raw else ("pre-training", PRETRAINING)
    if kind not in (None, found):
        has = {"evaluation": "has a section benchmark", "pre-training": "has no section benchmark"}[found]
        wanted = {
            "evaluation": "an evaluation, such as configs/demo/linear.yaml",
            "pre-training": "a pre-training, such as configs/demo/xid.yaml",
        }[kind]
        raise UserError(f"{path}: {has}, which marks an evaluation; expected the YAML of {wanted}")
    cfg = _check_section(raw, table, "", str(path))
    _check_sizes(cfg["dataset"], str(path))
    if found == "evaluation":
        _check_heeded(cfg, str(path))
    else:
        _check_plain_epochs(cfg, str(path))
    return cfg


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but rejecting duplicate keys, of which the last would win silently."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key.value, str) or key.value == "<<":
                continue
            if key.value in lines:
                first, line = lines[key.value], key.start_mark.line + 1
                raise yaml.YAMLError(f"key {key.value} comes twice, in lines {first} and {line}; keep one")
            lines[key.value] = key.start_mark.line + 1
        return node


def _check_heeded(cfg: Mapping, file: str) -> None:
    """Reject values other than the default for keys that this kind of evaluation ignores."""
    dataset, classifier, flat = cfg["dataset"], cfg["model"]["name"], flatten(cfg)
    for kind, keys in ONLY.items():
        for key, default in keys.items():
            if kind != classifier and flat[key] != default:
                raise UserError(f"{file}: {key}: {flat[key]} is for {kind}, not for {classifier}; remove it")
    folds = range(1, dataset["num_folds"] + 1) if dataset["num_folds"] else [dataset["fold"]]
    if any(len({split_of_fold(dataset[part]["split"], fold) for part in ("test", "test_dense")}) > 1 for fold in folds):
        raise UserError(
            f"{file}: dataset.test_dense.split: {dataset['test_dense']['split']}, but both tests use the videos of "
            f"dataset.test.split, {dataset['test']['split']}"
        )


def _check_plain_epochs(cfg: Mapping, file: str) -> None:
    """Reject more epochs without augmentation than there are, and any where there is none in the others."""
    train, num_epochs = cfg["dataset"]["train"], cfg["optimizer"]["num_epochs"]
    if train["plain_epochs"] > num_epochs:
        raise UserError(
            f"{file}: dataset.train.plain_epochs: {train['plain_epochs']} of {num_epochs} epochs cannot be without "
            "augmentation; lower it, or raise optimizer.num_epochs"
        )
    if train["plain_epochs"] and not train["use_augmentation"]:
        raise UserError(
            f"{file}: dataset.train.plain_epochs: {train['plain_epochs']} has no effect with use_augmentation: false; "
            "remove one of the two"
        )


def _check_sizes(data: Mapping, file: str) -> None:
    """Reject combinations of `dataset` keys that are only valid individually."""
    frames = data["video_clip_duration"] * data["video_fps"]
    if round(frames) < 1:
        raise UserError(
            f"{file}: dataset.video_fps: {data['video_fps']:g} frames/s for {data['video_clip_duration']:g} s "
            f"(video_clip_duration) give {frames:g} frames; at least one is needed"
        )
    if data["frame_size"] is not None and data["frame_size"] < data["crop_size"]:
        raise UserError(
            f"{file}: dataset.frame_size: a crop of {data['crop_size']} pixels (crop_size) does not fit into frames of "
            f"{data['frame_size']}; raise frame_size, or remove it for 8/7 of the crop"
        )
    if "spec_params" not in data:
        return
    spec, samples = data["spec_params"], round(data["audio_clip_duration"] * data["audio_srate"])
    if spec["hop_length"] > spec["n_fft"]:
        raise UserError(
            f"{file}: dataset.spec_params.hop_length: {spec['hop_length']} is more than n_fft, {spec['n_fft']}: "
            "samples between two windows would be lost"
        )
    if spec["n_fft"] > samples:
        raise UserError(
            f"{file}: dataset.spec_params.n_fft: a window of {spec['n_fft']} samples is longer than a clip's {samples} "
            "(audio_clip_duration x audio_srate)"
        )


def split_of_fold(split: str, fold: int) -> str:
    """A split's name with `{fold}` (or `{fold:02d}`, two digits) replaced by the fold number.

    Raises:
        UserError: the name has anything else in braces.
    """
    try:
        return split.format(fold=fold)
    except (LookupError, ValueError, AttributeError, TypeError):
        raise UserError(f"dataset.*.split: {split!r}: only {{fold}} may stand in braces") from None


def run_folder(cfg: Mapping) -> Path:
    """The output folder of a pre-training: `<model_dir>/<name>`."""
    return Path(cfg["model"]["model_dir"]) / cfg["model"]["name"]


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to one mapping of dotted keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _apply(raw: dict, override: str, option: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"{option} {override}: expected KEY=VALUE, such as dataset.batch_size=16")
    if not text.strip():
        raise UserError(f"{option} {override}: the value is empty; to unset a key write {name}=null")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{option} {override}: the value is not valid YAML") from None
    if " #" in text and isinstance(value, str) and text.startswith(value):
        value = text  # a folder's name, not a comment
    *parents, last = name.split(".")
    section = raw
    for parent in parents:  # copy each section on the way: a YAML alias may share it with another
        found = section.get(parent)
        section[parent] = dict(found) if isinstance(found, dict) else {}
        section = section[parent]
    section[last] = value


def _check_section(raw: Any, table: Mapping, prefix: str, file: str) -> dict:
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{file}: {prefix[:-1]}: expected a section of keys, found {raw!r}")
    for key in raw:
        if key not in table:
            raise UserError(f"{file}: unknown key {prefix}{key}; {allowed(key, table)}")
    checked = {}
    for name, rule in table.items():
        if isinstance(rule, Key):
            checked[name] = _check_value(raw, name, rule, prefix, file)
        elif isinstance(rule, Switch):
            subtable = rule.tables[checked[rule.on]]
            checked[name] = _check_section(raw.get(name), subtable, f"{prefix}{name}.", file)
        else:
            checked[name] = _check_section(raw.get(name), rule, f"{prefix}{name}.", file)
    return checked


def _check_value(raw: dict, name: str, rule: Key, prefix: str, file: str) -> Any:
    if name not in raw:
        if rule.default is REQUIRED:
            raise UserError(f"{file}: key {prefix}{name} is missing; it takes {_describe(rule)}")
        return copy.deepcopy(rule.default)
    value = raw[name]
    if value is None and rule.nullable:
        return None
    if isinstance(value, str) and value.startswith("~/"):  # a shell does not expand it after KEY=
        value = os.path.expanduser(value)
    converted = _convert(value, rule)
    good = converted is not None and (not rule.choices or converted in rule.choices)
    if not good or (rule.check is not None and not rule.check(converted)):
        hint = nearest(value, rule.choices) if rule.choices and isinstance(value, str) else ""
        if rule.kind is str and not rule.choices and not isinstance(value, (str, list, dict, NoneType)):
            hint = "YAML reads it as a number, a date, true or false; put the text in quotes, as in 'KEY=\"123\"'"
        raise UserError(
            f"{file}: {prefix}{name}: expected {_describe(rule)}, found {value!r}" + (f"; {hint}" if hint else "")
        )
    return converted


def _convert(value: Any, rule: Key) -> Any:
    """`value` converted to the type of the rule, or None if it has another type."""
    if rule.kind is list:
        if rule.lift and not isinstance(value, (list, tuple, dict)):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return None
        items = [_convert(item, Key(rule.items)) for item in value]
        bad = any(
            item is None and not (rule.null_items and raw is None) for item, raw in zip(items, value, strict=True)
        )
        return None if bad else items
    if rule.kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    if rule.kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and "\0" in value:  # not allowed in paths and names
        return None
    if isinstance(value, rule.kind) and not (rule.kind is int and isinstance(value, bool)):
        return value
    return None


def _describe(rule: Key) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    text = names[rule.kind]
    if rule.choices:
        text = "one of " + ", ".join(str(choice) for choice in rule.choices)
    elif rule.kind is list:
        kinds = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
        text += f" of {kinds[rule.items]}" + (" or null" if rule.null_items else "")
    if rule.allowed:
        text += f" {rule.allowed}" if rule.kind is not list else f" ({rule.allowed})"
    return text + (" or null" if rule.nullable else "")
