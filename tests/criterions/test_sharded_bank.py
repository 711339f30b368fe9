"""The sharded bank against the whole one, on 2 and 4 processes; bf16 rows; first vectors block by block."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from criterions import memory_bank, sharded_bank, xID
from criterions.memory_bank import MemoryBank
from criterions.sharded_bank import ShardedMemoryBank
from utils.errors import UserError

INSTANCES, DIM, SHARE = 31, 8, 3  # 31 divides into neither 2 nor 4 ranks
ARGS = {"num_negatives": 7, "q": 0.1, "lam": 0.05}


def batch(step, rank, world_size):
    """A rank's share of a batch of SHARE clips a rank, videos more than once among them."""
    generator = torch.Generator().manual_seed(step)
    video, audio = 3 * torch.randn(2, SHARE * world_size, DIM, generator=generator, dtype=torch.float64)
    index = torch.randint(INSTANCES, (SHARE * world_size,), generator=generator)
    index[-1] = index[0]  # on the first rank and on the last
    return [part.chunk(world_size)[rank] for part in (video, audio, index)]


def loss_and_gradients(criterion, video, audio, index):
    video, audio = video.clone().requires_grad_(), audio.clone().requires_grad_()
    loss = criterion(video, audio, index)
    return [loss.detach(), *torch.autograd.grad(loss, (video, audio))]


def check_positives(bank, rank, world_size):
    whole, (_, _, index) = MemoryBank(INSTANCES, DIM), batch(0, rank, world_size)
    for name, rows in bank.own_rows(index).items():
        assert torch.equal(rows, whole.rows(name)[index])
        assert torch.equal(bank.rows(name), whole.rows(name)[bank.start : bank.stop])


def check_negatives(bank, rank, world_size):
    index = torch.tensor([bank.start, bank.stop - 1, (bank.stop + 1) % INSTANCES])  # two of the rank's own, one not
    draws = torch.cat([bank.sample_negatives(index, 500) for _ in range(10)], dim=1)
    here = bank.stop - bank.start
    for own, row in zip(index.tolist(), draws, strict=True):
        counts = torch.bincount(row - bank.start, minlength=here).double()
        assert len(counts) == here
        if bank.start <= own < bank.stop:
            assert counts[own - bank.start] == 0
            counts = torch.cat([counts[: own - bank.start], counts[own - bank.start + 1 :]])
        expected = 5000 / len(counts)
        freedom = len(counts) - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 4.5 * (2 * freedom) ** 0.5
        rows = bank.drawn_rows("audio", row[None, :9])
        assert torch.equal(rows[0], MemoryBank(INSTANCES, DIM).rows("audio")[row[:9]])


def check_steps(options, rank, world_size):
    """Loss, gradients and rows over five steps are the whole bank's, given the negatives that the shards drew."""
    sharded = xID(INSTANCES, DIM, **ARGS, **options, bank_shards=True)
    whole = xID(INSTANCES, DIM, **ARGS, **options)
    if "bank_dtype" not in options:
        sharded, whole = sharded.double(), whole.double()
    for step in range(5):
        drawn = []
        draw = ShardedMemoryBank.sample_negatives

        def record(index, k, drawn=drawn, draw=draw):
            drawn.append(draw(sharded.nce_average, index, k))
            return drawn[0]

        sharded.nce_average.sample_negatives = record
        whole.nce_average.sample_negatives = lambda index, k, drawn=drawn: drawn[0]
        inputs = batch(step, rank, world_size)
        ours, theirs = loss_and_gradients(sharded, *inputs), loss_and_gradients(whole, *inputs)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    bank = sharded.nce_average
    for name in ("video", "audio"):
        assert torch.equal(bank.rows(name), whole.nce_average.rows(name)[bank.start : bank.stop])
    new = torch.nn.functional.normalize(torch.arange(1.0, SHARE * DIM + 1).view(SHARE, DIM), dim=1)
    filled = (torch.arange(SHARE) + SHARE * rank) % INSTANCES
    for criterion in (sharded, whole):
        criterion.nce_average.update(filled, new, -new, momentum=0.0)
    assert torch.equal(bank.view2_mem, whole.nce_average.view2_mem[bank.start : bank.stop])
    return sharded, whole


def check_state(sharded, whole, rank):
    state = sharded.state_dict()
    assert state["nce_average.view1_mem"].shape == (INSTANCES, DIM)
    if rank:
        assert state["nce_average.view1_mem"].is_meta
        return None
    for name in ("view1_mem", "view2_mem"):
        assert torch.equal(state[f"nce_average.{name}"], getattr(whole.nce_average, name))
    return state


def _worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    check_positives(ShardedMemoryBank(INSTANCES, DIM), rank, world_size)
    check_negatives(ShardedMemoryBank(INSTANCES, DIM), rank, world_size)
    check_steps({"live_targets": True}, rank, world_size)
    check_steps({"bank_dtype": "bf16"}, rank, world_size)
    sharded, whole = check_steps({}, rank, world_size)
    state = check_state(sharded, whole, rank)
    if rank == 0:
        torch.save(state, f"{folder}/state{world_size}")
    other = f"{folder}/state{2 if world_size == 4 else 4}"
    if world_size == 4:  # goes on with what two ranks saved
        resumed = xID(INSTANCES, DIM, **ARGS, bank_shards=True).double()
        resumed.load_state_dict(torch.load(other, weights_only=True))
        bank = resumed.nce_average
        stored = torch.load(other, weights_only=True)["nce_average.view2_mem"]
        assert torch.equal(bank.view2_mem, stored[bank.start : bank.stop])
        assert bank.get_extra_state().tolist() == [5, 0]
    with pytest.raises(UserError, match=r"bank_shards: .* at least two a rank"):
        ShardedMemoryBank(2 * world_size - 1, DIM)
    dist.destroy_process_group()


def test_shards_are_the_whole_bank(run_ranks, tmp_path):
    run_ranks(_worker, 2, 2, str(tmp_path))
    run_ranks(_worker, 4, 4, str(tmp_path))
    whole = xID(INSTANCES, DIM, **ARGS).double()
    for world_size in (2, 4):  # one process, and a bank in one piece, go on with what the shards were
        state = torch.load(tmp_path / f"state{world_size}", weights_only=True)
        whole.load_state_dict(state)
        assert torch.equal(whole.nce_average.view1_mem, state["nce_average.view1_mem"])
        one_shard = xID(INSTANCES, DIM, **ARGS, bank_shards=True).double()
        one_shard.load_state_dict(whole.state_dict())
        assert torch.equal(one_shard.state_dict()["nce_average.view2_mem"], state["nce_average.view2_mem"])


def test_shards_refuse_hard_negatives():
    with pytest.raises(UserError, match="N_hard: 5"):
        xID(30, 8, N_hard=5, bank_shards=True)
    xID(30, 8, N_hard=0, bank_shards=True)
    with pytest.raises(UserError, match="whole bank"):
        ShardedMemoryBank(30, 8).sample_hard_negatives(torch.eye(8), torch.arange(8), 3, "video")


@pytest.mark.parametrize("options", [{"bank_shards": True}, {"bank_dtype": "bf16"}])
def test_no_host_sync(no_host_sync, options):
    criterion = xID(30, 8, **ARGS, **options)
    video, audio = torch.randn(2, 4, 8).unbind()
    with no_host_sync():
        criterion(video.requires_grad_(), audio.requires_grad_(), torch.tensor([3, 3, 9, 29])).backward()


@pytest.mark.parametrize("hard", [{}, {"N_hard": 40, "s": 6, "s_prime": 4}])
def test_bf16_rows_are_the_float32_ones_to_their_rounding(hard):
    generator = torch.Generator().manual_seed(0)
    exact, half = (xID(300, 128, **ARGS, hard_neg_epoch=0, bank_dtype=dtype) for dtype in ("fp32", "bf16"))
    assert half.nce_average.view1_mem.dtype == torch.bfloat16
    assert torch.equal(half.nce_average.view1_mem, exact.nce_average.view1_mem.bfloat16())
    for _ in range(20):
        video, audio = torch.randn(2, 16, 128, generator=generator)
        index = torch.randint(300, (16,), generator=generator)
        ours, theirs = (loss_and_gradients(criterion, video, audio, index) for criterion in (half, exact))
        assert ours[0].dtype == ours[1].dtype == torch.float32
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).norm() < 0.03 * other.norm()
    rows, reference = half.nce_average.view2_mem.float(), exact.nce_average.view2_mem
    assert (rows - reference).norm(dim=1).max() < 0.006
    assert ((F.normalize(rows, dim=1) - reference) @ video[0] / video[0].norm()).abs().max() < 0.001
    half_again = xID(300, 128, **ARGS, bank_dtype="bf16")
    half_again.load_state_dict(half.state_dict())
    assert torch.equal(half_again.nce_average.view2_mem, half.nce_average.view2_mem)
    half_again.load_state_dict(exact.state_dict())  # a float32 bank goes on in bf16
    assert torch.equal(half_again.nce_average.view2_mem, reference.bfloat16())


def test_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="bank_dtype: unknown 'fp8'; use fp32, bf16"):
        xID(30, 8, bank_dtype="fp8")


def test_a_part_of_a_bank_of_several_blocks_is_the_whole_ones(monkeypatch):
    monkeypatch.setattr(memory_bank, "BLOCK", 16)
    whole = MemoryBank(45, 8)
    torch.testing.assert_close(whole.view1_mem.norm(dim=1), torch.ones(45))
    assert len(torch.unique(whole.view1_mem, dim=0)) == 45
    monkeypatch.setattr(ShardedMemoryBank, "_range", lambda self: (13, 37))
    part = ShardedMemoryBank(45, 8)
    assert torch.equal(part.view1_mem, whole.view1_mem[13:37]) and torch.equal(part.view2_mem, whole.view2_mem[13:37])


def test_ranks_draw_negatives_of_their_own(monkeypatch):
    monkeypatch.setattr(sharded_bank, "world_size", lambda: 2)
    draws = []
    for rank in range(2):
        monkeypatch.setattr(sharded_bank, "rank", lambda rank=rank: rank)
        bank = ShardedMemoryBank(200, 4)
        draws.append(bank.sample_negatives(torch.arange(4) + bank.start, 9) - bank.start)
    assert not torch.equal(*draws)
