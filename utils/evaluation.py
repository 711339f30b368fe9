"""Code shared by the two evaluation scripts: what to evaluate, where results go, how accuracies are computed."""

import argparse
import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from utils import checkpoint
from utils.config import flatten, load_config, run_folder
from utils.distributed import gather_objects, is_main
from utils.errors import UserError
from utils.files import lock
from utils.logger import LOG, provenance, write_config

if TYPE_CHECKING:
    from datasets import FoldData

log = logging.getLogger("avssrl")

FREE_TO_CHANGE = {"resume", "test_only", "num_workers", "test_freq", "print_freq", "cache_dir", "dataset.root"}
"""Keys that do not affect the result of an evaluation."""
OF_THE_TEST = {
    "dataset.fold",  # a classifier's folder names it, and the fingerprint of the data tells it
    "dataset.num_folds",
    "dataset.test.final_clips_per_video",
    "dataset.test_dense.clips_per_video",
}
"""Keys that do not affect the training of a classifier."""
RANDOM = "random weights"
"""The name in results of an encoder that was not pre-trained."""
AGAIN = "run it again with --resume"
"""How to resume an evaluation that was asked to stop."""


def load_evaluation(args: argparse.Namespace, classifier: str, other_script: str) -> tuple[dict, dict]:
    """Load CFG and MODEL_CFG of a command line and apply its options to them.

    Raises:
        UserError: a bad key or option, or a file of the wrong kind.
    """
    cfg = load_config(args.cfg, args.set, "evaluation")
    model_cfg = load_config(args.model_cfg, args.set_model, "pre-training", "--set-model")
    if cfg["model"]["name"] != classifier:
        raise UserError(f"{args.cfg}: model.name is {cfg['model']['name']}; for that use {other_script}")
    if args.checkpoint == "":
        raise UserError("--checkpoint: expected a file, found an empty name; omit it for the checkpoint of MODEL_CFG")
    if args.checkpoint and args.random_weights:
        raise UserError("--checkpoint and --random-weights exclude each other; give only one")
    if args.few_shot_ratio is not None and not 0 < args.few_shot_ratio <= 1:
        raise UserError(f"--few-shot-ratio {args.few_shot_ratio:g}: expected above 0 and at most 1")
    if args.seed is not None:
        cfg["seed"] = args.seed
    if args.debug:
        cfg["num_workers"], cfg["dataset"]["batch_size"] = 1, 1
    cfg["resume"] |= args.resume
    cfg["test_only"] |= args.test_only
    return cfg, model_cfg


def folds(cfg: dict) -> list[int]:
    """The folds to evaluate: `dataset.fold`, or 1 to `dataset.num_folds`."""
    data = cfg["dataset"]
    return list(range(1, data["num_folds"] + 1)) if data["num_folds"] else [data["fold"]]


def final_clips(cfg: dict) -> tuple[int, int]:
    """Clips per video in the final test: at random times for Clip@k, and evenly spaced for Video@k."""
    return cfg["dataset"]["test"]["final_clips_per_video"], cfg["dataset"]["test_dense"]["clips_per_video"]


def variant(args: argparse.Namespace, cfg: dict) -> str:
    """A folder name for how an evaluation differs from the plain one of its YAML; empty for the plain one."""
    parts = []
    if args.checkpoint:
        path = Path(args.checkpoint)
        name = os.fsencode(path.name).decode(errors="replace")  # TensorBoard rejects folders that are not UTF-8
        parts.append(f"checkpoint-{name.removesuffix('.tar').removesuffix('.pth')}-{_digest_of(path)}")
    of_random = cfg["benchmark"]["name"].endswith("-random")
    if args.random_weights and not of_random:
        parts.append("random-weights")
    if of_random and not args.random_weights and not args.checkpoint:
        parts.append("pretrained")
    if args.few_shot_ratio is not None:
        seed = f"-seed-{cfg['few_shot_seed']}" if cfg["few_shot_seed"] != 42 else ""
        parts.append(f"few-shot-{ratio_text(args.few_shot_ratio)}{seed}")
    if args.use_rest_classes:
        file = cfg["dataset"]["rest_classes"]
        parts.append(
            "rest-classes" if file is None else f"rest-classes-{Path(file).stem}-{_digest_of_list(Path(file))}"
        )
    if cfg["seed"]:
        parts.append(f"seed-{cfg['seed']}")
    return "_".join(parts)


def _digest_of(path: Path) -> str:
    """Six hexadecimal digits that tell a file's path from that of another with the same name."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:6]


def _digest_of_list(file: Path) -> str:
    """Six hexadecimal digits of a list's text. UserError if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:6]
    except OSError as error:
        raise UserError(f"dataset.rest_classes: {file}: cannot be read: {error}") from None


def ratio_text(ratio: float) -> str:
    """A ratio as text that is read as the same number: 0.5, and 1 in place of 1.0."""
    return short if float(short := f"{ratio:g}") == ratio else repr(ratio)


def fold_folder(args: argparse.Namespace, cfg: dict, model_cfg: dict, fold: int) -> Path:
    """The folder of one fold's results: `<benchmark folder>/fold-<NN>/`, with a subfolder for a variant."""
    return benchmark_folder(cfg, model_cfg) / f"fold-{fold:02d}" / variant(args, cfg)


def folds_file(args: argparse.Namespace, cfg: dict, model_cfg: dict) -> Path:
    """`folds.json`, or `folds-<variant>.json`, in the benchmark's folder: the means over folds."""
    return benchmark_folder(cfg, model_cfg) / ("-".join(filter(None, ["folds", variant(args, cfg)])) + ".json")


def benchmark_folder(cfg: dict, model_cfg: dict) -> Path:
    """`<model_dir>/<name>/eval-<benchmark.name>`."""
    return run_folder(model_cfg) / f"eval-{cfg['benchmark']['name']}"


def load_encoder(encoder: nn.Module, args: argparse.Namespace, model_cfg: dict) -> str:
    """Load pre-trained weights into a video backbone, or keep its random ones; returns a description of them.

    Raises:
        UserError: there is no such checkpoint, or it does not match.
    """
    if args.random_weights:
        return RANDOM
    if args.checkpoint:
        words = checkpoint.load_pretrained(encoder, args.checkpoint, part="video_model")
        return f"{words}, {Path(args.checkpoint)}"
    folder = run_folder(model_cfg)
    found = checkpoint.load_latest(folder)
    if found is None:
        raise UserError(
            f"{folder / checkpoint.LATEST}: no such checkpoint; pre-train with {args.model_cfg}, or give "
            "--checkpoint FILE, or --random-weights for the baseline"
        )
    state, path = found
    weights, words = checkpoint.recognise(state, str(path))
    checkpoint.load_weights(encoder, checkpoint.part_of(weights, "video_model"), f"{path} (video_model)")
    return f"{words}, {path}"


class Failures:
    """Videos that could not be decoded: an error, or with `allow` a list for the result.

    The list starts with those of the stored `states`, which were trained without them.
    """

    def __init__(self, allow: bool, states: Mapping[str, dict] | None = None) -> None:
        self.allow, self.names = allow, {}
        for state in (states or {}).values():
            self.names |= state.get("failures", {})

    def __call__(self, failures: list[tuple[str, str]]) -> None:
        """Record the failures of all ranks; every rank must pass the same ones.

        Raises:
            UserError: there are failures and they are not allowed.
        """
        if failures and not self.allow:
            name, reason = failures[0]
            raise UserError(f"{name}: cannot be decoded ({reason}); fix it, or skip it with --allow-missing")
        for name, reason in failures:
            if name not in self.names:
                log.warning("skipped: %s: %s", name, reason)
            self.names[name] = reason

    def note(self, batch: Mapping) -> int:
        """Record the failures in all ranks' shares of a batch; return its number of clips. Every rank must call it."""
        shares = gather_objects((batch["failures"], len(batch["index"]) if "frames" in batch else 0))
        for failures, _ in shares:
            self(failures)
        return sum(clips for _, clips in shares)


# ------------------------------------------------------------------------------------------------------- accuracies


def top_share(scores: Tensor, labels: Tensor, k: int) -> float:
    """Top-k accuracy in percent, k at most the number of classes. Ties and NaN count against the label.

    Args:
        scores: (N, classes).
        labels: (N,).
    """
    own = scores.gather(1, labels.unsqueeze(1))
    ahead = (~(scores < own)).sum(1) - 1
    return 100.0 * (ahead < k).double().mean().item()


def clip_accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Clip@1 and Clip@5 in percent from logits (videos, clips, classes), each clip counted as one sample."""
    each = labels.repeat_interleave(logits.shape[1])
    return {f"Clip@{k}": top_share(logits.flatten(0, 1), each, k) for k in (1, 5)}


def video_accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Video@1 and Video@5 in percent, from `video_scores` of logits (videos, clips, classes)."""
    return {f"Video@{k}": top_share(video_scores(logits), labels, k) for k in (1, 5)}


def video_scores(logits: Tensor) -> Tensor:
    """Logarithm of the softmax of logits (videos, clips, classes), averaged over clips: (videos, classes).

    The averages themselves may underflow, and would then tie.
    """
    return logits.double().log_softmax(2).logsumexp(1) - math.log(logits.shape[1])


# ------------------------------------------------------------------------------------------- stored classifiers


def recipe(cfg: dict, **more: object) -> dict:
    """All settings that define an evaluation, as plain data."""
    return {key: value for key, value in flatten(cfg).items() if key not in FREE_TO_CHANGE} | more


def differing(then: Mapping, now: Mapping, free: Container[str]) -> list[str]:
    """The keys, except for `free` ones, whose values differ between two recipes."""
    return [key for key in then | now if key not in free and then.get(key) != now.get(key)]


class StoredClassifier:
    """The classifier stored in an evaluation's folder, with fingerprints of what it was made from.

    Args:
        folder: the evaluation's folder.
        cfg: its configuration; `resume` and `test_only` determine how a stored classifier is used.
        encoder, data: fingerprints of the pre-trained weights and of the videos.
        recipe: the result of `recipe`.
        precision: the number format in use, which `precision: null` leaves to the device.
    """

    def __init__(self, folder: Path, cfg: dict, encoder: str, data: str, recipe: dict, precision: str = "fp32") -> None:
        self.folder, self.cfg, self.file = folder, cfg, folder / checkpoint.LATEST
        self._parts: dict[str, dict] = {}
        self._latest_damaged = False
        self.fingerprints = {"encoder": encoder, "data": data, "recipe": recipe}
        self.precision = precision

    def load(self) -> dict[str, dict]:
        """The stored states by part, on every rank; empty if new classifiers are to be trained.

        Raises:
            UserError: the stored one was made from something else, `test_only` finds none, or the ranks found
                different ones, or have different encoders.
        """
        if len(set(gather_objects(self.fingerprints["encoder"]))) > 1:
            raise UserError(
                "the processes loaded different encoders; model.model_dir must be on a disk that all nodes share, and "
                "a pre-training that is still running may just have saved: run it again"
            )
        self._parts = checkpoint.agreed(self.folder, self._load, _places)
        return self._parts

    def _load(self) -> dict[str, dict]:
        if not (self.cfg["resume"] or self.cfg["test_only"]):
            return {}
        found = checkpoint.load_latest(self.folder)
        if found is None:
            if self.cfg["test_only"]:
                raise UserError(f"{self.folder / checkpoint.LATEST}: no stored classifier; train without --test-only")
            return {}
        state, path = found
        self._latest_damaged = path.name == checkpoint.PREVIOUS
        remedy = "start from scratch without --resume and with --set resume=false"
        if self.cfg["test_only"]:
            remedy = "train it without --test-only and with --set resume=false"
        for what, meaning in {"encoder": "its weights", "data": "the videos' names, labels and sizes"}.items():
            if state[what] != self.fingerprints[what]:
                raise UserError(
                    f"{path}: was trained with {what} {state[what]}, now {self.fingerprints[what]} (a fingerprint of "
                    f"{meaning}); {remedy}"
                )
        then, now = state["recipe"], self.fingerprints["recipe"]
        for key in differing(then, now, OF_THE_TEST):
            raise UserError(
                f"{path}: was trained with {key} {then.get(key)}, now {now.get(key)}; restore that, or {remedy}"
            )
        log.info("going on from %s", path)
        if (before := state.get("precision", self.precision)) != self.precision:
            log.warning("it was trained in %s, now %s: figures may differ a little", before, self.precision)
        parts = state["parts"]
        missing = [part for part in self.fingerprints["recipe"]["parts"] if part not in parts]
        if self.cfg["test_only"] and missing:
            raise UserError(f"{path}: no classifier for the {missing[0]} classes yet; train it without --test-only")
        return parts

    def save(self, part: str, **state: object) -> None:
        """Store the state of a part along with those of the others, on rank 0."""
        self._parts[part] = state
        if is_main():
            state = {**self.fingerprints, "precision": self.precision, "parts": self._parts}
            checkpoint.save(self.folder, state, latest_damaged=self._latest_damaged)
            self._latest_damaged = False


def _places(parts: Mapping[str, dict]) -> str:
    """The training progress of each part."""
    return ", ".join(f"{part} epoch {state['epoch']}, step {state.get('step', 0)}" for part, state in parts.items())


_OF_A_TRAINING = ("results.json", "per-class-*.csv", "confusion-*.png", checkpoint.LATEST, checkpoint.PREVIOUS)


def begin_training(args: argparse.Namespace, cfg: dict, model_cfg: dict, fold: int, anew: bool) -> None:
    """Write config.yaml on rank 0, and when training from scratch (`anew`) delete the results of an earlier training.

    Without `resume` the first fold deletes the classifiers of all: a later start with --resume would take them up. With
    `test_only` the training's config.yaml is left as it is.

    Raises:
        UserError: another process is writing to one of the folds, and nothing is deleted; or something cannot be.
    """
    if not is_main():
        return
    folder = fold_folder(args, cfg, model_cfg, fold)
    if anew:
        clear(args, cfg, model_cfg, [fold] if cfg["resume"] or fold != folds(cfg)[0] else folds(cfg), locked=folder)
    if not cfg["test_only"]:
        write_config(folder, {"evaluation": cfg, "pretraining": model_cfg})


def clear(
    args: argparse.Namespace, cfg: dict, model_cfg: dict, numbers: Iterable[int], locked: Path | None = None
) -> None:
    """Delete results and classifiers of these folds, and the mean over folds. This process has `locked` one folder.

    Raises:
        UserError: another process is writing to one of them, and nothing is deleted; or something cannot be.
    """
    folders = [fold_folder(args, cfg, model_cfg, fold) for fold in numbers]
    try:
        with contextlib.ExitStack() as locks:
            for folder in folders:
                if folder != locked and (folder / LOG).exists():  # closing a file would release our own lock on it
                    lock(locks.enter_context((folder / LOG).open("a")), folder)
            for folder in folders:
                for pattern in _OF_A_TRAINING:
                    for file in folder.glob(pattern):
                        file.unlink()
            folds_file(args, cfg, model_cfg).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be replaced: {error.strerror}") from None


def describe(args: argparse.Namespace, cfg: dict, model_cfg: dict, fold: int, kind: str) -> dict:
    """Metadata of an evaluation, for its results."""
    network = model_cfg["model"]["args"]
    return {
        "kind": kind,
        "benchmark": cfg["benchmark"]["name"],
        "dataset": cfg["dataset"]["name"],
        "fold": fold,
        "model": model_cfg["model"]["name"],
        "arch": model_cfg["model"]["arch"],
        "backbone": " ".join(
            [network["video_backbone"], *(f"{k} {v}" for k, v in network["video_backbone_args"].items())]
        ),
        "variant": variant(args, cfg),
        "learning_rate": cfg["optimizer"]["lr"]["base_lr"],
        "made": provenance(),
    }


def describe_videos(args: argparse.Namespace, cfg: dict, data: "FoldData", failures: Failures) -> dict:
    """The videos of an evaluation, for its results: names of the few-shot subset, and of videos left out."""
    few_shot = None
    if args.few_shot_ratio is not None:
        videos = [data.train.name(row) for row in data.chosen]
        few_shot = {"ratio": args.few_shot_ratio, "seed": cfg["few_shot_seed"], "videos": videos}
    left_out = {"missing": data.missing, "unlabelled": data.unlabelled, "unreadable": failures.names}
    return {"few_shot": few_shot} | left_out
