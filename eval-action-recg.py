"""Fine-tune the encoder and a classifier for action recognition (UCF-101, HMDB-51; few-shot).

    python3 eval-action-recg.py configs/demo/finetune.yaml configs/demo/xid.yaml
    python3 eval-action-recg.py configs/ucf/8at16-fold1.yaml configs/VGGSound-N1024.yaml --set dataset.root=DIR
    ... --few-shot-ratio 0.1       ... --checkpoint FILE       ... --random-weights

Results go to <model_dir>/<name>/eval-<benchmark.name>/fold-<NN>/ of MODEL_CFG's run. BN statistics cover the batches
of all processes, and a sample's randomness depends on its place in the epoch, so results do not depend on the number of
processes. On SIGTERM or SIGUSR1 it saves at the next step; with --resume it continues from there.
"""

import argparse
import copy
import math
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import FoldData, build_fresh_clips, build_video_clips
from datasets.concepts import Part
from datasets.evaluation import data_fingerprint
from datasets.preprocessing import VideoPrep
from datasets.video_dataset import ClipRecipe, VideoList
from models.classifiers import ClassificationWrapper, FeatureExtractor, build_pooling
from utils import checkpoint, evaluation
from utils.cli import evaluation_parser, run_script
from utils.compiling import compiles, for_batch
from utils.distributed import broadcast_object, is_main, launch, world_size, wrap
from utils.errors import RunFailed
from utils.features import clip_outputs, rows_of
from utils.folds import begin_fold, evaluate_folds
from utils.frozen import tensor_hash
from utils.logger import MetricsWriter, StepClock, duration, in_words, log, stage
from utils.metrics import Averages
from utils.optim import build_optimizer, learning_rate, set_learning_rate
from utils.precision import Precision
from utils.prefetch import prefetch
from utils.results import Outcome, finish_evaluation
from utils.stopping import StopSignal
from utils.sync_bn import convert_sync_bn, count_rank
from utils.trial import try_compiled


def main() -> None:
    args = evaluation_parser(__doc__).parse_args()
    cfg, model_cfg = evaluation.load_evaluation(args, "ClassificationWrapper", "eval-action-recg-linear.py")
    build_pooling(cfg["model"]["args"]["pooling_op"])  # fail early if it is invalid
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
    """Fine-tune on one fold and test. Rank 0 returns the results."""
    folder, backbone, origin = begin_fold(args, cfg, model_cfg, fold, data)
    fingerprint, shape = tensor_hash(backbone.state_dict()), cfg["model"]["args"]
    extractor = FeatureExtractor(backbone, [shape["feat_name"]], [shape["pooling_op"]], [shape["feat_dim"]])
    extractor.check(ClipRecipe.from_config(cfg["dataset"], augment=False).clip_shape)
    parts = {part.name: list(part.classes) for part in data.parts}
    recipe = evaluation.recipe(cfg, few_shot_ratio=args.few_shot_ratio, parts=parts)
    videos = data_fingerprint(data.train, data.test, times=False)
    precision = Precision(cfg["precision"], device).name
    stored = evaluation.StoredClassifier(folder, cfg, fingerprint, videos, recipe, precision)
    states = stored.load()
    evaluation.begin_training(args, cfg, model_cfg, fold, anew=not states)
    failures, outcome = evaluation.Failures(args.allow_missing, states), {}
    writer = MetricsWriter(folder, None if states else 0)
    for part in data.parts:
        stage(f"Fine-tuning, {part.name} classes")
        options = {key: value for key, value in cfg["model"]["args"].items() if key != "n_classes"}
        torch.manual_seed(cfg["seed"])
        model = ClassificationWrapper(copy.deepcopy(backbone), len(part.classes), **options)
        model, state = convert_sync_bn(model.to(device)), states.get(part.name)
        train, test = data.train.subset(part.train), data.test.subset(part.test)
        tested = fine_tune(device, cfg, model, part, train, test, stored, state, failures, writer, stop)
        if tested is not None:
            outcome[part.name] = tested
    writer.close()
    if not is_main():
        return {}
    facts = evaluation.describe(args, cfg, model_cfg, fold, "finetune")
    facts |= evaluation.describe_videos(args, cfg, data, failures)
    facts |= {"encoder": {"weights": origin, "hash": fingerprint}, "precision": precision, "recipe": recipe}
    return finish_evaluation(folder, facts, outcome)


def fine_tune(
    device: torch.device,
    cfg: dict,
    model: ClassificationWrapper,
    part: Part,
    train: VideoList,
    test: VideoList,
    stored: evaluation.StoredClassifier,
    state: dict | None,
    failures: evaluation.Failures,
    writer: MetricsWriter,
    stop: StopSignal,
) -> Outcome | None:
    """Train on the videos of one part, resuming from `state` if given, and test. Rank 0 returns the outcome.

    Raises:
        Preempted: the run was asked to stop.
    """
    precision, prepare = Precision(cfg["precision"], device), VideoPrep(cfg["dataset"]["color"]).to(device)
    data, schedule, base_rate = cfg["dataset"], cfg["optimizer"], cfg["optimizer"]["lr"]["base_lr"]
    warmup = schedule["warmup_epochs"] if schedule["warmup_classifier"] else 0
    num_epochs = warmup + schedule["num_epochs"]

    def classify(batch: dict, keep: Tensor) -> Tensor:
        """Logits of a training batch; `keep` is a dropout mask from `ClassificationWrapper.draw_dropout`."""
        with precision.autocast():
            return net(prepare(batch["frames"], batch["video_aug"]), keep)

    def without_dropout(batch: dict) -> Tensor:
        return classify(batch, torch.ones(len(batch["frames"]), model.feat_dim, device=device))

    def loss_of(batch: dict, clips: int, epoch: int, step: int) -> Tensor:
        """The loss of this rank's share of `clips`, scaled so that DDP's mean over ranks is the mean over all."""
        has_clips = "frames" in batch
        count_rank(model, has_clips)  # a rank without clips runs a dummy: the others' BN waits for it
        keep = model.draw_dropout(batches.size(step), (cfg["seed"], epoch, step))  # for the whole batch, on every rank
        keep = (keep.pin_memory() if device.type == "cuda" else keep).to(device, non_blocking=True)
        with for_batch(whole=has_clips and len(batch["frames"]) == len(batches.own(0))):
            if has_clips:
                own = batch["position"] - step * batches.batch_size
                loss = F.cross_entropy(classify(batch, keep[own]), labels[batch["index"]], reduction="sum")
            else:
                with precision.autocast():
                    loss = 0 * net(prepare.forward(dummy.to(device)), keep[:1]).sum()
        return loss * world_size() / clips

    def test_between_epochs(done: int) -> None:
        logits, present = test_logits(device, cfg, model, test, failures, stop, data["test"]["clips_per_video"])
        if is_main():
            figures = evaluation.clip_accuracies(logits, part.test_labels[present])
            writer.write(f"{part.name} test", done * batches.steps, figures)
            log.info("after epoch %d: %s", done, in_words(figures))

    def save(epoch: int, step: int, warming: bool) -> None:
        training = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": precision.state_dict()}
        stored.save(part.name, epoch=epoch, step=step, warming=warming, failures=failures.names, **training)

    torch.backends.cudnn.benchmark = True  # all batches except the last have the same shape
    start_epoch, start_step = 0, 0
    if state is not None:
        checkpoint.load_weights(model, state["model"], str(stored.file))
        precision.load_state_dict(state["scaler"])
        start_epoch, start_step = state["epoch"], state.get("step", 0)  # older states were only stored between epochs
    last_epoch = start_epoch if cfg["test_only"] else num_epochs
    if start_epoch < last_epoch:
        loader = build_fresh_clips(cfg, train, device)
        batches, labels = loader.batch_sampler, part.train_labels.to(device)
        dummy = torch.zeros(1, *loader.dataset.recipe.clip_shape, dtype=torch.uint8)
        if compiles(cfg["compile"], device):
            prepare.compile(dynamic=False)
        already_tested = broadcast_object(writer.wrote(f"{part.name} test", start_epoch * batches.steps))
        if start_epoch and not start_step and start_epoch % cfg["test_freq"] == 0 and not already_tested:
            test_between_epochs(start_epoch)  # a signal had cut it short
        batches.start_at(start_epoch, start_step, last_epoch - start_epoch)
        stream = prefetch(loader, device)
    for epoch in range(start_epoch, last_epoch):
        warming = epoch < warmup  # first only the classifier, with the backbone in eval mode
        if epoch in (start_epoch, warmup):
            model.let_backbone_learn(not warming)
            optimizer = build_optimizer(schedule, model)
            net = wrap(model, cfg["compile"], device)
        if epoch == start_epoch and state is not None and state["warming"] == warming:
            checkpoint.load_optimizer(optimizer, state["optimizer"], stored.file)
        model.train()
        model.video_model.train(not warming)
        if epoch in (start_epoch, warmup) and compiles(cfg["compile"], device):
            stream = try_compiled(stream, without_dropout, net, prepare)
        averages, clock = Averages(), StepClock()
        for step, batch in enumerate(clock.timed(islice(stream, batches.steps - start_step)), start_step):
            rate = base_rate if warming else learning_rate(schedule, epoch - warmup, step / batches.steps)
            set_learning_rate(optimizer, rate)
            if clips := failures.note(batch):  # 0: no rank can read one of this batch
                loss = loss_of(batch, clips, epoch, step)
                precision.backward(loss)
                precision.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
                averages.add({"loss": loss})
            clock.count(batches.size(step))
            stopping = stop.on_any_rank()
            if (step + 1) % cfg["print_freq"] == 0 or step + 1 == batches.steps or stopping:
                figures = averages.read() | {"lr": rate} | clock.read()
                if not math.isfinite(figures.get("loss", 0.0)):
                    raise RunFailed(f"{part.name}, epoch {epoch + 1}: the loss is not finite; lower lr.base_lr")
                writer.write(f"{part.name} train", epoch * batches.steps + step + 1, figures)
                ahead = ((num_epochs - epoch) * batches.steps - step - 1) * data["batch_size"]
                place = f"{'warm-up ' if warming else ''}epoch {epoch + 1}/{num_epochs} step {step + 1}/{batches.steps}"
                log.info("%s | %s left | %s", place, duration(ahead / figures["clips_per_s"]), in_words(figures))
                if stopping:
                    save(epoch, step + 1, warming)
                    raise stop.preempted(f"{part.name}, epoch {epoch + 1}, step {step + 1}")
                clock.restart()

        start_step, done = 0, epoch + 1
        if done % cfg["test_freq"] == 0 or done == num_epochs:
            save(done, 0, warming)
        if done % cfg["test_freq"] == 0 and done < num_epochs:
            test_between_epochs(done)

    num_final, num_dense = evaluation.final_clips(cfg)
    logits, present = test_logits(device, cfg, model, test, failures, stop, num_final, num_dense)
    if not is_main():
        return None
    by_rate = {base_rate: {cfg["model"]["args"]["feat_name"]: logits}}
    return Outcome(part.classes, part.test_labels[present], by_rate, num_final, (last_epoch, num_epochs))


def test_logits(
    device: torch.device,
    cfg: dict,
    model: ClassificationWrapper,
    test: VideoList,
    failures: evaluation.Failures,
    stop: StopSignal,
    num_random: int,
    num_dense: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute logits of the test videos' clips (see `VideoClips`) on all ranks, gathered on rank 0.

    Returns:
        Logits (videos, clips, classes) of the readable videos, and a bool mask of which videos are readable.
    """
    precision, prepare = Precision(cfg["precision"], device), VideoPrep(cfg["dataset"]["color"]).to(device)

    def forward(frames: Tensor, augmentation: Tensor | None) -> dict[str, Tensor]:
        with precision.autocast():
            return {"logits": model.forward(prepare(frames.to(device)))}  # not model(), which is compiled for one size

    model.eval()
    loader = build_video_clips(cfg, test, device, num_random=num_random, num_dense=num_dense)
    clips = clip_outputs(forward, stop.watch(loader), len(test), cfg["dataset"]["batch_size"], failures)
    outputs, present = rows_of(clips, torch.arange(len(test)))
    return outputs.get("logits", torch.empty(0)), present


if __name__ == "__main__":
    run_script(main)
