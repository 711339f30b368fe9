"""main-ssl.py as a user runs it: real files, real processes, real kills."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from criterions.memory_bank import MemoryBank
from datasets import build_training
from datasets.manifest import FILE, write_rows
from datasets.preprocessing import no_video_augmentation
from tests.tiny import EVERY_STEP, TORCHRUN, Started, differences, run, wait_until, write_config
from utils import checkpoint
from utils.config import load_config
from utils.distributed import _free_port


@pytest.fixture
def config(tmp_path, videos):
    """Writes variants of a configuration that trains in seconds."""

    def write(name="tiny", **changes):
        return write_config(tmp_path, videos, name, **changes)

    write.folder = lambda name="tiny": tmp_path / "runs" / name
    return write


def final(folder):
    return checkpoint.load(folder / checkpoint.LATEST)


def test_a_run_writes_what_it_promises(config):
    file = config(monitor_every=1, optimizer__lr__warmup_epochs=1)
    output = run(file).stdout
    for words in (
        "---- Data",
        "8 videos",
        "AVWrapper",
        "left",
        "clips_per_s",
        "wait_share",
        "held out, after 2 epochs",
    ):
        assert words in output
    folder = config.folder()
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoint.pth.tar", "checkpoint-previous.pth.tar", "checkpoint-ep1.pth.tar", "config.yaml"} <= names
    assert {"metrics.jsonl", "runs.jsonl", "tensorboard", "train.log"} <= names
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["group"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 9))
    assert {"loss", "lr", "q", "pos_cos", "neg_cos", "grad_norm"} <= train[0].keys()
    assert {f"{side}_{what}" for side in ("video", "audio") for what in ("spread", "dims")} <= train[0].keys()
    assert [line["lr"] for line in train] == pytest.approx([1e-6, 2.51e-4, 5.01e-4, 7.51e-4] + [5e-4] * 4)
    assert train[0]["q"] == 0.001 and train[-1]["q"] == 0.4
    assert [line["epoch"] for line in lines if line["group"] == "retrieval"] == [0, 1, 2]
    state = final(folder)
    assert state["epoch"] == 2 and state["train_criterion"]["nce_average.view1_mem"].shape == (8, 16)
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.0005
    again = run(file).stdout
    assert "going on from" in again and "2 epochs done" in again
    written = {path: path.read_text() for path in (folder / "metrics.jsonl", folder / "config.yaml")}
    told = run(file, "--set", "test_only=true", "--set", "resume=false").stdout
    assert told.count("held out, after 2 epochs") == 1 and "epoch 1/2" not in told
    assert run(file, "--quiet", "--set", "test_only=true").stdout == ""
    assert all(path.read_text() == text for path, text in written.items())
    assert "no checkpoint to measure" in run(config("none"), "--set", "test_only=true", status=2).stderr


def test_the_last_epochs_are_without_augmentation(config):
    trains = {
        "never": {"use_augmentation": False},
        "always": {},
        "plain1": {"plain_epochs": 1},
        "plain2": {"plain_epochs": 2},
    }
    first, last = {}, {}
    for name, train in trains.items():
        run(config(name, **{f"dataset__train__{key}": value for key, value in train.items()}))
        first[name] = checkpoint.load(config.folder(name) / "checkpoint-ep1.pth.tar")
        last[name] = final(config.folder(name))
    assert differences(first["plain1"], first["always"], ("model",)) == []
    assert differences(last["plain2"], last["never"], ("model",)) == []
    for name in ("always", "never"):
        assert differences(last["plain1"], last[name], ("model",)) != []


def test_without_such_epochs_a_benchmark_that_runs_longer_stays_augmented(config):
    clips = build_training(load_config(config()), torch.device("cpu")).dataset
    assert (clips[1000, 0]["video_aug"] != no_video_augmentation()).any()


def test_held_out_crops_that_are_unlike_those_of_training_are_noticed(config, caplog):
    fits = {"dataset__frame_size": 35, "dataset__min_area": 0.7, "monitor_every": 1}  # 0.91 of a side, and 0.92
    unlike = fits | {"dataset__frame_size": 40}

    def warnings(**changes):
        caplog.clear()
        build_training(load_config(config(**changes)), torch.device("cpu"))
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    [told] = warnings(**unlike)
    assert "80% of a frame's side" in told and "92% on average" in told and "dataset.frame_size=35 would fit" in told
    for changes in (
        fits,
        unlike | {"monitor_every": 0},
        unlike | {"dataset__train__plain_epochs": 1},
        unlike | {"dataset__train__use_augmentation": False},
    ):
        assert warnings(**changes) == []


def test_killed_at_any_step_and_restarted_it_ends_in_the_same_bits(config):
    run(config("whole", save_every_minutes=EVERY_STEP))
    whole = final(config.folder("whole"))
    file, folder = config("killed", save_every_minutes=EVERY_STEP), config.folder("killed")
    rng = random.Random(0)
    for kill_at in sorted(rng.sample(range(1, 8), 3)):
        started, metrics, deadline = Started(file), folder / "metrics.jsonl", time.monotonic() + 60
        while started.running and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= kill_at:
                break
            time.sleep(0.002)
        assert started.running, "the run ended before it could be killed"
        started.signal(signal.SIGKILL, os.killpg)
        started.wait()
    assert "going on from" in run(file).stdout
    assert differences(final(folder), whole) == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_three_processes_go_on_in_the_same_bits(config):
    """DDP lays out its buckets anew after the first step of a start: the order of additions must not follow."""
    options = {"dataset__batch_size": 6, "optimizer__num_epochs": 3}
    run(config("whole3", **options), ranks=3)
    file = config("stopped3", **options)
    started, metrics = Started(file, ranks=3), config.folder("stopped3") / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text())
    started.signal(signal.SIGTERM)
    assert started.wait().returncode == 75
    assert final(config.folder("stopped3"))["epoch"] < 3
    assert "going on from" in run(file, ranks=3).stdout
    assert differences(final(config.folder("stopped3")), final(config.folder("whole3"))) == []


def test_a_second_run_in_the_same_folder_is_refused(config):
    file = config("once", optimizer__num_epochs=50, save_every_minutes=EVERY_STEP)
    started = Started(file)
    try:
        metrics = config.folder("once") / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1)
        assert "once: another process is writing there" in run(file, status=2).stderr
        assert "held out, after" in run(file, "--set", "test_only=true").stdout  # looking on is no harm
    finally:
        started.signal(signal.SIGKILL)
        started.wait()
    assert "going on from" in run(file, "--set", "test_only=true").stdout


def test_two_processes_by_every_launcher(config):
    """Each way of starting two processes trains; BN keeps statistics of its own rank, so weights differ from one's."""
    short = {"optimizer__num_epochs": 1, "optimizer__lr__milestones": []}
    one = run(config("spawned", **short), "--multiprocessing-distributed", "--nproc", 2)
    assert "2 processes" in one.stdout
    run(config("torchrun", **short), launcher=TORCHRUN)
    assert differences(final(config.folder("spawned")), final(config.folder("torchrun"))) == []
    file = config("nodes", **short)
    shared = ("--world-size", 2, "--dist-url", f"tcp://127.0.0.1:{_free_port()}")
    spawned = ("--multiprocessing-distributed", "--nproc", 1)
    first = Started(file, *shared, *spawned, "--rank", 0)
    run(file, *shared, *spawned, "--rank", 1)
    ended = first.wait()
    assert "2 processes" in ended.stdout and ended.returncode == 0
    assert differences(final(config.folder("nodes")), final(config.folder("torchrun"))) == []
    elsewhere = f"model.model_dir={config.folder('elsewhere')}"  # as where each node writes to a disk of its own
    first = Started(file, *shared, "--rank", 0)
    error = run(file, *shared, "--rank", 1, "--set", elsewhere, status=2).stderr
    assert "ranks found different checkpoints (rank 0: epoch 1, step 0, rank 1: none)" in error
    assert first.wait().returncode == 2


def test_one_clip_a_forward_pass_needs_more_than_one_place(config):
    """The backbone's last BN would have a single value of each channel, in an epoch's last step alone, say."""
    small = {"dataset__batch_size": 3, "dataset__train__drop_last": False}  # 16 clips: the last batch is of one
    error = run(config("small", **small), status=2).stderr
    assert error.startswith("error: dataset.batch_size: a forward pass would be of one clip, and the video backbone's")
    run(config("larger", **small, dataset__crop_size=48, optimizer__num_epochs=1, optimizer__lr__milestones=[]))


def test_measuring_ends_when_asked_to(config):
    run(config("whole"))
    measure = ("--set", "test_only=true", "--set", "dataset.test.clips_per_video=800")
    started = Started(config("whole"), *measure)
    told = config.folder("whole") / "train.log"
    before = told.read_text().count("---- Model")
    wait_until(lambda: told.read_text().count("---- Model") > before)
    time.sleep(1)
    started.signal(signal.SIGTERM)
    ended = started.wait(60)
    assert ended.returncode == 75 and "preempted: stopped by SIGTERM; run it again" in ended.stderr


ASKED_WHILE_MEASURED = """
import os, runpy, signal, sys
from utils import monitor
plain, before = monitor.embed, []
def asked(model, batches, *rest):
    def after_a_batch():
        for batch in batches:
            yield batch
            if len(before) == int(measurement):
                os.kill(os.getpid(), signal.SIGTERM)
        before.append(1)
    return plain(model, after_a_batch(), *rest)
monitor.embed, measurement = asked, sys.argv[1]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_signal_while_it_is_measured_costs_no_measurement(config, tmp_path, epochs):
    """In between, where nothing was saved, and at the very end; the first measurement is before all training."""
    asked = tmp_path / "asked.py"
    asked.write_text(ASKED_WHILE_MEASURED)
    file, told = config("mon", monitor_every=1, test_freq=5), config.folder("mon") / "metrics.jsonl"
    one_by_one = ("--set", "dataset.test.clips_per_video=4")
    ended = run(file, *one_by_one, launcher=(str(asked), str(epochs)), status=75)
    assert f"held out, after {epochs} epochs: left out" in ended.stderr + ended.stdout
    assert f"saved at epoch {epochs};" in ended.stderr
    run(file)
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["group"] == "retrieval"] == [0, 1, 2]
    assert [row["step"] for row in rows if row["group"] == "train"] == list(range(1, 9))


CLIP_BY_CLIP = """
import runpy, sys, torch
from criterions.memory_bank import MemoryBank
from torch.nn.modules.batchnorm import _BatchNorm
_BatchNorm.train = lambda self, mode=True: torch.nn.Module.train(self, False)
MemoryBank.sample_negatives = lambda self, index, k: (index[:, None] + 1 + torch.arange(k)) % len(self.view1_mem)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_of_a_batch_have_the_gradients_of_the_whole(config, tmp_path, ranks):
    """Where a clip's loss hangs on no other clip: BN in eval mode, rows that stay, negatives by rule."""
    file = tmp_path / "clip_by_clip.py"
    file.write_text(CLIP_BY_CLIP)
    sgd = {"optimizer__name": "sgd", "optimizer__lr__base_lr": 1e-7, "optimizer__num_epochs": 1}
    options = {"dataset__batch_size": 8, "loss__args__momentum": 1.0, "seed": 1, **sgd}
    norms = []
    for name, parts, processes in (("whole", 1, 1), ("parts", 2, ranks)):
        run(config(name, accumulate=parts, **options), launcher=(str(file),), ranks=processes)
        lines = (config.folder(name) / "metrics.jsonl").read_text().splitlines()
        norms.append([json.loads(line)["grad_norm"] for line in lines])
    assert len(norms[0]) == 2 and norms[1] == pytest.approx(norms[0], rel=1e-3)
    bank = final(config.folder("parts"))["train_criterion"]["nce_average.view1_mem"]
    torch.testing.assert_close(bank, MemoryBank(8, 16, seed=1).view1_mem)


def test_a_bad_video_is_replaced_named_and_bounded(config, videos, tmp_path):
    bad = videos / "clip7.mp4"
    good = bad.read_bytes()
    try:
        bad.write_bytes(good[: len(good) // 3])
        run(config("bad"))
        rows = (config.folder("bad") / "bad-videos.csv").read_text().splitlines()
        assert rows[0] == "file,reason,count" and len(rows) == 2
        assert rows[1].startswith("clip7.mp4,") and rows[1].endswith(",4")  # 2 epochs x 2 clips
        error = run(config("strict", max_bad_fraction=0.05), status=2).stderr
        assert "max_bad_fraction" in error and "bad-videos.csv" in error and error.count("\n") == 1
    finally:
        bad.write_bytes(good)


def test_videos_without_sound_do_not_count_once_a_manifest_knows_them(config, make_video, tmp_path):
    """And the run that began before goes on: its list, which numbers the bank's rows, is the same."""
    folder = tmp_path / "some"
    folder.mkdir()
    for i in range(10):
        make_video(folder / f"{i}.mp4", seconds=0.8, fps=16, size=(32, 32), audio_rate=None if i in (2, 6) else 16000)
    file = config("some", dataset__root=str(folder), max_bad_fraction=0.3, optimizer__num_epochs=1)
    run(file)
    assert len((config.folder("some") / "bad-videos.csv").read_text().splitlines()) == 3  # a header and two
    kinds = {f"{i}.mp4": "none" if i in (2, 6) else "sound" for i in range(10)}
    write_rows(folder / FILE, [{"path": path, "audio": kind, "error": ""} for path, kind in kinds.items()])
    told = run(file).stdout
    assert "2 videos have no sound by manifest.csv; clips of others take their places" in told
    assert "going on from" in told
    run(config("strict", dataset__root=str(folder), max_bad_fraction=0.0))
    assert not (config.folder("strict") / "bad-videos.csv").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"dataset__root": None}, (), "dataset.root is not set"),
        ({"dataset__root": "/nowhere"}, (), "/nowhere: no such folder"),
        ({"dataset__batch_size": 64}, (), "exceeds the 16 clips of an epoch"),
        ({"loss__args__num_instances": 3}, (), "fewer than the 8 training videos"),
        ({"loss__name": "VICLoss", "loss__args": {}}, (), "main-vicreg.py"),
        ({"precision": "fp16"}, (), "precision: fp16 needs a GPU"),
        ({"model__args__proj_norm": "bn", "accumulate": 4}, (), "of one clip, and video_proj.projection.5 is a BN"),
        (
            {"model__args__proj_norm": "bn", "dataset__batch_size": 5, "dataset__train__drop_last": False},
            (),
            "dataset.batch_size: a forward pass would be of one clip",
        ),
        ({}, ("--gpu", 0), "--gpu 0: 0 GPUs are visible"),
        ({}, ("--world-size", 2, "--rank", 5), "--rank 5: with --world-size 2 expected 0 to 1"),
        ({}, ("--world-size", 2, "--rank", 1), "--dist-url"),
        ({}, ("--distributed", "--nproc", 3), "does not divide into 3 processes"),
        ({}, ("--distributed", "--dist-backend", "nccl"), "nccl"),
        ({"dataset__train__video_only": True}, (), "video_only: true does not go with av_wrapper"),
        ({}, ("--world-size", 2, "--rank", 0, "--dist-url", "foo"), "--dist-url foo: no process group"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(config, changes, arguments, words):
    done = run(config(**changes), *arguments, status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_unreadable_data_end_in_one_line(config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no video" in run(config(dataset__root=str(empty)), status=2).stderr
    for i in range(12):
        (empty / f"text{i}.mp4").write_text("this is no video")
    error = run(config(dataset__root=str(empty)), status=2).stderr
    assert "none of 9 videos could be read" in error and error.count("\n") == 1


def test_another_configuration_or_list_is_refused(config, videos, make_video):
    file = config()
    run(file)
    error = run(file, "--set", "model.args.video_backbone_args.depth=18", status=2).stderr
    assert "depth was 10, is 18" in error and error.count("\n") == 1
    written = (config.folder("tiny") / "config.yaml").read_text()
    assert "depth: 10" in written  # the run's, not what was refused
    few = ("--set", "resume=false", "--set", "loss.args.num_instances=3", "--set", "optimizer.lr.base_lr=0.3")
    assert "--set loss.args.num_instances=null" in run(file, *few, status=2).stderr
    assert (config.folder("tiny") / "config.yaml").read_text() == written
    error = run(file, "--set", "optimizer.lr.base_lr=0.1", status=2).stderr
    assert "optimizer.lr.base_lr was 0.001, is 0.1" in error
    run(file, "--set", "print_freq=2", "--set", "num_workers=0")  # leaves the meaning alone
    extra = make_video(videos / "another.mp4", seconds=1.6, fps=16, size=(64, 48), audio_rate=16000)
    try:
        assert "files were added, removed or renamed" in run(file, status=2).stderr
    finally:
        Path(extra).unlink()


def test_weights_and_bank_of_another_run(config):
    run(config("first", optimizer__num_epochs=1, optimizer__lr__milestones=[]))
    stored = str(config.folder("first") / "checkpoint.pth.tar")
    file = config("second", model__args__checkpoint=stored, loss__args__checkpoint=stored)
    output = run(file, "--set", "optimizer.num_epochs=1").stdout
    assert f"weights from {stored}" in output and f"memory bank from {stored}" in output
    error = run(config("third", model__args__checkpoint=stored, model__args__proj_dim=[32, 16]), status=2).stderr
    assert "video_proj.projection" in error and "does not fit AVWrapper" in error and error.count("\n") == 1
    avid = {  # AVID-CMA's names, and no memory bank
        name.replace("spatial_", "spt_").replace("temporal_", "tmp_"): value
        for name, value in final(config.folder("first"))["model"].items()
    }
    torch.save({"model": avid}, config.folder("first") / "avid.pth")
    other = {"model__args__checkpoint": str(config.folder("first") / "avid.pth")}
    assert "AVID-CMA's checkpoint" in run(config("avid", **other, optimizer__num_epochs=1)).stdout
    other["loss__args__checkpoint"] = other["model__args__checkpoint"]
    assert "holds no memory bank" in run(config("bare", **other), status=2).stderr


def test_a_bank_in_shards_is_saved_whole_and_goes_on_in_one_process(config):
    shards = {"loss__args__bank_shards": True, "loss__args__bank_dtype": "bf16", "gradient_compression": "bf16"}
    file = config("shards", **shards, model__args__proj_norm="bn", loss__args__momentum=0.0)
    output = run(file, ranks=2).stdout
    assert "8 instances, 16 dimensions" in output and "rows 0 to 3 of rank 0" in output
    state = final(config.folder("shards"))
    rows = state["train_criterion"]["nce_average.view2_mem"]
    assert rows.shape == (8, 16) and rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float().norm(dim=1), torch.ones(8), rtol=0, atol=0.01)
    assert (rows.float() @ rows.float().T).min() > -0.98  # BN over a rank's two clips alone would make them opposites
    alone = run(file).stdout
    assert "it ran on 2 processes, now 1" in alone and "2 epochs done" in alone
    error = run(config("hard", loss__args__bank_shards=True, loss__args__N_hard=3), status=2).stderr
    assert "bank_shards: true does not go with N_hard: 3" in error and error.count("\n") == 1


def test_held_out_videos_that_cannot_be_read_are_told(tmp_path, videos):
    root = shutil.copytree(videos, tmp_path / "videos")
    (root / "clip5.mp4").write_text("no video")
    config = write_config(tmp_path, root, optimizer__num_epochs=1, monitor_every=1)
    log = run(config).stdout
    told = "1 of 2 held-out videos cannot be read and are left out; the first, clip5.mp4: "
    assert log.count(told) == 2 and log.count("held out, after ") == 2
    (root / "clip0.mp4").write_text("no video")
    again = run(config, "--set", "test_only=true", status=2)
    assert "error: none of the 2 held-out videos can be read; the first, clip0.mp4: " in again.stderr
