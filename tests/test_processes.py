"""Two gloo processes with half the batch each train as one process with the whole batch does."""

import pytest
import torch
import torch.distributed as dist

from criterions import build_criterion
from models import build_model
from utils.distributed import all_reduce_sum, gather, gather_objects, gather_with_grad, rank, world_size, wrap
from utils.optim import build_optimizer
from utils.sync_bn import convert_head_sync_bn, synchronise_bn

STEPS, BATCH, INSTANCES = 5, 8, 20
MODEL = {
    "arch": "av_wrapper",
    "args": {
        "proj_dim": [32, 32, 16],
        "video_backbone": "R2Plus1d",
        "video_backbone_args": {"depth": 10},
        "audio_backbone": "Conv2DNet",
        "audio_backbone_args": {"depth": 10},
    },
}
OPTIMIZER = {"name": "adam", "weight_decay": 1e-5, "betas": [0.9, 0.999], "lr": {"base_lr": 1e-3}}


def start(own_rank, processes, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=own_rank, world_size=processes)


def train(hard_negatives, proj_norm):
    """Five steps in float64, the backbones' BN in eval mode (each rank has its own); losses, weights and bank."""
    torch.manual_seed(0)
    model = build_model({"arch": MODEL["arch"], "args": {**MODEL["args"], "proj_norm": proj_norm}}).double().eval()
    convert_head_sync_bn(model)
    model.video_proj.train(), model.audio_proj.train()
    loss = {"name": "xID", "args": {"num_negatives": 12, "q": 0.1, "N_hard": hard_negatives, "s": 4, "s_prime": 4}}
    loss["args"]["hard_neg_epoch"] = 0
    criterion = build_criterion(loss, INSTANCES, 16).double().train()
    optimizer = build_optimizer(OPTIMIZER, model)
    net = wrap(model, False, torch.device("cpu"))
    data = torch.Generator().manual_seed(1)
    share = BATCH // world_size()
    losses = []
    for _ in range(STEPS):
        video = torch.randn(BATCH, 3, 2, 16, 16, generator=data, dtype=torch.float64)
        audio = torch.randn(BATCH, 1, 16, 16, generator=data, dtype=torch.float64)
        index = torch.randint(INSTANCES, (BATCH,), generator=data)
        own = slice(rank() * share, (rank() + 1) * share)
        value = criterion(*net(video[own], audio[own]), index[own])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(all_reduce_sum(value).item() / world_size())
    return losses, model.state_dict(), criterion.state_dict()


def train_vicreg():
    """Five steps in float64 (in float32 Adam's first steps amplify rounding), with BN in training mode."""
    torch.manual_seed(0)
    args = {key: value for key, value in MODEL["args"].items() if key != "proj_dim"}
    model = build_model({"arch": "vicreg_wrapper", "args": {**args, "exp_dim": [32, 32, 16]}}).double()
    model = synchronise_bn(model, torch.device("cpu"), False).train()
    criterion = build_criterion({"name": "VICLoss"})
    optimizer = build_optimizer(OPTIMIZER, model)
    net = wrap(model, False, torch.device("cpu"))
    data = torch.Generator().manual_seed(1)
    share, losses = BATCH // world_size(), []
    for _ in range(STEPS):
        video = torch.randn(BATCH, 3, 4, 32, 32, generator=data, dtype=torch.float64)
        audio = torch.randn(BATCH, 1, 16, 16, generator=data, dtype=torch.float64)
        own = slice(rank() * share, (rank() + 1) * share)
        value = criterion(*net(video[own], audio[own]))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(all_reduce_sum(value).item() / world_size())
    return losses, model.state_dict()


def train_as_one_of_two(own_rank, file, answer, training, *args):
    start(own_rank, 2, file)
    result = training(*args)
    if own_rank == 0:
        torch.save(result, answer)
    dist.destroy_process_group()


@pytest.mark.parametrize(("hard_negatives", "proj_norm"), [(None, None), (6, None), (None, "bn")])
def test_two_processes_train_as_one(tmp_path, run_ranks, hard_negatives, proj_norm):
    answer = tmp_path / "answer.pt"
    run_ranks(train_as_one_of_two, 2, tmp_path / "meet", answer, train, hard_negatives, proj_norm)
    losses, weights, bank = torch.load(answer)
    one_losses, one_weights, one_bank = train(hard_negatives, proj_norm)
    assert len(set(one_losses)) == STEPS
    torch.testing.assert_close(losses, one_losses, atol=1e-5, rtol=0)
    for two, one in ((weights, one_weights), (bank, one_bank)):
        assert two.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_vicreg_s_bn_is_that_of_the_whole_batch(tmp_path, run_ranks):
    answer = tmp_path / "answer.pt"
    run_ranks(train_as_one_of_two, 2, tmp_path / "meet", answer, train_vicreg)
    losses, weights = torch.load(answer)
    one_losses, one_weights = train_vicreg()
    torch.testing.assert_close(losses, one_losses, atol=1e-6, rtol=0)
    assert weights.keys() == one_weights.keys()
    for name in one_weights:  # BN's running statistics, too
        torch.testing.assert_close(weights[name], one_weights[name], atol=1e-6, rtol=0)


def use_helpers(own_rank, file):
    start(own_rank, 2, file)
    own = torch.arange(3.0) + 10 * own_rank
    assert gather(own.view(3, 1)).flatten().tolist() == [0, 1, 2, 10, 11, 12]
    assert all_reduce_sum(own).tolist() == [10, 12, 14] and own.tolist() == [10 * own_rank + i for i in range(3)]
    assert gather_objects({"rank": own_rank}) == [{"rank": 0}, {"rank": 1}]
    own.requires_grad_()
    weights = torch.arange(6.0) * (1 + own_rank)  # each rank weighs the gathered rows in its own way
    (gather_with_grad(own) * weights).sum().backward()
    assert own.grad.tolist() == [3 * (3 * own_rank + i) for i in range(3)]
    dist.destroy_process_group()


def test_helpers_with_and_without_a_group(tmp_path, run_ranks):
    run_ranks(use_helpers, 2, tmp_path / "meet")
    own = torch.arange(3.0, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert not gather(own).requires_grad and gather_with_grad(own) is own
    assert gather_objects("here") == ["here"]
