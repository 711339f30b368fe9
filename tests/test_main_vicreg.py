"""main-vicreg.py as a user runs it, with sound and without, stopped by signals, with numbers that are not finite."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.faults import NAN_IN_STEP_3
from tests.tiny import ENV, EVERY_STEP, REPO, Started, differences, run, write_config
from tests.tiny_evaluation import run_here
from utils import checkpoint
from utils.logger import read_metrics
from utils.precision import Precision

SCRIPT = "main-vicreg.py"


@pytest.fixture
def poisoned(tmp_path):
    """What is put before a script's name so that its third batch is not finite."""
    file = tmp_path / "poisoned.py"
    file.write_text(NAN_IN_STEP_3)
    return (str(file),)


def final(folder, name):
    return checkpoint.load(folder / "runs" / name / checkpoint.LATEST)


def test_a_run_logs_each_term_and_trains_on_the_mean_of_the_parts(tmp_path, videos, monkeypatch):
    trained_on, plain = [], Precision.backward

    def backward(self, loss):
        trained_on.append(loss.item())
        plain(self, loss)

    monkeypatch.setattr(Precision, "backward", backward)
    options = {"monitor_every": 2, "keep_last": 1, "accumulate": 2, "num_workers": 0}
    options |= {"loss__args": {"cov_coeff": 0.4}, "optimizer__lr__warmup_epochs": 1}
    file = write_config(tmp_path, videos, script=SCRIPT, **options)
    run_here(SCRIPT, file)
    output = (tmp_path / "runs/tiny/train.log").read_text()
    assert "VICRegWrapper" in output and "held out, after 2 epochs" in output
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    train = [line for line in map(json.loads, lines) if line["group"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 9))
    for line in train:
        weighted = 25 * line["sim"] + 25 * line["std"] + 0.4 * line["cov"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-4)
    assert [line["lr"] for line in train] == pytest.approx([1e-6, 2.51e-4, 5.01e-4, 7.51e-4] + [5e-4] * 4)
    parts = zip(trained_on[::2], trained_on[1::2], strict=True)
    assert [line["loss"] for line in train] == pytest.approx(list(map(sum, parts)))
    assert final(tmp_path, "tiny")["optimizer"]["param_groups"][0]["lr"] == 0.0005
    kept = sorted(path.name for path in (tmp_path / "runs/tiny").glob("checkpoint-ep*"))
    assert kept == ["checkpoint-ep1.pth.tar", "checkpoint-ep2.pth.tar"]  # a milestone, and the last one
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in lines[:-1]))  # as if it had been killed before it was measured
    run_here(SCRIPT, file)
    assert metrics.read_text().splitlines() == lines


def test_video_only(tmp_path, make_video):
    """Silent videos will do; BN is over all processes, whose first step is that of one process."""
    silent = tmp_path / "silent"
    silent.mkdir()
    for i in range(5):
        make_video(silent / f"clip{i}.mp4", seconds=3, fps=16, size=(64, 48), audio_rate=None)
    changes = {"model__arch": "vicreg_v_wrapper", "dataset__train__video_only": True, "optimizer__num_epochs": 1}
    file = write_config(tmp_path, silent, script=SCRIPT, **changes)
    assert "VICRegVideoWrapper" in run(file, ranks=2, script=SCRIPT).stdout
    run(write_config(tmp_path, silent, "one", SCRIPT, **changes), script=SCRIPT)
    two, one = (read_metrics(tmp_path / "runs" / name, "train")[0] for name in ("tiny", "one"))
    for term in ("loss", "sim", "std", "cov"):
        assert two[term] == pytest.approx(one[term], rel=1e-4)
    assert set(name.split(".")[0] for name in final(tmp_path, "tiny")["model"]) == {"video_model", "video_exp"}
    error = run(file, "--set", "monitor_every=1", script=SCRIPT, status=2).stderr
    assert error.startswith("error: ") and "sound" in error
    error = run(file, "--set", "model.arch=vicreg_wrapper", script=SCRIPT, status=2).stderr
    assert "video_only" in error


@pytest.fixture(scope="module")
def whole(tmp_path_factory, videos):
    """The last checkpoint of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(write_config(folder, videos, script=SCRIPT), script=SCRIPT)
    return final(folder, "tiny")


@pytest.mark.parametrize(
    ("number", "kill"),
    [(signal.SIGUSR1, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGUSR1, os.killpg)],
)
def test_a_signal_saves_and_the_run_goes_on_in_the_same_bits(tmp_path, videos, whole, number, kill):
    """`killpg` reaches the data workers, too, as Slurm's signals and those of `timeout` do."""
    file = write_config(tmp_path, videos, "stopped", SCRIPT)
    options = ("--distributed", "--nproc", 1) if (number, kill) == (signal.SIGUSR1, os.kill) else ()
    started, metrics = Started(file, *options, script=SCRIPT), tmp_path / "runs/stopped/metrics.jsonl"
    while started.running and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.002)
    started.signal(number, kill)
    ended = started.wait(60)
    assert ended.returncode == 75, ended.stderr
    assert ended.stderr.startswith("preempted: stopped by " + number.name) and "run it again" in ended.stderr
    stopped = final(tmp_path, "stopped")
    assert (0, 2) <= (stopped["epoch"], stopped["step"]) < (2, 0)
    assert "going on from" in run(file, *options, script=SCRIPT).stdout
    assert differences(final(tmp_path, "stopped"), whole) == []


def test_numbers_that_are_not_finite_stop_the_run_with_a_diagnosis(tmp_path, videos, poisoned):
    file = write_config(tmp_path, videos, "nan", SCRIPT, save_every_minutes=EVERY_STEP)
    error = run(file, script=SCRIPT, launcher=poisoned, status=1).stderr
    assert "failed: not finite in epoch 1, step 3: loss nan" in error
    report = json.loads((tmp_path / "runs/nan/nonfinite-epoch1-step3.json").read_text())
    assert (report["epoch"], report["step"]) == (1, 3) and len(report["ranks"][0]["files"]) == 4
    assert all(name.startswith("clip") for name in report["ranks"][0]["files"])
    saved = final(tmp_path, "nan")
    assert (saved["epoch"], saved["step"]) == (0, 2)
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("script", ["main-ssl.py", SCRIPT])
def test_steps_may_be_left_out(tmp_path, videos, poisoned, script):
    changes = {"skip_nonfinite": 1, "optimizer__num_epochs": 1, "monitor_every": 1, "accumulate": 2}
    file = write_config(tmp_path, videos, "nan", script, **changes)
    output = run(file, script=script, launcher=poisoned).stdout
    assert "this step is left out (1 of 1)" in output
    state = final(tmp_path, "nan")
    assert state["guard"] == {"skipped": 1}
    assert all(value.isfinite().all() for value in state["model"].values())  # BN's statistics, too
    assert all(value.isfinite().all() for value in state["train_criterion"].values())
    assert all(entry["exp_avg"].isfinite().all() for entry in state["optimizer"]["state"].values())
    lines = [json.loads(line) for line in (tmp_path / "runs/nan/metrics.jsonl").read_text().splitlines()]
    losses = [line.get("loss") for line in lines if line["group"] == "train"]
    assert losses.count(None) == 1 and all(math.isfinite(loss) for loss in losses if loss is not None)


def test_a_batch_of_one_clip_is_refused(tmp_path, videos):
    file = write_config(tmp_path, videos, "one", SCRIPT, dataset__batch_size=1)
    error = run(file, script=SCRIPT, status=2).stderr
    assert "of one clip, and video_exp.expansion.1 is a BN" in error and error.count("\n") == 1


OWN_LOSS = """
import torch.nn.functional as F
from torch import nn

class Own(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.stats = weight, {}

    def forward(self, x, y):
        x, y = F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1)
        cosines = x.detach() @ y.detach().T
        self.stats = {"pos_cos": cosines.diagonal().mean(), "neg_cos": cosines.mean()}
        return self.weight * F.mse_loss(x, y)
"""


OWN_BACKBONE = """
from torch import nn


class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.out_dim = nn.Conv3d(3, width, 3), width

    def forward(self, video, return_embs=False):
        return self.conv(video).amax((2, 3, 4), keepdim=True)
"""


def test_a_loss_and_a_backbone_of_ones_own_take_what_the_readme_says(tmp_path, videos):
    """In a copy of the source: of each a class, its name, and its keys."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "data", "checkpoints", "cache", "tests", "shared", "__pycache__")
    shutil.copytree(REPO, source, ignore=ignored)
    (source / "criterions/own.py").write_text(OWN_LOSS)
    (source / "models/own.py").write_text(OWN_BACKBONE)
    for file, before, after in (
        ("criterions/__init__.py", "CRITERIONS = {", 'from criterions.own import Own\nCRITERIONS = {"Own": Own, '),
        ("utils/config.py", "LOSS_ARGS = {", 'LOSS_ARGS = {"Own": {"weight": _positive(float, 2.0)},'),
        ("models/__init__.py", "MODELS = {", "from models.own import Own\nMODELS = {"),
        ("models/__init__.py", '"video_backbone": {', '"video_backbone": {"Own": Own, '),
        ("utils/config.py", "VIDEO_BACKBONES = {", 'VIDEO_BACKBONES = {"Own": {"width": _positive(int)}, '),
    ):
        text = (source / file).read_text()
        assert text.count(before) == 1
        (source / file).write_text(text.replace(before, after))
    backbone = {"model__args__video_backbone": "Own", "model__args__video_backbone_args": {"width": 8}}
    file = write_config(tmp_path, videos, script=SCRIPT, loss={"name": "Own"}, optimizer__num_epochs=1, **backbone)
    command = [sys.executable, "main-vicreg.py", str(file)]
    env = {**ENV, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # without the repository's
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all("neg_cos" in line for line in lines)
