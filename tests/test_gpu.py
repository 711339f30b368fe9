"""What only a GPU can show: whole steps that the host does not wait for, the scripts in each precision, SyncBN.

Skipped without a GPU; with AVSSRL_NEEDS_GPU=1 in the environment they fail there, so that a machine whose GPU got lost
does not pass unseen.
"""

import gc
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.tiny import PYTHONPATH, REPO, differences, needs_gpu, run, write_config
from tests.tiny_evaluation import make_ucf, write_evaluation
from utils import checkpoint
from utils.benchmark.forms import Form, Step, synthetic_batch
from utils.benchmark.step import held
from utils.config import load_config
from utils.distributed import wrap
from utils.stopping import NonFiniteGuard, RunFailed
from utils.sync_bn import convert_sync_bn, synchronise_bn

pytestmark = needs_gpu
ENV = {**os.environ, "PYTHONPATH": PYTHONPATH}


def small_step(method: str, precision: str, compiled: bool, graphs: bool = False) -> Step:
    cfg = load_config(REPO / f"configs/demo/{method}.yaml", ["dataset.batch_size=16", "optimizer.lr.base_lr=1e-4"])
    ours = Form(precision, precision, channels_last=True, in_2d=True, device_negatives=True)
    form = replace(ours, compiled=compiled, graphs=graphs)
    device = torch.device("cuda")
    return Step(cfg, form, synthetic_batch(cfg, device), device)


def train_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["group"] == "train"]


@pytest.mark.parametrize("method", ["xid", "vicreg"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_for_nothing_in_a_step(method, precision):
    step = small_step(method, precision, compiled=False)
    step(), step()  # cuDNN's first choices, the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("method", ["xid", "vicreg"])
def test_compiled_steps_train_as_eager_ones_do(method):
    losses = []
    for compiled in (False, True):
        step = small_step(method, "bf16", compiled)
        with torch._dynamo.config.patch(error_on_recompile=compiled):
            losses.append(torch.stack([step() for _ in range(20)]).tolist())
        torch.compiler.reset()
    eager, compiled = losses
    assert compiled[0] == pytest.approx(eager[0], rel=0.02)  # bf16: three digits, over 20 layers
    assert compiled[-1] < compiled[0] and eager[-1] < eager[0]
    assert compiled[-1] == pytest.approx(eager[-1], rel=0.15)


@pytest.mark.parametrize("method", ["xid", "vicreg"])
def test_steps_recorded_as_cuda_graphs_train_as_queued_ones_do(method):
    losses, steps, in_pools = [], [], []
    for graphs in (False, True):
        gc.collect()
        before = held(torch.device("cuda")) - torch.cuda.memory_allocated()
        steps.append(small_step(method, "bf16", compiled=True, graphs=graphs))
        try:
            losses.append(torch.stack([steps[-1]() for _ in range(20)]).tolist())
            in_pools.append(held(torch.device("cuda")) - torch.cuda.memory_allocated() - before)
        finally:
            torch.compiler.reset()
    assert in_pools[0] == 0 < in_pools[1]
    queued, recorded = losses
    assert recorded[:3] == pytest.approx(queued[:3], rel=0.02)  # the second records, the third replays
    assert recorded[-1] < recorded[0]
    assert recorded[-1] == pytest.approx(queued[-1], rel=0.15)  # cuDNN's backward kernels add in no fixed order
    buffers = [dict(step.model.named_buffers()) for step in steps]
    assert all(value.isfinite().all() for value in buffers[1].values())
    assert buffers[1]["video_model.conv1.1.num_batches_tracked"] == 20


@pytest.mark.parametrize("script", ["main-ssl.py", "main-vicreg.py"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", None])
def test_a_run_in_each_precision(tmp_path, videos, script, precision):
    # Of 32 px one place would be left, and PyTorch 2.11 takes cuDNN's gradient there to be laid out in another way.
    changes = {"precision": precision, "compile": False if precision else None, "dataset__crop_size": 64}
    changes["monitor_every"] = 2
    logs = {**ENV, "TORCH_LOGS": "recompiles,cudagraphs"}
    done = run(write_config(tmp_path, videos, script=script, **changes), script=script, env=logs)
    assert "skipping cudagraphs" not in done.stderr and "CUDA graphs: failed" not in done.stdout
    assert ("Recording function=" in done.stderr) == (precision is None)
    assert "held out, after 2 epochs" in done.stdout
    assert ("compiled, recorded as CUDA graphs, and one batch tried" in done.stdout) == (precision is None)
    assert "Recompiling" not in done.stderr
    losses = train_losses(tmp_path / "runs/tiny")
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    state = checkpoint.load(tmp_path / "runs/tiny" / checkpoint.LATEST)
    assert state["epoch"] == 2 and all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("script", ["main-ssl.py", "main-vicreg.py"])
def test_clips_that_end_as_one_place_train_compiled_or_not(tmp_path, videos, script):
    """4 frames of 32 px: PyTorch 2.11 cannot take the compiled network's gradient; that is told, and no end."""
    output = run(write_config(tmp_path, videos, script=script), script=script, env=ENV).stdout
    assert ("compile: failed, going on without: " in output) != ("and one batch tried, in " in output)
    losses = train_losses(tmp_path / "runs/tiny")
    assert len(losses) == 8 and all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("script", "classifier"),
    [("eval-action-recg-linear.py", "MOSTWrapper"), ("eval-action-recg.py", "ClassificationWrapper")],
)
def test_the_evaluations_run_as_they_come(tmp_path, make_video, script, classifier):
    """bf16 and compiled, a batch's rest not anew; a second call goes on, from features on disk or what was trained."""
    ucf = make_ucf(tmp_path / "ucf", make_video)
    changes = {"dataset__crop_size": 64, "feature_views": 2} if "linear" in script else {"dataset__crop_size": 64}
    cfg, model = write_evaluation(tmp_path, ucf, classifier, **changes), write_config(tmp_path, ucf)
    first = run(cfg, model, "--random-weights", script=script, env={**ENV, "TORCH_LOGS": "recompiles"})
    assert "compile: failed" not in first.stdout and "size mismatch" not in first.stderr
    run(cfg, model, "--random-weights", "--resume", script=script, env=ENV)
    (file,) = tmp_path.rglob("results.json")
    found = json.loads(file.read_text())
    assert all(part["videos"] == 6 and 0 <= part["Clip@1"] <= 100 for part in found["results"].values())


def test_two_runs_of_one_seed_see_the_same_clips_and_draw_the_same_negatives(tmp_path, videos):
    states, losses = [], []
    for name in ("a", "b"):
        run(write_config(tmp_path, videos, name, precision="fp32", compile=False), env=ENV)
        states.append(checkpoint.load(tmp_path / "runs" / name / checkpoint.LATEST))
        losses.append(train_losses(tmp_path / "runs" / name))
    assert differences(*states, parts=("audio_stats", "epoch", "step")) == []
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # cuDNN's backward kernels add in no fixed order


def test_the_guard_reads_its_verdict_a_step_late(tmp_path):
    guard, place = NonFiniteGuard(tmp_path, str, skips=0, scaled=False), {"epoch": 0, "step": 0}
    good, bad = (torch.tensor(value, device="cuda") for value in (1.0, float("nan")))
    index = [torch.tensor([3], device="cuda")]
    assert guard.admits(place, [good], good, {"sim": good}, index)
    assert guard.admits(place | {"step": 1}, [bad], bad, {"sim": bad}, index)
    with pytest.raises(RunFailed, match="not finite in epoch 1, step 2"):
        guard.admits(place | {"step": 2}, [good], good, {"sim": good}, index)
    assert json.loads((tmp_path / "nonfinite-epoch1-step2.json").read_text())["ranks"][0]["index"] == [3]


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 3), nn.Flatten())


def _rank_with_synchronised_bn(rank: int, folder: str, ours: bool) -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.backends.cudnn.allow_tf32 = False
    batch = torch.randn(8, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    net = batch_norm_net().to(device)  # not compiled: that takes nccl, and nccl a GPU for each process
    net = wrap(convert_sync_bn(net) if ours else synchronise_bn(net, device, False), False, device)
    net(batch.chunk(2)[rank]).square().mean().backward()
    whole = batch_norm_net().to(device)
    whole(batch).square().mean().backward()
    for found, expected in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(net.module[1].running_var, whole[1].running_var)
    dist.destroy_process_group()


@pytest.mark.parametrize("ours", [False, True])
def test_synchronised_bn_of_two_processes_on_one_gpu_is_that_of_one(run_ranks, tmp_path, ours):
    run_ranks(_rank_with_synchronised_bn, 2, str(tmp_path), ours)
