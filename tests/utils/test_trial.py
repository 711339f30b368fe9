"""What torch.compile fails at is told, and the run goes on without, with nothing changed."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from datasets.preprocessing import VideoPrep
from utils.benchmark.forms import Form
from utils.benchmark.step import first_calls
from utils.compiling import OPTIONS
from utils.distributed import wrap
from utils.frozen import FrozenEncoder
from utils.trial import attempt, try_compiled

CPU = torch.device("cpu")
COMPILE = nn.Module.compile


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward):
        return refuse(x) if forward else x.clone()

    @staticmethod
    def backward(ctx, d_x):
        return refuse(d_x), None


@torch.library.custom_op("avssrl_tests::refuse", mutates_args=())
def refuse(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("expected stride 1,\nfound 2")


@refuse.register_fake
def _(x):
    return torch.empty_like(x)


class Network(nn.Module):
    """A layer and BN; compiled, it fails where `fails` says."""

    def __init__(self, fails=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.bn, self.fails = nn.Linear(6, 4), nn.BatchNorm1d(4), fails

    def forward(self, x):
        x = self.linear(x)
        if self.fails and torch.compiler.is_compiling():
            x = Failing.apply(x, self.fails == "forward")
        return self.bn(x)


def test_the_reason_is_what_a_compiler_found_and_not_its_command():
    def call():
        told = "Command:\ng++ " + 900 * "-I/usr " + "\n\nOutput:\nkernel.cpp:12:5: error: no such thing\n\n\n"
        raise RuntimeError(told + "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this ...)")

    result, reason = attempt(call)
    assert result is None and len(reason) <= 420 and reason.startswith("RuntimeError: Command: g++")
    assert reason.endswith("Output: kernel.cpp:12:5: error: no such thing")


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"frames": torch.randn(8, 6, generator=generator)} for _ in range(count)]


def tried(net, prepare=None, data=None, graphs=False):
    """All batches after the trial."""
    prepare = prepare or nn.Identity()
    data = iter(batches() if data is None else data)
    stream = try_compiled(data, lambda batch: net(prepare(batch["frames"])), net, prepare, graphs)
    return list(stream)


@pytest.fixture(autouse=True)
def told(caplog):
    with caplog.at_level("INFO", "avssrl"):
        yield caplog
    torch.compiler.reset()


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_what_cannot_be_compiled_runs_without(told, fails):
    model, plain = Network(fails), Network()
    model.compile(backend="aot_eager")
    with pytest.raises((RuntimeError, AssertionError), match="expected stride 1"):
        copied = copy.deepcopy(model)
        copied.compile(backend="aot_eager")
        copied(batches()[0]["frames"]).sum().backward()
    seen = tried(model)
    assert "compile: failed, going on without: AssertionError: expected stride 1, found 2" in told.text
    for batch, expected in zip(seen, batches(), strict=True):
        assert torch.equal(batch["frames"], expected["frames"])
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(seen[0]["frames"]), plain(seen[0]["frames"]))


def test_a_preprocessing_that_cannot_be_compiled_is_found_as_well(told):
    model, prepare = Network(), nn.Sequential(Network("forward"), nn.Linear(4, 6))
    model.compile(backend="aot_eager"), prepare[0].compile(backend="aot_eager")
    assert len(tried(model, prepare)) == 3
    assert "compile: failed, going on without" in told.text
    assert prepare(batches()[0]["frames"]).shape == (8, 6)


def test_what_can_be_compiled_is_and_stays_so(told):
    model, plain, graphs, runs = Network(), Network(), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: (runs.append(0), graph(*args))[1]

    model.compile(backend=backend)
    seen = tried(model)
    assert len(seen) == 3 and "compiled, and one batch tried, in " in told.text and len(runs) == 1
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for batch in seen:
        torch.testing.assert_close(model(batch["frames"]), plain(batch["frames"]))
    torch.testing.assert_close(model.bn.running_mean, plain.bn.running_mean)
    assert len(graphs) == 1


def record(model, fails_at=None, error=RuntimeError, and_then=lambda: None):
    """Compile `model` for a backend that fails in one of its calls; returns the list of calls."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(0)
            assert all(p.grad is None for p in model.parameters())
            if len(calls) == fails_at:
                and_then()
                raise error("operation not permitted when stream is capturing")
            return graph(*args)

        return run

    COMPILE(model, backend=backend)
    return calls


@pytest.fixture
def compiled_again(monkeypatch):
    """PyTorch's resets and the options of further compilations, which are done by `aot_eager`."""
    asked, reset = [], torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (asked.append("reset"), reset()))
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, options: (asked.append(options), COMPILE(self, backend="aot_eager"))
    )
    return asked


def test_cuda_graphs_are_recorded_and_replayed_before_training(told):
    model = Network()
    calls = record(model)
    assert len(tried(model, graphs=True)) == 3 and len(calls) == 3
    assert "compiled, recorded as CUDA graphs, and one batch tried, in " in told.text


@pytest.mark.parametrize(("fails_at", "error"), [(2, RuntimeError), (3, RuntimeError), (2, torch.OutOfMemoryError)])
def test_what_cannot_be_recorded_as_cuda_graphs_is_compiled_without(told, compiled_again, fails_at, error):
    """The second pass records them, the third replays; their memory is not shared, so that it may not be enough."""
    model, plain = Network(), Network()
    calls = record(model, fails_at, error)
    assert len(tried(model, graphs=True)) == 3
    assert compiled_again == ["reset", OPTIONS] and len(calls) == fails_at
    assert f"CUDA graphs: failed, going on without: {error.__name__}: operation not permitted" in told.text
    assert "compiled, and one batch tried, in " in told.text and "compile: failed" not in told.text
    assert model._compiled_call_impl is not None
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_can_be_neither_recorded_nor_compiled_again_runs_without(told, compiled_again):
    model, plain = Network(), Network()
    record(model, 2, and_then=lambda: setattr(model, "fails", "backward"))
    seen = tried(model, graphs=True)
    assert "CUDA graphs: failed" in told.text and "compile: failed, going on without: AssertionError" in told.text
    assert model._compiled_call_impl is None and all(p.grad is None for p in model.parameters())
    assert torch.equal(model(seen[0]["frames"]), plain(seen[0]["frames"]))


def test_no_batch_and_one_without_clips_are_not_tried(told):
    model = Network("forward")
    model.compile(backend="aot_eager")
    assert tried(model, data=[]) == [] and tried(model, data=[{"failures": []}]) == [{"failures": []}]
    assert told.text == ""


def test_too_little_memory_is_not_the_compilers_doing():
    class Hungry(Network):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tried(Hungry())


def test_a_killed_data_worker_is_not_the_compilers_doing():
    """PyTorch's signal handler raises it wherever the main process happens to be."""

    def call():
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        except RuntimeError as error:
            raise AssertionError("the compiler was interrupted") from error

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        attempt(call)


def _rank(own_rank, file):
    """Rank 1's alone fails; then two steps, as in a script."""
    dist.init_process_group("gloo", f"file://{file}", rank=own_rank, world_size=2)
    model = Network("backward" if own_rank else None)
    model.compile(backend="aot_eager")
    net = wrap(model, False, CPU)
    assert len(tried(net)) == 3 and model._compiled_call_impl is None
    alone = Network()
    for batch in batches(2):
        net(batch["frames"]).square().sum().backward()
        alone(batch["frames"]).square().sum().backward()
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    dist.destroy_process_group()


def test_one_rank_that_fails_keeps_all_from_compiling(run_ranks, tmp_path):
    run_ranks(_rank, 2, str(tmp_path / "store"))


def test_features_are_computed_without_what_cannot_be_compiled(told):
    class Extractor(Network):
        def forward(self, clips):
            return {"pool": super().forward(clips.mean((3, 4)).flatten(1))}

    frames = torch.randint(256, (4, 2, 8, 8, 3), dtype=torch.uint8)
    found, expected = (
        FrozenEncoder(Extractor(fails), VideoPrep(), contextlib.nullcontext, CPU, compiled_size=size)(frames)
        for fails, size in (("forward", 4), (None, None))
    )
    assert torch.equal(found["pool"], expected["pool"])
    assert "compile: failed, going on without" in told.text


def test_the_benchmark_leaves_out_what_cannot_be_compiled():
    def build(form):
        def call():
            if form.compiled:
                raise RuntimeError("no such kernel")
            return torch.ones(())

        return call

    rows, failed = first_calls([Form("plain", "fp32"), Form("+ torch.compile", "fp32", compiled=True)], build, CPU)
    assert [row.form.name for row in rows] == ["plain"]
    assert failed == ["+ torch.compile: left out, it failed: RuntimeError: no such kernel"]
    with pytest.raises(RuntimeError, match="a mistake"):  # of what is not compiled nothing is hidden

        def mistaken():
            raise RuntimeError("a mistake")

        first_calls([Form("plain", "fp32")], lambda form: mistaken, CPU)
