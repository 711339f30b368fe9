"""Pre-train with cross-modal instance discrimination (xID): a memory bank and the robust InfoNCE loss.

    python3 main-ssl.py configs/demo/xid.yaml                                    # a laptop: the demo data set
    python3 main-ssl.py configs/VGGSound-N1024.yaml --set dataset.root=DIR --multiprocessing-distributed
    torchrun --nproc_per_node=8 main-ssl.py configs/VGGSound-N1024.yaml --set dataset.root=DIR

The same command again goes on where the run stopped.
"""

import argparse
from contextlib import nullcontext

import torch
from torch import nn

from criterions import build_criterion, q_schedule
from datasets import build_held_out, build_training
from datasets.preprocessing import BatchPrep
from datasets.statistics import audio_statistics
from models import build_model
from utils import checkpoint
from utils.bad_videos import BadVideos
from utils.cli import pretraining_parser, run_script
from utils.config import load_config
from utils.distributed import broadcast_object, is_main, launch, world_size, wrap
from utils.errors import UserError
from utils.logger import (
    MetricsWriter,
    StepClock,
    log,
    memory_gb,
    parameter_summary,
    percentages,
    progress_line,
    stage,
    start_run,
)
from utils.metrics import Averages, collapse_warning
from utils.optim import build_optimizer, learning_rate, set_learning_rate
from utils.precision import Precision
from utils.retrieval import cross_modal_retrieval, embed


def main() -> None:
    args = pretraining_parser(__doc__).parse_args()
    cfg = load_config(args.cfg, args.set)
    if args.seed is not None:
        cfg["seed"] = args.seed
    if cfg["loss"]["name"] != "xID" or cfg["model"]["arch"] != "av_wrapper":
        raise UserError(f"{args.cfg}: main-ssl.py trains loss xID with arch av_wrapper; for VICLoss see main-vicreg.py")
    launch(pretrain, args, args, cfg)


def pretrain(device: torch.device, args: argparse.Namespace, cfg: dict) -> None:
    """One process of the run, from the data to the last checkpoint."""
    folder = start_run(cfg, args.quiet)
    precision = Precision(cfg["precision"], device)

    stage("Data")
    loader = build_training(cfg, device)
    clips, batches, videos = loader.dataset, loader.batch_sampler, loader.dataset.videos
    log.info("%s", videos)
    log.info("an epoch is %d clips, %d steps of %d", len(clips), batches.steps, cfg["dataset"]["batch_size"])
    checkpoints = checkpoint.RunCheckpoints(folder, cfg, videos.fingerprint)
    state = checkpoints.latest()
    if state is not None:
        audio_stats = state["audio_stats"]
    else:
        audio_stats = broadcast_object(
            audio_statistics(videos, clips.recipe, cfg["num_workers"], cfg["cache_dir"]) if is_main() else None
        )
    prepare = BatchPrep(cfg["dataset"], audio_stats, device)

    stage("Model")
    torch.manual_seed(cfg["seed"])
    model = build_model(cfg["model"]).to(device)
    log.info("%s", parameter_summary(model))
    criterion = build_criterion(
        cfg["loss"], bank_rows(cfg, len(videos)), model.out_dim, device, cfg["optimizer"]["num_epochs"], cfg["seed"]
    )
    log.info("%s", criterion)
    optimizer = build_optimizer(cfg["optimizer"], model)
    log.info("%s, base learning rate %g", type(optimizer).__name__, cfg["optimizer"]["lr"]["base_lr"])
    bad = BadVideos(folder, cfg["max_bad_fraction"], len(clips))
    parts = {
        "model": model,
        "train_criterion": criterion,
        "optimizer": optimizer,
        "scaler": precision,
        "bad_videos": bad,
    }
    start_epoch, start_step = 0, 0
    if state is not None:
        checkpoints.restore(state, parts)
        start_epoch, start_step = state["epoch"], state["step"]
        del state
    else:
        start_from_others(cfg, model, criterion, videos.fingerprint)
    net = wrap(model, cfg["compile"], device)
    writer = MetricsWriter(folder, start_epoch * batches.steps + start_step)

    def measure(epoch: int) -> None:
        """Held-out retrieval, by rank 0."""
        if is_main():
            with precision.autocast():
                figures = cross_modal_retrieval(embed(model, build_held_out(cfg, device), prepare))
            writer.write("retrieval", epoch * batches.steps, {"epoch": epoch, **figures})
            log.info("held out, after %d epochs: %s", epoch, percentages(figures))

    if cfg["test_only"]:
        measure(start_epoch)
        return

    def save(epoch: int, step: int, keep_as: str | None = None) -> None:
        checkpoints.save(parts, keep_as, epoch=epoch, step=step, audio_stats=audio_stats)

    stage("Training")
    num_epochs, accumulate = cfg["optimizer"]["num_epochs"], cfg["accumulate"]
    loss_args, monitor_every = cfg["loss"]["args"], cfg["monitor_every"]
    if monitor_every and (start_epoch, start_step) == (0, 0):
        measure(0)
    averages, clock = Averages(), StepClock()
    for epoch in range(start_epoch, num_epochs):
        model.train()
        q = q_schedule(epoch, num_epochs, loss_args["q"], loss_args["q_max"])
        batches.start_at(epoch, start_step)
        clock.restart()
        for i, batch in enumerate(clock.timed(loader), start_step * accumulate):
            step, part = divmod(i, accumulate)
            last_part = part == accumulate - 1
            bad.record(batch)
            with nullcontext() if last_part or world_size() == 1 else net.no_sync():
                video, audio = prepare(batch)
                with precision.autocast():
                    video_emb, audio_emb = net(video, audio)
                index = batch["index"].to(device, non_blocking=True)
                loss = criterion(video_emb, audio_emb, index, epoch=epoch, q=q)
                precision.backward(loss / accumulate)
            averages.add({"loss": loss, **criterion.stats})
            clock.count(len(index) * world_size())
            if not last_part:
                continue

            rate = learning_rate(cfg["optimizer"], epoch, step / batches.steps)
            set_learning_rate(optimizer, rate)
            grad_norm = precision.step(optimizer, model.parameters())

            last_step = step == batches.steps - 1
            if (step + 1) % cfg["print_freq"] == 0 or last_step:
                figures = averages.read() | {"lr": rate, "q": q} | clock.read()
                figures |= {"grad_norm": grad_norm.item(), "memory_gb": memory_gb()}
                clips_left = ((num_epochs - epoch) * batches.steps - step - 1) * cfg["dataset"]["batch_size"]
                place = f"epoch {epoch + 1}/{num_epochs} step {step + 1}/{batches.steps}"
                log.info("%s", progress_line(place, clips_left / figures["clips_per_s"], figures))
                writer.write("train", epoch * batches.steps + step + 1, {"epoch": epoch, **figures})
                if (warning := collapse_warning(figures)) is not None:
                    log.warning("%s", warning)
                bad.collect(epoch)
                if checkpoints.due() and not last_step:
                    save(epoch, step + 1)
                clock.restart()

        start_step, done = 0, epoch + 1
        if done % cfg["test_freq"] == 0 or done == num_epochs:
            milestone = done in cfg["optimizer"]["lr"]["milestones"]
            save(done, 0, f"checkpoint-ep{done}.pth.tar" if milestone else None)
        if monitor_every and (done % monitor_every == 0 or done == num_epochs):
            measure(done)

    writer.close()
    log.info("%d epochs done; the model is in %s", num_epochs, folder / checkpoint.LATEST)


def bank_rows(cfg: dict, num_videos: int) -> int:
    """Rows of the memory bank: one a video. `num_instances` in the YAML may be more, but not fewer."""
    asked = cfg["loss"]["args"]["num_instances"]
    if asked is not None and asked < num_videos:
        raise UserError(
            f"loss.args.num_instances: {asked} is fewer than the {num_videos} training videos found; leave it out"
        )
    if asked is not None and asked > num_videos:
        log.info("loss.args.num_instances is %d; the bank has %d rows, one a video found", asked, num_videos)
    return num_videos


def start_from_others(cfg: dict, model: nn.Module, criterion: nn.Module, videos: str) -> None:
    """Take the weights of `model.args.checkpoint` and the bank of `loss.args.checkpoint`, where they are given."""
    if (file := cfg["model"]["args"]["checkpoint"]) is not None:
        checkpoint.load_weights(model, checkpoint.load(file)["model"], file)
        log.info("weights from %s", file)
    if (file := cfg["loss"]["args"]["checkpoint"]) is not None:
        other = checkpoint.load(file)
        if other.get("videos", videos) != videos:
            raise UserError(
                f"loss.args.checkpoint: {file}: its bank belongs to list {other['videos']}, not to {videos}"
            )
        checkpoint.load_weights(criterion, other["train_criterion"], file, optional=("_extra_state",))
        log.info("memory bank from %s", file)


if __name__ == "__main__":
    run_script(main)
