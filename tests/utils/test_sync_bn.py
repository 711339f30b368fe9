"""utils.sync_bn: BN over the batches of all processes is the BN of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from utils import sync_bn
from utils.sync_bn import SyncBN, convert_sync_bn, count_rank, synchronise_bn


def network():
    torch.manual_seed(0)
    first = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU()
    return nn.Sequential(*first, nn.Conv3d(4, 2, 1), nn.BatchNorm3d(2, affine=False))


def loss_of(net, clips):
    """A loss with which no gradient of a BN vanishes by itself: not symmetrical, behind a ReLU."""
    return (net(clips) * torch.tensor([0.5, 1.0]).view(1, 2, 1, 1, 1)).exp().sum(dim=(1, 2, 3, 4))


def train_as_one_of_three(rank, file, answer):
    """Two steps on shares of 3, 2 and 0 samples of a batch of 5, as it is and in one compiled graph."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=3)
    clips = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    share = (clips[:3], clips[3:], torch.full((1, 3, 2, 4, 4), 9.0))[rank]
    answers = []
    for compiled in (False, True):
        net = convert_sync_bn(network())
        assert sum(isinstance(module, SyncBN) for module in net.modules()) == 2
        if compiled:
            net.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            net.zero_grad()
            own = share.clone().requires_grad_()
            count_rank(net, rank < 2)
            (loss_of(net, own).sum() * (rank < 2)).backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        for gradient in gradients:
            dist.all_reduce(gradient)
        inputs = [None] * 3
        dist.all_gather_object(inputs, own.grad)
        answers.append({"gradients": gradients, "inputs": inputs, "state": net.state_dict()})
    if rank == 0:
        torch.save(answers, answer)
    dist.destroy_process_group()


def test_shared_bn_is_the_bn_of_the_whole_batch(tmp_path, run_ranks):
    run_ranks(train_as_one_of_three, 3, tmp_path / "meet", tmp_path / "answer")
    found, compiled = torch.load(tmp_path / "answer")
    net = network()
    for _ in range(2):
        net.zero_grad()
        clips = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss_of(net, clips).sum().backward()
    for gradient, p in zip(found["gradients"], net.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.cat(found["inputs"][:2]), clips.grad, atol=1e-4, rtol=1e-3)
    assert not found["inputs"][2].any()
    assert found["state"].keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found["state"][name], value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(compiled, found, atol=0, rtol=0)


@pytest.mark.parametrize(("compiled", "kind"), [(False, nn.SyncBatchNorm), (True, SyncBN)])
def test_a_compiled_model_gets_the_bn_that_compiles(monkeypatch, compiled, kind):
    monkeypatch.setattr(sync_bn, "world_size", lambda: 2)
    monkeypatch.setattr(sync_bn, "compiles", lambda asked, device: asked)
    net = synchronise_bn(network(), torch.device("cuda"), compiled)
    assert [type(net[1]), type(net[4])] == [kind, kind]
    assert net.state_dict().keys() == network().state_dict().keys()


def test_a_cpu_s_ranks_get_a_bn_that_runs_there(monkeypatch):
    assert type(synchronise_bn(network(), torch.device("cpu"), False)[1]) is nn.BatchNorm3d  # one process
    monkeypatch.setattr(sync_bn, "world_size", lambda: 2)
    net = synchronise_bn(network(), torch.device("cpu"), False)
    assert [type(net[1]), type(net[4])] == [SyncBN, SyncBN]


def test_a_batch_without_a_sample_leaves_the_statistics_alone():
    """No clip of a batch can be read: every rank passes a dummy."""
    net = convert_sync_bn(network())
    net(torch.randn(5, 3, 2, 4, 4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count_rank(net, False)
    found = net(torch.full((1, 3, 2, 4, 4), 9.0))
    (0 * found.sum()).backward()
    assert found.isfinite().all() and all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(found, net.eval()(torch.full((1, 3, 2, 4, 4), 9.0)))


@pytest.mark.parametrize("value", [0.0, 30.1, 300.3])
def test_a_channel_that_is_constant_has_no_variance_below_0(value):
    """Black frames make such channels; float32 squares of 30.1 are less than the square of their mean."""
    net = convert_sync_bn(nn.Sequential(nn.BatchNorm3d(2)))
    clips = torch.full((4, 2, 3, 5, 5), value, requires_grad=True)
    found = net(clips)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros_like(found), atol=0.02, rtol=0)
    assert clips.grad.isfinite().all()
