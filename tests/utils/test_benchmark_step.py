"""The forms of a training step that the benchmark compares are the same step; what it counts is what there is."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from criterions.memory_bank import MemoryBank
from models import MODELS
from models.network_blocks import StemConv
from models.video import R2Plus1d
from tests.tiny import REPO, needs_gpu
from utils.benchmark import __main__ as benchmark
from utils.benchmark.forms import (
    Form,
    HostMemoryBank,
    PlainR2Plus1d,
    Step,
    forms_of,
    in_3d,
    synthetic_batch,
    with_options,
)
from utils.benchmark.inference import Forward, backbone_of, inference_forms
from utils.benchmark.step import first_calls
from utils.benchmark.tools import count_bytes, count_flops, matrix_ceiling, time_in_turns
from utils.compiling import CUDA_GRAPHS, OPTIONS
from utils.config import load_config
from utils.distributed import records_graphs, wrap
from utils.errors import RunFailed, UserError
from utils.memory import keep_freed_memory

CPU = torch.device("cpu")
SMALL = ("dataset.batch_size=4", "dataset.crop_size=32", "dataset.video_clip_duration=0.5", "loss.args.num_negatives=8")
PLAIN = Form("plain", "fp32")
OURS = replace(PLAIN, channels_last=True, in_2d=True, device_negatives=True)


def config(method="xid"):
    changes = SMALL if method == "xid" else SMALL[:-1]
    return load_config(REPO / f"configs/demo/{method}.yaml", changes)


def gradients_of(step, monkeypatch):
    """Loss and gradients of a step, its negatives given."""
    negatives = torch.arange(32).view(4, 8)
    for bank in (MemoryBank, HostMemoryBank):
        monkeypatch.setattr(bank, "sample_negatives", lambda self, index, k: negatives + 100)
    loss = step.loss()
    loss.backward()
    return loss, {name: p.grad for name, p in step.model.named_parameters()}


@pytest.mark.parametrize("method", ["xid", "vicreg"])
@pytest.mark.parametrize("form", [replace(PLAIN, channels_last=True), OURS], ids=["channels_last_3d", "2D"])
def test_a_fast_form_is_the_plain_step(method, form, monkeypatch):
    cfg = config(method)
    batch = synthetic_batch(cfg, CPU)
    plain, fast = Step(cfg, PLAIN, batch, CPU), Step(cfg, form, batch, CPU)
    assert type(plain.model.video_model) is PlainR2Plus1d and type(plain.model.video_model.conv1[0]) is nn.Conv3d
    assert (type(fast.model.video_model.conv1[0]) is StemConv) == form.in_2d
    for step in (plain, fast):
        step.model.double(), step.criterion.double(), step.prepare.double()
    frames = batch["frames"].double()
    for step in (plain, fast):  # float64: batches of four magnify rounding in BN until it looks like a difference
        monkeypatch.setattr(step.prepare, "forward", lambda b: _in_float64(cfg, frames, b))
    (loss, expected), (found_loss, found) = (gradients_of(step, monkeypatch) for step in (plain, fast))
    torch.testing.assert_close(found_loss, loss, rtol=1e-9, atol=0)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-7 * gradient.abs().max().clamp_min(1e-6), name


def _in_float64(cfg, frames, batch):
    """A stand-in for the preprocessing: this test is about what comes after."""
    spec = torch.randn(4, 1, cfg["dataset"]["spec_params"]["n_mels"], 62, generator=torch.Generator().manual_seed(1))
    return (frames / 128 - 1).permute(0, 4, 1, 2, 3), spec.double()


def test_forms_on_a_cpu_leave_out_what_means_nothing_there():
    forms, left_out = forms_of(config(), CPU)
    glibc = keep_freed_memory(False)
    assert [form.in_2d for form in forms] == [False, False, True] + [True] * glibc
    assert [form.keeps_memory for form in forms] == [False] * 3 + [True] * glibc
    assert len(left_out) == 4 - glibc and all(": left out, " in line for line in left_out)
    bf16 = load_config(REPO / "configs/demo/xid.yaml", ["precision=bf16"])
    assert [form.precision for form in forms_of(bf16, CPU)[0]] == ["fp32"] + ["bf16"] * (3 + glibc)


class OwnBackbone(nn.Module):
    out_dim = 5

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 5, 3)

    def forward(self, video, return_embs=False):
        return self.conv(video).mean((2, 3, 4), keepdim=True)


def test_a_backbone_of_ones_own_is_measured_in_its_only_form(monkeypatch):
    monkeypatch.setitem(MODELS["video_backbone"], "Own", OwnBackbone)
    cfg = config()
    cfg["model"]["args"] |= {"video_backbone": "Own", "video_backbone_args": {}}
    forms, left_out = forms_of(cfg, CPU)
    assert [form.name for form in forms[:2]] == ["plain: float32, unfused Adam", "+ fused Adam"]
    assert "+ convolutions and pool in 2D: left out, the backbone has one form" in left_out
    batch = synthetic_batch(cfg, CPU)
    assert all(Step(cfg, form, batch, CPU)().isfinite() for form in forms)
    kind, options = backbone_of(cfg, None)
    forms, _ = inference_forms(cfg, CPU, kind is R2Plus1d)
    frames = batch["frames"]
    assert [Forward(kind, form, frames, CPU)().shape[:2] for form in forms] == [(4, 5)] * len(forms)
    with pytest.raises(UserError, match="--depth 10: OwnBackbone has no depth"):
        backbone_of(cfg, 10)


def test_a_row_for_each_option_of_inductor(monkeypatch):
    forms = [PLAIN, replace(OURS, compiled=True)]
    added = with_options(forms, ["triton.cudagraphs=true", "combo_kernels=true,realize_reads_threshold=5"])
    assert added[:2] == forms and all(form.compiled and form.in_2d for form in added[2:])
    assert [form.options for form in added[2:]] == [
        {"triton.cudagraphs": True},
        {"combo_kernels": True, "realize_reads_threshold": 5},
    ]
    for wrong in ("no_such_key=true", "combo_kernels", "combo_kernels="):
        with pytest.raises(UserError, match=f"--inductor: {wrong}: expected KEY=VALUE"):
            with_options(forms, [wrong])
    with pytest.raises(UserError, match="--inductor: nothing is compiled here"):
        with_options([PLAIN], ["combo_kernels=true"])
    assert with_options([PLAIN], []) == [PLAIN]
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: asked.append(given))
    monkeypatch.setattr("utils.distributed.compiles", lambda *_: True)
    Step(config(), added[3], synthetic_batch(config(), CPU), CPU)
    assert asked[0]["options"] == {"realize_reads_threshold": 5, "combo_kernels": True}


def test_cuda_graphs_are_recorded_where_they_can_be(monkeypatch):
    gpu, cfg = torch.device("cuda"), config()
    monkeypatch.setattr("utils.distributed.compiles", lambda asked, device: asked is not False)
    assert records_graphs(cfg, gpu) and not records_graphs(cfg, CPU)
    for change in ({"cuda_graphs": False}, {"accumulate": 2}, {"compile": False}):
        assert not records_graphs(cfg | change, gpu)
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    assert not records_graphs(cfg, gpu)
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: asked.append(given["options"]))
    monkeypatch.setattr("utils.distributed.world_size", lambda: 1)
    wrap(nn.Linear(2, 2), True, gpu, graphs=True), wrap(nn.Linear(2, 2), True, gpu)
    assert asked == [OPTIONS | CUDA_GRAPHS, OPTIONS]


def test_the_last_row_on_a_gpu_is_that_of_cuda_graphs(monkeypatch):
    gpu, cfg, asked = torch.device("cuda"), config(), []
    for name in ("utils.benchmark.forms.compiles", "utils.distributed.compiles"):
        monkeypatch.setattr(name, lambda asked, device: True)
    monkeypatch.setattr("utils.benchmark.forms.multiplies_in_tf32", lambda device: True)
    monkeypatch.setattr("utils.benchmark.forms.Precision", lambda name, device: SimpleNamespace(name="bf16"))
    *_, compiled, recorded = forms_of(cfg, gpu)[0]
    assert recorded == replace(compiled, name="+ CUDA graphs", graphs=True) and compiled.compiled
    assert forms_of(cfg | {"cuda_graphs": False}, gpu)[0][-1] == compiled
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: asked.append(given))
    for form in (compiled, recorded):
        Step(cfg, form, synthetic_batch(cfg, CPU), CPU)
    assert [given["options"] for given in asked if "options" in given] == [OPTIONS, OPTIONS | CUDA_GRAPHS]


def test_a_step_trains_and_the_host_bank_draws_what_it_should():
    cfg = config()
    step = Step(cfg, PLAIN, synthetic_batch(cfg, CPU), CPU)
    assert type(step.criterion.nce_average) is HostMemoryBank
    before = [p.detach().clone() for p in step.model.parameters()]
    losses = [step().item() for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    index = torch.tensor([0, 5, 49_999])
    drawn = step.criterion.nce_average.sample_negatives(index, 1000)
    assert drawn.min() >= 0 and drawn.max() < 50_000 and not (drawn == index[:, None]).any()


def test_counts():
    a, b = torch.randn(2, 3, 4).unbind()
    assert count_flops(lambda: a @ b.T) == 2 * 3 * 3 * 4
    assert count_bytes(lambda: a + b) == 3 * a.nbytes
    assert count_bytes(lambda: a.T.reshape(2, 6)) >= 2 * a.nbytes and count_bytes(lambda: a.T[1:]) == 0
    assert count_bytes(lambda: a.add_(b)) == count_bytes(lambda: torch.add(a, b, out=b)) == 3 * a.nbytes
    assert count_bytes(lambda: a.copy_(b)) == 2 * a.nbytes and count_bytes(lambda: a.zero_()) == a.nbytes
    order = []
    timings = time_in_turns([lambda: order.append(0), lambda: order.append(1)], steps=3, rounds=2, device=CPU)
    assert order == [0, 1] + [0, 0, 0, 0, 1, 1, 1, 1] * 2
    assert [len(timing.rounds) for timing in timings] == [2, 2] and min(timings[0].rounds) > 0
    for precision, rounding in (("tf32", "high"), ("fp32", "highest")):
        assert matrix_ceiling(CPU, precision, seconds=0) > 0
        assert torch.get_float32_matmul_precision() == rounding


def test_bytes_of_rows_are_not_those_of_the_table():
    table, rows = torch.zeros(10_000, 8), torch.ones(4, 8)
    index = torch.arange(4)
    for look_up in (lambda: table[index], lambda: table.index_select(0, index)):
        assert count_bytes(look_up) == 2 * rows.nbytes + index.nbytes
    assert count_bytes(lambda: table.index_copy_(0, index, rows)) == 2 * rows.nbytes + index.nbytes
    assert count_bytes(lambda: table.index_put_((index,), rows)) == 2 * rows.nbytes + index.nbytes
    assert count_bytes(lambda: table.index_put_((index,), rows, accumulate=True)) == 3 * rows.nbytes + index.nbytes


@pytest.mark.parametrize("fused", [True, False])
def test_bytes_of_an_optimizer_are_its_states(fused):
    weight = nn.Parameter(torch.ones(100_000))
    weight.grad = torch.ones(100_000)
    adam = torch.optim.Adam([weight], fused=fused, foreach=False)
    adam.step()
    moved = count_bytes(adam.step) / weight.nbytes
    assert moved == pytest.approx(7, abs=0.01) if fused else moved > 7  # reads 4, writes 3; unfused, several times


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words)])
    benchmark.main()


def test_what_computes_nan_is_not_timed():
    with pytest.raises(RunFailed, match="some form: after the first call, what it computes is not finite"):
        first_calls([Form("some form", "fp32")], lambda form: lambda: torch.tensor([0.0, float("nan")]), CPU)


@pytest.mark.parametrize("changes", [{"options": {"triton.cudagraphs": True}}, {"graphs": True}])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_row_whose_second_call_fails_is_left_out(changes, error):
    """CUDA graphs are recorded by the second call: what fails there must not take the other rows with it."""
    calls = []

    def call():
        calls.append(0)
        if len(calls) == 2:
            raise error("cannot be recorded")
        return torch.zeros(1)

    graphs = Form("graphs", "bf16", compiled=True, **changes)
    forms = {"eager": lambda: torch.ones(1), "graphs": call}
    rows, failed = first_calls([Form("eager", "fp32"), graphs], lambda form: forms[form.name], CPU)
    assert [row.form.name for row in rows] == ["eager"]
    assert len(failed) == 1 and f"graphs: left out, it failed: {error.__name__}: cannot" in failed[0]


def test_step_and_inference_write_what_they_promise(monkeypatch, tmp_path, capsys):
    sizes = ("--batch-size", 2, "--crop", 48, "--steps", 1, "--rounds", 1)
    files = ("--json", tmp_path / "a.json", "--png", tmp_path / "a.png")
    command(monkeypatch, "step", REPO / "configs/demo/xid.yaml", *sizes, *files, "--top-kernels", 3)
    told, report = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert "batch 2, 8 x 48 x 48" in told
    rows, gpu = report["rows"], torch.cuda.is_available()
    assert len(rows) == (6 if gpu else 3 + keep_freed_memory(False)) and ("torch.compile: left out" in told) != gpu
    assert len(report["kernels"]) == 3 and report["flops_a_step"] > 1e9
    for row in rows:
        assert row["clips_per_s"] == pytest.approx(2000 / row["ms"]) and len(row["ms_rounds"]) == 1
        assert row["ratio"] == pytest.approx(rows[0]["ms"] / row["ms"])
        assert (row["kernel_ms"] is not None) == (row["host_ms"] is not None) == gpu
        assert (row["gb_moved"] or 1) > 0.1 and (row["gb_moved"] is None) == (row["variant"] == "+ torch.compile")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    command(monkeypatch, "inference", REPO / "configs/demo/linear.yaml", *sizes, "--depth", 10, *files)
    backbone = json.loads((tmp_path / "a.json").read_text())
    assert backbone["flops_a_step"] < report["flops_a_step"] / 2 and "R2Plus1d, depth 10" in capsys.readouterr().out


def test_bank_writes_what_it_promises(monkeypatch, tmp_path, capsys):
    files = ("--json", tmp_path / "a.json", "--png", tmp_path / "a.png")
    words = ("--instances", 50, 300, 10_000_000, "--dim", 16, "--negatives", 8, "--steps", 1, "--rounds", 1)
    monkeypatch.setattr("utils.benchmark.bank._free_memory", lambda device: 10_000_000)
    command(monkeypatch, "bank", *words, *files)
    report = json.loads((tmp_path / "a.json").read_text())
    sizes = [(row["instances"], row["dtype"], row["gb"]) for row in report["rows"]]
    assert sizes == [(50, "fp32", 6.4e-6), (50, "bf16", 3.2e-6), (300, "fp32", 38.4e-6), (300, "bf16", 19.2e-6)]
    assert len(report["left_out"]) == 2 and "10,000,000 rows in fp32: left out, 1.3 GB" in capsys.readouterr().out
    command(monkeypatch, "bank", "--instances", 10_000_000, *words[4:], "--png", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()  # nothing fitted


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_2d_is_3d_on_a_gpu(channels_last):
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    fast, plain = R2Plus1d(10).cuda().eval(), R2Plus1d(10).cuda().eval()
    plain.load_state_dict(fast.state_dict())
    in_3d(plain, channels_last)
    video = torch.randn(2, 3, 8, 64, 64, device="cuda")
    torch.testing.assert_close(fast(video), plain(video), rtol=1e-4, atol=1e-4)


def test_nothing_imports_the_benchmarks():
    for file in [*REPO.glob("*.py"), *REPO.glob("*/*.py")]:
        inside = Path(file).parent.name == "tests" or file.name.startswith("benchmark")
        assert inside or "utils.benchmark" not in file.read_text().replace("-m utils.benchmark", ""), file
