"""Pre-train with VICReg (variance, invariance, covariance) on clips and their sound, or on two clips per video.

    python3 main-vicreg.py configs/demo/vicreg.yaml                              # a laptop: the demo data set
    python3 main-vicreg.py configs/VGGSound-VICReg.yaml --set dataset.root=DIR --multiprocessing-distributed
    torchrun --nproc_per_node=8 main-vicreg.py configs/VGGSound-VICReg-Video.yaml --set dataset.root=DIR

Run the same command again to resume where the run stopped.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice

import torch

from criterions import build_criterion
from datasets import build_held_out, build_training
from datasets.preprocessing import BatchPrep
from datasets.statistics import audio_statistics
from models import build_model
from utils.bad_videos import BadVideos
from utils.checkpoint import RunCheckpoints, start_from_others
from utils.cli import pretraining_parser, run_script
from utils.compiling import compiles, for_batch
from utils.config import load_config
from utils.distributed import any_rank, broadcast_object, is_main, launch, records_graphs, world_size, wrap
from utils.errors import UserError
from utils.logger import MetricsWriter, StepClock, TrainingLog, log, parameter_summary, stage, start_run, write_config
from utils.metrics import Averages
from utils.monitor import Monitor
from utils.optim import build_optimizer, learning_rate, set_learning_rate
from utils.precision import Precision
from utils.prefetch import prefetch
from utils.stopping import NonFiniteGuard, StopSignal
from utils.sync_bn import check_bn_batch, synchronise_bn
from utils.trial import try_compiled


def main() -> None:
    args = pretraining_parser(__doc__).parse_args()
    cfg = load_config(args.cfg, args.set, "pre-training")
    if args.seed is not None:
        cfg["seed"] = args.seed
    video_only = cfg["model"]["arch"] == "vicreg_v_wrapper"
    if cfg["loss"]["name"] == "xID" or cfg["model"]["arch"] not in ("vicreg_wrapper", "vicreg_v_wrapper"):
        raise UserError(
            f"{args.cfg}: main-vicreg.py trains a loss on embeddings alone, such as VICLoss, with arch vicreg_wrapper "
            "or vicreg_v_wrapper; for xID see main-ssl.py"
        )
    if cfg["dataset"]["train"]["video_only"] != video_only:
        raise UserError(
            f"{args.cfg}: dataset.train.video_only: {not video_only} does not go with {cfg['model']['arch']}"
        )
    if video_only and (cfg["monitor_every"] or cfg["test_only"]):
        raise UserError(
            f"{args.cfg}: monitor_every and test_only measure retrieval of sound, but this run has no sound"
        )
    launch(pretrain, args, args, cfg)


def pretrain(device: torch.device, args: argparse.Namespace, cfg: dict) -> None:
    """Run one process of the training, from the data to the last checkpoint.

    The loop is that of main-ssl.py but for BN, bank and the call of the loss: a change may belong there, too.
    """
    folder = start_run(cfg, args.quiet)
    precision = Precision(cfg["precision"], device)
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    stop = StopSignal("run it again" if cfg["resume"] else "run it again with resume: true")

    stage("Data")
    video_only = cfg["model"]["arch"] == "vicreg_v_wrapper"
    loader = build_training(cfg, device, pairs=video_only)
    clips, batches, videos = loader.dataset, loader.batch_sampler, loader.dataset.videos
    log.info("%s", videos)
    log.info("an epoch has %d clips, in %d steps of %d", len(clips), batches.steps, cfg["dataset"]["batch_size"])
    checkpoints = RunCheckpoints(folder, cfg, videos.fingerprint, batches.steps, precision.name)
    state = checkpoints.latest()

    stage("Model")
    num_epochs, accumulate = cfg["optimizer"]["num_epochs"], cfg["accumulate"]
    torch.manual_seed(cfg["seed"])
    model = synchronise_bn(build_model(cfg["model"]).to(device), device, cfg["compile"])
    check_bn_batch(model, batches, clips.recipe.clip_shape)
    log.info("%s", parameter_summary(model))
    clips_a_step = f"{accumulate} x {batches.micro_batch_size} clips on each of {world_size()} processes"
    log.info("%s, compile: %s; a step is %s", precision.name, compiles(cfg["compile"], device), clips_a_step)
    criterion = build_criterion(cfg["loss"], device=device)
    log.info("%s", criterion)
    optimizer = build_optimizer(cfg["optimizer"], model)
    log.info("%s, base learning rate %g", type(optimizer).__name__, cfg["optimizer"]["lr"]["base_lr"])
    bad = BadVideos(folder, cfg["max_bad_fraction"], len(clips))
    guard = NonFiniteGuard(folder, videos.name, cfg["skip_nonfinite"], precision.name == "fp16")
    stateful = {
        "model": model,
        "train_criterion": criterion,
        "optimizer": optimizer,
        "scaler": precision,
        "bad_videos": bad,
        "guard": guard,
    }
    start_epoch, start_step, audio_stats = 0, 0, None
    if state is not None:
        checkpoints.restore(state, stateful)
        start_epoch, start_step, audio_stats = state["epoch"], state["step"], state["audio_stats"]
        del state
    else:
        start_from_others(cfg, model, criterion, videos.fingerprint)
        if not video_only:
            audio_stats = broadcast_object(
                audio_statistics(videos, clips.recipe, cfg["num_workers"], cfg["cache_dir"]) if is_main() else None
            )
    prepare = BatchPrep(cfg["dataset"], audio_stats, device)

    def held_out() -> Iterator[dict]:
        """Yield batches of held-out videos; a request to stop ends the measurement, not the run."""
        return stop.watch(build_held_out(cfg, device, trained=videos), alone=True)

    monitor = Monitor(cfg, model, prepare, held_out, precision)
    if cfg["test_only"]:
        monitor.measure(start_epoch)
        return
    write_config(folder, cfg)
    guard.protect(model)
    graphs = records_graphs(cfg, device)
    compression = cfg["gradient_compression"]
    net = wrap(model, cfg["compile"], device, compression, static=accumulate == 1, graphs=graphs)
    if compiles(cfg["compile"], device):
        prepare.video.compile(dynamic=False)

    def embed(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two embeddings of a batch, (N, D) each."""
        with for_batch(whole=len(batch["index"]) == batches.micro_batch_size):
            first, second = prepare(batch)
            with precision.autocast():
                return net(first, second)

    stage("Training")
    writer = MetricsWriter(folder, start_epoch * batches.steps + start_step)
    training_log = TrainingLog(writer, num_epochs, batches.steps, cfg["dataset"]["batch_size"])
    if start_step == 0:
        monitor.record(writer, start_epoch, start_epoch * batches.steps)
        if stop.on_any_rank():
            raise stop.preempted()
    averages, clock = Averages(), StepClock()
    batches.start_at(start_epoch, start_step, num_epochs - start_epoch)
    stream = prefetch(loader, device)
    if compiles(cfg["compile"], device):
        stream = try_compiled(stream, embed, net.train(), prepare.video, graphs)
    for epoch in range(start_epoch, num_epochs):
        model.train()
        losses, indices = [], []
        clock.restart()
        epoch_batches = islice(stream, (batches.steps - start_step) * accumulate)
        for i, batch in enumerate(clock.timed(epoch_batches), start_step * accumulate):
            step, micro_batch = divmod(i, accumulate)
            bad.record(batch)
            last_micro_batch = micro_batch == accumulate - 1
            with nullcontext() if last_micro_batch or world_size() == 1 else net.no_sync():
                first_emb, second_emb = embed(batch)
                loss = criterion(first_emb, second_emb)
                precision.backward(loss / accumulate)
            averages.add({"loss": loss, **criterion.stats})
            clock.count(len(batch["index"]) * world_size())
            losses.append(loss)
            indices.append(batch["index"])
            if not last_micro_batch:
                continue

            rate = learning_rate(cfg["optimizer"], epoch, step / batches.steps)
            set_learning_rate(optimizer, rate)
            grad_norm = precision.gradient_norm(optimizer)
            if guard.admits({"epoch": epoch, "step": step}, losses, grad_norm, criterion.stats, indices):
                precision.step(optimizer)
            else:
                precision.leave_out_step()
                averages.take_back(accumulate)
            optimizer.zero_grad(set_to_none=True)
            losses, indices = [], []

            last_step, stopping = step == batches.steps - 1, stop.on_any_rank()
            if (step + 1) % cfg["print_freq"] == 0 or last_step or stopping:
                guard.check()
                figures = averages.read() | {"lr": rate, "grad_norm": grad_norm.item()} | clock.read()
                training_log.report(epoch, step + 1, figures)
                bad.collect(epoch)
                if stopping or (not last_step and any_rank(checkpoints.due())):
                    checkpoints.save(stateful, epoch=epoch, step=step + 1, audio_stats=audio_stats)
                if stopping:
                    raise stop.preempted(f"epoch {epoch + 1}, step {step + 1}")
                clock.restart()

        start_step, done = 0, epoch + 1
        saved = checkpoints.due_after(done)
        if saved:
            checkpoints.save_epoch(stateful, done, audio_stats=audio_stats)
        monitor.record(writer, done, done * batches.steps)
        if stop.on_any_rank():
            if not saved:
                checkpoints.save_epoch(stateful, done, audio_stats=audio_stats)
            raise stop.preempted(f"epoch {done}")

    writer.close()
    log.info("%d epochs done; the model is in %s", num_epochs, checkpoints.file)


if __name__ == "__main__":
    run_script(main)
