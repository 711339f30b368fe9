"""utils.prefetch and utils.distributed.wrap: what a step is fed with, and how its gradients travel."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

from criterions import build_criterion
from datasets.preprocessing import BatchPrep
from models import build_model
from tests.tiny import REPO, needs_gpu
from utils.benchmark.forms import synthetic_batch
from utils.config import load_config
from utils.distributed import wrap
from utils.logger import StepClock
from utils.metrics import Averages
from utils.precision import Precision
from utils.prefetch import prefetch

CPU = torch.device("cpu")


class Loader:
    """Batches one after the other, counting how many were asked for."""

    asked = 0

    def __iter__(self):
        for i in range(4):
            self.asked += 1
            yield {
                "frames": torch.full((2, 3), i, dtype=torch.uint8),
                "index": torch.tensor([i]),
                "failures": [("a", i)],
            }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_batches_come_as_they_are_and_when_they_are_asked_for(device):
    loader = Loader()
    for i, batch in enumerate(StepClock().timed(prefetch(loader, torch.device(device)))):
        assert loader.asked == i + 1  # none ahead: a run that is stopped here goes on with the next one
        assert batch["frames"].device.type == batch["index"].device.type == device
        assert batch["frames"].unique().item() == batch["index"].item() == i and batch["failures"] == [("a", i)]
    assert loader.asked == 4


@needs_gpu
def test_a_prefetched_batch_is_whole_when_it_is_used():
    host = [{"frames": torch.randint(256, (1 << 24,), dtype=torch.uint8).pin_memory()} for _ in range(4)]
    busy = torch.randn(4096, 4096, device="cuda")
    sums = []
    for batch in prefetch(iter(host), torch.device("cuda")):
        for _ in range(10):
            busy = (busy @ busy).tanh()
        sums.append(batch["frames"].long().sum())
        del batch
    assert [x.item() for x in sums] == [batch["frames"].long().sum().item() for batch in host]


@needs_gpu
def test_memory_that_is_used_again_is_copied_before():
    one = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()  # 10 ms of copying

    def again():
        for i in range(4):
            yield {"frames": one.fill_(i)}

    copies = [batch["frames"] for batch in prefetch(again(), torch.device("cuda"))]
    assert [(copy.min().item(), copy.max().item()) for copy in copies] == [(i, i) for i in range(4)]


class FakeStream:
    """A stream on which a copy takes until somebody waits for it; the calls are told to `told`."""

    def __init__(self, told):
        self.told = told

    def record_event(self):
        self.told.append("copies")
        return self

    def synchronize(self):
        self.told.append("waits")

    def wait_event(self, event):
        assert event.told is self.told


def test_no_batch_is_asked_for_or_left_before_the_last_one_is_copied(monkeypatch):
    told = []

    def loader():
        for i in range(3):
            told.append(f"asks {i}")
            yield {"name": f"batch {i}"}

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(told))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    assert [batch["name"] for batch in prefetch(loader(), torch.device("cuda"))] == ["batch 0", "batch 1", "batch 2"]
    assert told == ["asks 0", "copies", "waits", "asks 1", "copies", "waits", "asks 2", "copies", "waits"]
    told.clear()
    stream = prefetch(loader(), torch.device("cuda"))
    next(stream)
    stream.close()
    assert told == ["asks 0", "copies", "waits"]


@pytest.mark.parametrize("method", ["xid", "vicreg"])
def test_a_step_up_to_its_gradients_asks_the_device_nothing(method, no_host_sync):
    cfg = load_config(REPO / f"configs/demo/{method}.yaml", ["dataset.batch_size=4", "dataset.crop_size=32"])
    torch.manual_seed(0)
    model, precision, averages = build_model(cfg["model"]), Precision("fp32", CPU), Averages()
    criterion = build_criterion(cfg["loss"], 40, model.out_dim)
    mels = cfg["dataset"]["spec_params"]["n_mels"]
    prepare = BatchPrep(cfg["dataset"], {"mean": torch.zeros(mels), "std": torch.ones(mels)}, CPU)
    batch = synthetic_batch(cfg, CPU)
    batch["index"] %= 40
    optimizer = torch.optim.Adam(model.parameters())
    with no_host_sync():
        for batch in prefetch([batch], CPU):
            embeddings = model(*prepare(batch))
            loss = criterion(*embeddings, batch["index"]) if method == "xid" else criterion(*embeddings)
            precision.backward(loss)
            averages.add({"loss": loss, **criterion.stats})
            precision.gradient_norm(optimizer)
    assert averages.read()["loss"] == pytest.approx(loss.item())


def gradients(net, rank, world_size):
    """After three steps on this rank's share of a batch, the last one's."""
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        net.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
    return [p.grad for p in net.parameters()]


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = [gradients(wrap(small_net(), False, CPU, None, static), rank, 2) for static in (False, True)]
    found.append(gradients(wrap(small_net(), False, CPU, "bf16", True), rank, 2))
    expected = gradients(small_net(), 0, 1)
    for ours, tolerance in zip(found, (1e-6, 1e-6, 0.02), strict=True):
        for mine, other in zip(ours, expected, strict=True):
            assert mine.dtype == torch.float32
            assert (mine - other).abs().max() <= tolerance * other.abs().max()
    assert any(not torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))  # bf16 did travel
    dist.destroy_process_group()


def test_gradients_over_processes_are_the_whole_batch_s(run_ranks, tmp_path):
    run_ranks(_worker, 2, str(tmp_path))
    assert type(wrap(small_net(), False, CPU, "bf16", True)) is nn.Sequential  # one process has nothing to send
