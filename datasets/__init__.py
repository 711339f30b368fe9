"""From videos on disk to batches: `build_videos` lists them, the data sets in `video_dataset` cut clips from them."""

import argparse
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from datasets import folder, hmdb, ucf, vggsound
from datasets.concepts import Part, few_shot_rows, make_parts, rest_classes_file
from datasets.decoded import DecodedVideos
from datasets.evaluation import FreshClips, SharedBatches, VideoClips, labelled_videos, present_videos
from datasets.manifest import FILE as MANIFEST
from datasets.manifest import manifest_of
from datasets.video_dataset import (
    ClipRecipe,
    EpochBatches,
    EvenClips,
    TrainingClips,
    VideoList,
    collate_readable,
    make_loader,
)
from utils.distributed import local_world_size, rank, world_size
from utils.errors import UserError

log = logging.getLogger("avssrl")

SCALE_TOLERANCE = 0.05  # of a frame's side, between training crops and held-out ones
MONITOR_VIDEOS = 200  # maximum number of held-out videos for monitoring during pre-training

LISTS: dict[str, Callable[[dict, str], VideoList]] = {
    "vggsound": vggsound.list_videos,
    "ucf101": ucf.list_videos,
    "hmdb51": hmdb.list_videos,
    "demo": ucf.list_videos,  # same layout as UCF-101
    "folder": folder.list_videos,
}


ONLY_FOR = {"list": "vggsound", "labels": "folder", "label_column": "folder", "holdout_every": "folder"}


def build_videos(dataset: dict, split: str, with_sound: bool = False) -> VideoList:
    """List the videos of one split of a configuration's `dataset` section.

    `with_sound` leaves out those of which a prepared folder's manifest says that they have none.

    Raises:
        UserError: a key is for another data set, or the root is not set, does not exist or holds no such video.
    """
    for key, name in ONLY_FOR.items():
        if dataset[key] is not None and dataset["name"] != name:
            raise UserError(
                f"dataset.{key}: {dataset[key]} is for data set {name}, not for {dataset['name']}; remove it"
            )
    if dataset["root"] is None:
        raise UserError("dataset.root is not set: set it in the YAML, or add --set dataset.root=DIR")
    if not Path(dataset["root"]).is_dir():
        hint = (
            f"run python3 -m datasets.demo --root {dataset['root']} to create it"
            if dataset["name"] == "demo"
            else "set dataset.root to its location; datasets/README.md says how to get it"
        )
        raise UserError(f"{dataset['root']}: no such folder for data set {dataset['name']}; {hint}")
    videos = LISTS[dataset["name"]](dataset, split)
    return _with_sound(videos) if with_sound else videos


def _without_sound(videos: VideoList) -> list[int]:
    """Return the rows of videos that have no sound by a prepared folder's manifest. UserError if none has any."""
    manifest = manifest_of(videos.root)
    if manifest is None or not manifest.without_sound:
        return []
    silent = [row for row, name in enumerate(videos.names()) if name in manifest.without_sound]
    if len(silent) == len(videos):
        raise UserError(f"{videos.root}: none of the {len(videos)} videos has sound (column audio of {MANIFEST})")
    return silent


def _with_sound(videos: VideoList) -> VideoList:
    silent = _without_sound(videos)
    return videos.subset(sorted(set(range(len(videos))) - set(silent))) if silent else videos


def build_training(cfg: dict, device: torch.device, pairs: bool = False) -> DataLoader:
    """Build this rank's loader of training clips (`batch_sampler`: `EpochBatches`, `dataset`: `TrainingClips`).

    With `pairs`, a sample is two clips of a video without sound.

    Raises:
        UserError: the data are missing, or the batch is not divisible by processes x micro-batches, or is larger than
            an epoch.
    """
    data, pieces = cfg["dataset"], world_size() * cfg["accumulate"]
    if data["batch_size"] % pieces:
        raise UserError(
            f"dataset.batch_size: {data['batch_size']} is the total and does not divide into {world_size()} processes "
            f"x {cfg['accumulate']} micro-batches (accumulate)"
        )
    train = data["train"]
    videos = build_videos(data, train["split"])
    if train["return_labels"] and (videos.labels < 0).all():
        raise UserError(f"dataset.train.return_labels: {videos.root} has no labels; remove the key, or add labels")
    recipe = ClipRecipe.from_config(data, train["use_augmentation"])
    silent = [] if pairs else _without_sound(videos)  # they stay in the list, which numbers the memory bank's rows
    if silent:
        log.info("%d videos have no sound by %s; clips of others take their places", len(silent), MANIFEST)
    decoded = _decoded(cfg, sound=not pairs)
    plain_from = _plain_from(cfg)
    if plain_from is None and cfg["monitor_every"]:
        _compare_scales(recipe)
    clips = TrainingClips(videos, recipe, train["clips_per_video"], cfg["seed"], pairs, decoded, silent, plain_from)
    batches = EpochBatches(
        len(clips),
        data["batch_size"],
        accumulate=cfg["accumulate"],
        rank=rank(),
        world_size=world_size(),
        drop_last=train["drop_last"],
    )
    if not batches.steps:
        raise UserError(
            f"dataset.batch_size: {data['batch_size']} exceeds the {len(clips)} clips of an epoch "
            f"({len(videos)} videos x {train['clips_per_video']}); lower it, or raise train.clips_per_video"
        )
    sample_bytes = recipe.num_bytes * (2 if pairs else 1)
    return make_loader(
        clips, _workers(cfg), device, _staged(device, batches.micro_batch_size * sample_bytes), batch_sampler=batches
    )


def _plain_from(cfg: dict) -> int | None:
    """Return the first epoch without augmentation, or None."""
    plain_epochs = cfg["dataset"]["train"]["plain_epochs"]
    if not plain_epochs:
        return None
    plain_from = cfg["optimizer"]["num_epochs"] - plain_epochs
    log.info("no augmentation after epoch %d", plain_from)
    return plain_from


def _compare_scales(recipe: ClipRecipe) -> None:
    """Warn if held-out crops are larger or smaller than those of training.

    A network that saw everything smaller or larger in training finds less (Touvron et al., *Fixing the train-test
    resolution discrepancy*, NeurIPS 2019).
    """
    if abs(recipe.test_scale - recipe.mean_scale) > SCALE_TOLERANCE:
        log.warning(
            "held-out crops are %.0f%% of a frame's side (crop_size / frame_size), training crops %.0f%% on average "
            "(min_area): held-out figures may come out too low; dataset.frame_size=%d would fit",
            100 * recipe.test_scale,
            100 * recipe.mean_scale,
            round(recipe.crop_size / recipe.mean_scale),
        )


def build_held_out(
    cfg: dict, device: torch.device, most: int | None = MONITOR_VIDEOS, trained: VideoList | None = None
) -> DataLoader:
    """Build a loader of the test split's videos, `clips_per_video` windows each.

    Uses at most `most` videos, evenly spaced in the list. Warns if any of the split's videos are also in `trained`.
    """
    data = cfg["dataset"]
    videos = build_videos(data, data["test"]["split"], with_sound=True)
    if trained is not None and (both := set(trained.names()) & set(videos.names())):
        log.warning("%d of %d held-out videos are training videos, too: memorised videos count", len(both), len(videos))
    recipe = ClipRecipe.from_config(data, augment=False)
    windows = data["test"]["clips_per_video"]
    clips = EvenClips(videos, recipe, windows, _decoded(cfg))
    if most is not None and most < len(videos):
        clips = Subset(clips, np.linspace(0, len(videos) - 1, most).round().astype(int).tolist())
    batch_size = max(1, data["batch_size"] // windows)
    return make_loader(clips, cfg["num_workers"], device, batch_size=batch_size, collate_fn=collate_readable)


def build_labelled(cfg: dict, section: str, fold: int, allow_missing: bool) -> tuple[VideoList, list[str], list[str]]:
    """List the labelled videos of an evaluation's section `train` or `test`.

    Returns:
        The videos, the names of the missing ones, and the names of those left out because they have no label.

    Raises:
        UserError: there are no data, no video has a label, or videos are missing and `allow_missing` is False.
    """
    dataset = {**cfg["dataset"], "fold": fold}
    split = dataset[section]["split"]
    videos, unlabelled = labelled_videos(build_videos(dataset, split))
    if not len(videos):
        raise UserError(
            f"{videos.root}: none of the {len(unlabelled)} videos of split {split} has a label; set dataset.labels "
            "(folder), or add vggsound.csv (vggsound)"
        )
    if unlabelled:
        log.warning("%d videos of split %s are left out: they have no label", len(unlabelled), split)
    return *present_videos(videos, allow_missing), unlabelled


@dataclass(frozen=True)
class FoldData:
    """The videos of one fold.

    `chosen` holds the rows of `train` to train on; `parts` the groups of classes with one classifier each (all, or seen
    and unseen) and their rows of `train` and `test`; `missing` the names of absent files.
    """

    train: VideoList
    test: VideoList
    chosen: np.ndarray
    parts: list[Part]
    missing: list[str]
    unlabelled: list[str]


def build_fold(cfg: dict, fold: int, args: argparse.Namespace) -> FoldData:
    """List the videos of one fold of an evaluation, and the parts that get one classifier each.

    `args` holds the command-line options `few_shot_ratio`, `use_rest_classes` and `allow_missing`.

    Raises:
        UserError: bad lists, videos in both splits, missing files without `allow_missing`, or a number of classes that
            differs from the YAML's.
    """
    if cfg["dataset"]["num_folds"] and "{fold" not in cfg["dataset"]["train"]["split"]:
        raise UserError(
            f"dataset.train.split: {cfg['dataset']['train']['split']} is the same for each of num_folds: "
            f"{cfg['dataset']['num_folds']}; replace the fold's number by {{fold}}"
        )
    for section in ("train", "test"):
        _check_fold(cfg["dataset"][section]["split"], section, fold)
    train, missing, unlabelled = build_labelled(cfg, "train", fold, args.allow_missing)
    test, missing_test, unlabelled_test = build_labelled(cfg, "test", fold, args.allow_missing)
    both = set(train.names()) & set(test.names())
    if both:
        raise UserError(
            f"dataset.test.split: {len(both)} of its {len(test)} videos are training videos, too, such as {min(both)}: "
            "memorised videos would count as correct"
        )
    asked = cfg["model"]["args"]["n_classes"]
    if asked not in (None, len(train.classes)):
        raise UserError(
            f"model.args.n_classes: {asked}, but the data have {len(train.classes)} classes; "
            f"omit it, or --set model.args.n_classes={len(train.classes)}"
        )
    chosen = few_shot_rows(train, args.few_shot_ratio, cfg["few_shot_seed"])
    parts = make_parts(train, test, chosen, rest_classes_file(cfg["dataset"]) if args.use_rest_classes else None)
    missing, unlabelled = sorted({*missing, *missing_test}), sorted({*unlabelled, *unlabelled_test})
    return FoldData(train, test, chosen, parts, missing, unlabelled)


def _check_fold(split: str, section: str, fold: int) -> None:
    """Raise UserError if a split's name is that of another fold: its result would be filed as this one's."""
    number = re.search(r"\d+$", split)
    if "{fold" not in split and fold != (int(number[0]) if number else 1):
        raise UserError(
            f"dataset.{section}.split: {split} is not of fold {fold} (dataset.fold); write {{fold}} for the number, or "
            "--set dataset.fold"
        )


def build_fresh_clips(cfg: dict, videos: VideoList, device: torch.device) -> DataLoader:
    """Build this rank's loader of random training clips for a classifier (`batch_sampler`: `SharedBatches`).

    Raises:
        UserError: an epoch does not fill one batch and `drop_last` is set.
    """
    data, train = cfg["dataset"], cfg["dataset"]["train"]
    recipe = ClipRecipe.from_config(data, train["use_augmentation"])
    clips = FreshClips(videos, recipe, train["clips_per_video"], cfg["seed"], train["use_shuffle"])
    batches = training_batches(cfg, len(clips), rank(), world_size())
    batch_bytes = _staged(device, -(-data["batch_size"] // world_size()) * recipe.num_bytes)
    return make_loader(clips, _workers(cfg), device, batch_bytes, batch_sampler=batches, collate_fn=collate_readable)


def training_batches(cfg: dict, clips: int, rank: int = 0, world_size: int = 1) -> SharedBatches:
    """Return the batches of an epoch of `clips` clips. Raises UserError if there are none."""
    data = cfg["dataset"]
    batches = SharedBatches(clips, data["batch_size"], rank, world_size, data["train"]["drop_last"])
    if not batches.steps:
        raise UserError(
            f"dataset.batch_size: {data['batch_size']} exceeds the {clips} clips of an epoch; lower it, raise "
            "train.clips_per_video, or --set dataset.train.drop_last=false"
        )
    return batches


def build_video_clips(
    cfg: dict, videos: VideoList, device: torch.device, augment: bool = False, num_random: int = 0, num_dense: int = 0
) -> DataLoader:
    """Build this rank's loader of all clips of its videos, about `batch_size` clips per step over all ranks."""
    clips = VideoClips(videos, ClipRecipe.from_config(cfg["dataset"], augment), cfg["seed"], num_random, num_dense)
    step = max(world_size(), cfg["dataset"]["batch_size"] // (num_random + num_dense))
    batches = SharedBatches(len(videos), step, rank(), world_size())
    return make_loader(clips, _workers(cfg), device, batch_sampler=batches, collate_fn=collate_readable)


def _decoded(cfg: dict, sound: bool = True) -> DecodedVideos | None:
    """Return the cache of decoded videos, or None without `dataset.decode_once`."""
    data = cfg["dataset"]
    if not data["decode_once"]:
        return None
    return DecodedVideos(Path(cfg["cache_dir"]) / "decoded", data["audio_srate"] if sound else 0)


def _staged(device: torch.device, batch_bytes: int) -> int:
    """Return `make_loader`'s `batch_bytes`: batches for a GPU are staged. A CPU works on them where they are."""
    return batch_bytes if device.type == "cuda" else 0


def _workers(cfg: dict) -> int:
    """Return this process's share of the node's workers."""
    return -(-cfg["num_workers"] // local_world_size())


__all__ = [
    "FoldData",
    "build_fold",
    "build_fresh_clips",
    "build_held_out",
    "build_labelled",
    "build_training",
    "build_video_clips",
    "build_videos",
    "training_batches",
]
