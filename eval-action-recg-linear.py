"""Train linear action classifiers on frozen features (UCF-101, HMDB-51; few-shot; unseen concepts).

    python3 eval-action-recg-linear.py configs/demo/linear.yaml configs/demo/xid.yaml
    python3 eval-action-recg-linear.py configs/ucf/8at16-linear.yaml configs/VGGSound-N1024.yaml --set dataset.root=DIR
    ... --few-shot-ratio 0.2 --use-rest-classes       ... --checkpoint FILE       ... --random-weights

Results go to <model_dir>/<name>/eval-<benchmark.name>/fold-<NN>/ of MODEL_CFG's run. Every process computes features of
its share of the clips and rank 0 trains the classifiers on all of them, so results do not depend on the number of
processes. On SIGTERM or SIGUSR1 it stops at the next batch; with --resume it continues from the last saved epoch.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets import FoldData, build_fresh_clips, build_video_clips, training_batches
from datasets.concepts import Part
from datasets.evaluation import data_fingerprint
from datasets.preprocessing import VideoPrep
from datasets.video_dataset import ClipRecipe, VideoList, epoch_order
from models.classifiers import FeatureExtractor, build_pooling
from models.linear_probe import LinearProbe, mean_losses
from utils import evaluation
from utils.cli import evaluation_parser, run_script
from utils.compiling import compiles
from utils.distributed import broadcast_object, gather_objects, is_main, launch
from utils.errors import RunFailed, UserError
from utils.features import ClipOutputs, clip_outputs, rows_of, stored_clip_outputs
from utils.files import make_folder
from utils.folds import begin_fold, evaluate_folds
from utils.frozen import FrozenEncoder
from utils.logger import MetricsWriter, StepClock, in_words, log, stage
from utils.precision import Precision
from utils.results import Outcome, finish_evaluation, neighbours, quick_test
from utils.stopping import StopSignal


def main() -> None:
    args = evaluation_parser(__doc__).parse_args()
    cfg, model_cfg = evaluation.load_evaluation(args, "MOSTWrapper", "eval-action-recg.py")
    if cfg["encoder_bn"] == "train" and cfg["feature_views"]:
        raise UserError("encoder_bn: train changes the encoder in every step; set feature_views: 0")
    for pooling in cfg["model"]["args"]["pooling_ops"]:
        build_pooling(pooling)  # fail early if one is invalid
    launch(evaluate_folds, args, evaluate_fold, args, cfg, model_cfg)


def evaluate_fold(
    device: torch.device,
    args: argparse.Namespace,
    cfg: dict,
    model_cfg: dict,
    fold: int,
    data: FoldData,
    stop: StopSignal,
) -> dict:
    """Train the classifiers of one fold and test them. Rank 0 returns the results."""
    folder, backbone, origin = begin_fold(args, cfg, model_cfg, fold, data)
    shape = {key: cfg["model"]["args"][key] for key in ("feat_names", "pooling_ops", "feat_dims")}
    extractor, precision = FeatureExtractor(backbone, **shape), Precision(cfg["precision"], device)
    extractor.check(ClipRecipe.from_config(cfg["dataset"], augment=False).clip_shape)
    drifts = cfg["encoder_bn"] == "train"
    prepare = VideoPrep(cfg["dataset"]["color"]).to(device)
    compiled_size = cfg["dataset"]["batch_size"] if not drifts and compiles(cfg["compile"], device) else None
    encoder = FrozenEncoder(extractor, prepare, precision.autocast, device, drifts, compiled_size)
    parts = {part.name: list(part.classes) for part in data.parts}
    recipe = evaluation.recipe(cfg, few_shot_ratio=args.few_shot_ratio, parts=parts)
    videos = data_fingerprint(data.train, data.test, times=False)
    stored = evaluation.StoredClassifier(folder, cfg, encoder.hash, videos, recipe, precision.name)
    states = stored.load()
    failures = evaluation.Failures(args.allow_missing, states)
    if is_main() and not drifts:
        make_folder(Path(cfg["cache_dir"]), "cache_dir")
    evaluation.begin_training(args, cfg, model_cfg, fold, anew=not states)

    stage("Features")
    num_epochs, num_quick = cfg["optimizer"]["num_epochs"], cfg["dataset"]["test"]["clips_per_video"]
    base_rate = cfg["optimizer"]["lr"]["base_lr"]
    num_final, num_dense = evaluation.final_clips(cfg)
    num_random = max(num_quick, num_final)  # computed once; a test with fewer clips takes the first ones
    in_final_test = [*range(num_final), *range(num_random, num_random + num_dense)]
    views, tests = None, None
    if cfg["feature_views"]:
        augment = cfg["dataset"]["train"]["use_augmentation"]
        views = clip_features(cfg, data.train, encoder, failures, stop, augment, num_random=cfg["feature_views"])
    if not drifts:
        tests = clip_features(cfg, data.test, encoder, failures, stop, num_random=num_random, num_dense=num_dense)

    writer, outcome = MetricsWriter(folder, None if states else 0), {}
    for part in data.parts:
        stage(f"Linear classifiers, {part.name} classes")
        probe = LinearProbe(cfg, extractor.names, len(part.classes), device)
        encoder.reset()
        if part.name in states:
            probe.load_state_dict(states[part.name], str(stored.file))
            encoder.reset(states[part.name]["drift"])
        last_epoch = probe.epoch if cfg["test_only"] else num_epochs
        fresh = None
        if not views and probe.epoch < last_epoch:
            fresh = build_fresh_clips(cfg, data.train.subset(part.train), device)
        for epoch in range(probe.epoch, last_epoch):
            torch.manual_seed((1_000_003 * cfg["seed"] + epoch) % 2**63)  # for dropout
            if views:
                batches = stored_batches(cfg, part, views, epoch)
            else:
                batches = fresh_batches(encoder, part, fresh, failures, stop, epoch)
            clock, history = StepClock(), []
            for step, (features, labels, progress) in enumerate(batches):
                features, labels = {k: x.to(device) for k, x in features.items()}, labels.to(device)
                history.append(probe.step(features, labels, epoch, progress))
                clock.count(len(labels))
                if fresh is not None and (step + 1) % cfg["print_freq"] == 0:
                    place = f"epoch {epoch + 1}/{num_epochs} step {step + 1}/{len(fresh)}"
                    log.info("%s, %.1f clips/s", place, clock.read()["clips_per_s"])

            probe.epoch, stopping = epoch + 1, stop.on_any_rank()
            if probe.epoch % cfg["test_freq"] and probe.epoch != num_epochs and not stopping:
                continue
            figures = mean_losses(history)  # empty on ranks other than 0
            headline = [figures.get(f"loss {name} {base_rate:g}", 0.0) for name in extractor.names]
            if not broadcast_object(all(map(math.isfinite, headline))):
                raise RunFailed(f"{part.name}, epoch {probe.epoch}: the loss is not finite; lower optimizer.lr.base_lr")
            if is_main():
                if tests is not None:
                    figures |= quick_test(probe.logits, tests, part.test, part.test_labels, num_quick)
                log.info("epoch %d/%d: %s", probe.epoch, num_epochs, in_words(figures))
                writer.write(part.name, probe.epoch, figures)
            stored.save(part.name, **probe.state_dict(), drift=encoder.drift(), failures=failures.names)
            if stopping:
                raise stop.preempted(f"{part.name}, epoch {probe.epoch}")

        clips = tests or clip_features(
            cfg, data.test, encoder, failures, stop, num_random=num_random, num_dense=num_dense
        )
        if is_main():
            features, present = rows_of(clips, part.test)
            features, labels = {name: x[:, in_final_test] for name, x in features.items()}, part.test_labels[present]
            trained = probe.epoch, num_epochs
            outcome[part.name] = Outcome(part.classes, labels, probe.logits(features), num_final, trained)
            if views:
                train_features, train_present = rows_of(views, part.train)
                train_labels = part.train_labels[train_present]
                outcome[part.name].neighbours = neighbours(train_features, train_labels, features, labels, num_final)
    writer.close()
    hash_after = encoder.check()
    if not is_main():
        return {}
    facts = evaluation.describe(args, cfg, model_cfg, fold, "linear")
    facts |= evaluation.describe_videos(args, cfg, data, failures)
    facts |= {
        "encoder": {"weights": origin, "bn": cfg["encoder_bn"], "hash": encoder.hash, "hash_after": hash_after},
        "precision": precision.name,
        "recipe": recipe,
    }
    return finish_evaluation(folder, facts, outcome)


def clip_features(
    cfg: dict,
    videos: VideoList,
    encoder: FrozenEncoder,
    failures: evaluation.Failures,
    stop: StopSignal,
    augment: bool = False,
    num_random: int = 0,
    num_dense: int = 0,
) -> ClipOutputs:
    """Features of clips of every video (see `VideoClips`), cached unless the encoder drifts."""
    chunk, precision = cfg["dataset"]["batch_size"], Precision(cfg["precision"], encoder.device).name
    meaning = {
        "encoder": encoder.hash,
        "features": [cfg["model"]["args"][key] for key in ("feat_names", "pooling_ops")],
        "precision": precision,
        "videos": data_fingerprint(videos),
        "recipe": asdict(ClipRecipe.from_config(cfg["dataset"], augment)),
        "clips": [cfg["seed"], num_random, num_dense],
    }

    def batches() -> Iterator[dict]:
        return stop.watch(build_video_clips(cfg, videos, encoder.device, augment, num_random, num_dense))

    if encoder.drifts:
        return clip_outputs(encoder, batches(), len(videos), chunk, failures)
    return stored_clip_outputs(cfg["cache_dir"], meaning, encoder, batches, len(videos), chunk, failures)


def stored_batches(cfg: dict, part: Part, views: ClipOutputs, epoch: int) -> Iterator[tuple[dict, Tensor, float]]:
    """Yield an epoch's batches on rank 0, with a random stored view at every position.

    A batch consists of features by name, labels, and the fraction of the epoch completed before it, 0 to 1.
    """
    if not is_main():
        return
    arrays, readable = views
    present = torch.from_numpy(readable)[part.train]
    rows, labels = part.train[present].numpy(), part.train_labels[present]
    train = cfg["dataset"]["train"]
    order = epoch_order(len(rows), train["clips_per_video"], cfg["seed"], epoch, train["use_shuffle"])
    view = np.random.default_rng((cfg["seed"], epoch, 1)).integers(cfg["feature_views"], size=len(order))
    batches = training_batches(cfg, len(order))
    for step in range(batches.steps):
        at = slice(step * batches.batch_size, step * batches.batch_size + batches.size(step))
        features = {name: torch.from_numpy(array[rows[order[at]], view[at]]) for name, array in arrays.items()}
        yield features, labels[order[at]], step / batches.steps


def fresh_batches(
    encoder: FrozenEncoder,
    part: Part,
    loader: DataLoader,
    failures: evaluation.Failures,
    stop: StopSignal,
    epoch: int,
) -> Iterator[tuple[dict, Tensor, float]]:
    """Like `stored_batches`, with features that all ranks compute on the fly."""
    loader.batch_sampler.start_at(epoch)
    for step, batch in enumerate(stop.watch(loader)):
        # Features come back to the CPU, so that the GPU is done with the frames before another batch overwrites them.
        features = encoder.training_features(batch, loader.dataset.recipe.clip_shape)
        own = {"failures": batch["failures"], "index": batch.get("index", []), "features": features}
        shares = gather_objects(own)
        for share in shares:
            failures(share["failures"])
        shares = [share for share in shares if len(share["index"])]
        if is_main() and shares:
            names = shares[0]["features"]
            features = {name: torch.cat([share["features"][name] for share in shares]) for name in names}
            labels = part.train_labels[torch.cat([share["index"] for share in shares])]
            yield features, labels, step / loader.batch_sampler.steps


if __name__ == "__main__":
    run_script(main)
