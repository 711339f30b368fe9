"""All folds of an evaluation, one after the other, in one process of it."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from datasets import FoldData, build_fold, training_batches
from models import build_model
from utils import evaluation
from utils.distributed import is_main
from utils.logger import log, parameter_summary, stage, start_run
from utils.precision import Precision
from utils.results import finish_folds
from utils.stopping import StopSignal


def evaluate_folds(
    device: torch.device, evaluate_fold: Callable[..., dict], args: argparse.Namespace, cfg: dict, model_cfg: dict
) -> None:
    """Evaluate each fold by `evaluate_fold(device, args, cfg, model_cfg, fold, data, stop)`, and write their mean.

    Raises:
        UserError: a mistake in any fold's data, too few of them for a batch, or a precision that is not possible here,
            before the first begins.
    """
    folds = {fold: build_fold(cfg, fold, args) for fold in evaluation.folds(cfg)}
    Precision(cfg["precision"], device)
    for part in [part for data in folds.values() for part in data.parts if not cfg["test_only"]]:
        training_batches(cfg, len(part.train) * cfg["dataset"]["train"]["clips_per_video"])
    stop = StopSignal(evaluation.AGAIN)
    results = [evaluate_fold(device, args, cfg, model_cfg, fold, data, stop) for fold, data in folds.items()]
    if is_main() and len(results) > 1:
        finish_folds(evaluation.folds_file(args, cfg, model_cfg), results)


def begin_fold(
    args: argparse.Namespace, cfg: dict, model_cfg: dict, fold: int, data: FoldData
) -> tuple[Path, nn.Module, str]:
    """Open a fold's folder and log, and build its video backbone.

    Returns:
        The folder, the backbone, and a description of the backbone's weights.

    Raises:
        UserError: the folder is in use or cannot be written to, or the weights are not there or do not match.
    """
    folder = evaluation.fold_folder(args, cfg, model_cfg, fold)
    start_run({"evaluation": cfg, "pretraining": model_cfg}, args.quiet, folder)

    stage(f"Data, fold {fold}")
    for part in data.parts:
        log.info("%s", part)

    stage("Encoder")
    torch.manual_seed(cfg["seed"])
    backbone = build_model(model_cfg["model"]).video_model
    origin = evaluation.load_encoder(backbone, args, model_cfg)
    log.info("%s; %s", parameter_summary(backbone), origin)
    return folder, backbone, origin
