"""The memory bank: first vectors, negatives, hard negatives, updates and the state that makes draws repeat."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from criterions.memory_bank import MemoryBank
from utils.errors import UserError


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def test_starts_from_unit_rows_that_only_the_seed_decides():
    torch.manual_seed(1)
    bank = MemoryBank(50, 16)
    torch.manual_seed(2)
    again, other = MemoryBank(50, 16), MemoryBank(50, 16, seed=1)
    for name in ("view1_mem", "view2_mem"):
        rows = getattr(bank, name)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))
        assert torch.equal(rows, getattr(again, name))
        assert not torch.equal(rows, getattr(other, name))
    assert not torch.equal(bank.view1_mem, bank.view2_mem)


def test_one_instance_is_too_few():
    with pytest.raises(UserError, match="at least 2"):
        MemoryBank(1, 4)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_of_two_instances_the_negative_is_always_the_other(k):
    index = torch.tensor([0, 1, 1])
    assert torch.equal(MemoryBank(2, 4).sample_negatives(index, k), (1 - index)[:, None].expand(3, k))


def test_negatives_are_uniform_over_the_other_instances():
    num_instances, index = 11, torch.tensor([0, 3, 10])
    bank = MemoryBank(num_instances, 4)
    draws = torch.cat([bank.sample_negatives(index, 500) for _ in range(40)], dim=1)
    expected = draws.shape[1] / (num_instances - 1)
    for own, row in zip(index.tolist(), draws, strict=True):
        counts = torch.bincount(row, minlength=num_instances)
        assert len(counts) == num_instances and counts[own] == 0
        others = torch.cat([counts[:own], counts[own + 1 :]])
        chi_square = ((others - expected) ** 2 / expected).sum()
        assert chi_square < 27.9  # 99.9% of 9 degrees of freedom; the seed is fixed


def test_draws_differ_from_call_to_call_and_eval_leaves_those_of_training_alone():
    index = torch.arange(4)
    plain, disturbed = MemoryBank(100, 4), MemoryBank(100, 4)
    first, second = plain.sample_negatives(index, 9), plain.sample_negatives(index, 9)
    assert not torch.equal(first, second)
    assert not torch.equal(MemoryBank(100, 4, seed=1).sample_negatives(index, 9), first)
    assert torch.equal(disturbed.sample_negatives(index, 9), first)
    disturbed.eval()
    assert not torch.equal(disturbed.sample_negatives(index, 9), second)
    disturbed.train()
    assert torch.equal(disturbed.sample_negatives(index, 9), second)


@pytest.mark.parametrize("name", ["video", "audio"])
def test_hard_negatives_are_the_nearest_rows_but_their_own(name):
    bank, index = MemoryBank(60, 8), torch.tensor([0, 5, 59, 5])
    emb = F.normalize(bank.rows(name)[index] + 0.1 * unit(4, 8, seed=5), dim=1)  # the own row is the very nearest
    hard = bank.sample_hard_negatives(emb, index, 7, name)
    for query, own, found in zip(emb, index.tolist(), hard.tolist(), strict=True):
        cosines = {row: float(torch.dot(query, bank.rows(name)[row])) for row in range(60)}
        assert max(cosines, key=cosines.get) == own
        del cosines[own]
        assert found == sorted(cosines, key=cosines.get, reverse=True)[:7]


def test_all_other_rows_are_the_most_hard_negatives_there_can_be():
    bank, index = MemoryBank(5, 8), torch.tensor([2])
    hard = bank.sample_hard_negatives(bank.view1_mem[index], index, 4, "video")
    assert sorted(hard[0].tolist()) == [0, 1, 3, 4]
    with pytest.raises(UserError, match="N_hard"):
        bank.sample_hard_negatives(bank.view1_mem[index], index, 5, "video")


def solve_mix(mixed, a, b):
    """The share of a in `mixed`, a unit vector along share * a + (1 - share) * b; None where it is no such mix."""
    weights = torch.linalg.lstsq(torch.stack([a, b], dim=1), mixed[:, None]).solution[:, 0]
    residual = (torch.stack([a, b], dim=1) @ weights - mixed).norm()
    share = weights / weights.sum()
    return share[0].item() if residual < 1e-6 and 0 <= share[0] <= 1 else None


def test_synthetic_negatives_mix_what_they_should():
    bank = MemoryBank(40, 12).double()
    index, emb = torch.tensor([3, 8]), unit(2, 12, seed=3, dtype=torch.float64)
    mixed = bank.synthetic_negatives(emb, index, "audio", num_hard=4, s=25, s_prime=30)
    assert mixed.shape == (2, 55, 12)
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(2, 55, dtype=torch.float64))
    for query, row, vectors in zip(emb, bank.sample_hard_negatives(emb, index, 4, "audio"), mixed, strict=True):
        hard = bank.view2_mem[row]
        pairs, shares = set(), []
        for vector in vectors[:25]:
            found = {
                (i, j): solve_mix(vector, hard[i], hard[j]) for i, j in itertools.combinations(range(4), 2)
            }  # any two unit vectors, and only those it was mixed from, explain it
            found = {pair: share for pair, share in found.items() if share is not None}
            assert len(found) == 1
            pairs |= found.keys()
            shares += found.values()
        assert len(pairs) == 6 and max(shares) - min(shares) > 0.5
        query_shares = []
        for vector in vectors[25:]:
            found = [share for other in hard if (share := solve_mix(vector, query, other)) is not None]
            assert len(found) == 1
            query_shares += found
        assert max(query_shares) <= 0.5 and max(query_shares) - min(query_shares) > 0.3


def test_a_single_hard_negative_is_mixed_with_itself():
    bank, index = MemoryBank(10, 6), torch.tensor([1])
    emb = unit(1, 6)
    nearest = bank.view1_mem[bank.sample_hard_negatives(emb, index, 1, "video")]
    mixed = bank.synthetic_negatives(emb, index, "video", num_hard=1, s=3, s_prime=0)
    torch.testing.assert_close(mixed, nearest.expand(1, 3, 6))


def test_update_mixes_old_and_new_and_leaves_the_other_rows():
    bank = MemoryBank(9, 6)
    index, video, audio = torch.tensor([4, 0, 7]), unit(3, 6, seed=1), unit(3, 6, seed=2)
    before = {name: bank.rows(name).clone() for name in ("video", "audio")}
    bank.update(index, video, audio, momentum=0.8)
    for name, emb in (("video", video), ("audio", audio)):
        expected = before[name].double()
        for row, new in zip(index.tolist(), emb.double(), strict=True):
            mixed = 0.8 * expected[row] + 0.2 * new
            expected[row] = mixed / mixed.norm()
        torch.testing.assert_close(bank.rows(name).double(), expected, rtol=0, atol=1e-7)
        untouched = [row for row in range(9) if row not in index]
        assert torch.equal(bank.rows(name)[untouched], before[name][untouched])


def test_a_row_that_its_new_vector_cancels_out_stays():
    bank = MemoryBank(4, 3)
    old = bank.view1_mem.clone()
    bank.update(torch.tensor([2]), -old[[2]], old[[1]], 0.5)
    assert torch.equal(bank.view1_mem, old)


def test_update_averages_duplicates_whatever_their_order():
    index = torch.tensor([2, 5, 2, 2, 8, 5])
    video, audio = unit(6, 7, seed=1), unit(6, 7, seed=2)
    reference = MemoryBank(9, 7)
    old = reference.view1_mem[2].double()
    mixed = 0.5 * old + 0.5 * video[index == 2].double().mean(dim=0)
    reference.update(index, video, audio, momentum=0.5)
    torch.testing.assert_close(reference.view1_mem[2].double(), mixed / mixed.norm(), rtol=0, atol=1e-7)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        bank = MemoryBank(9, 7)
        bank.update(index[list(order)], video[list(order)], audio[list(order)], momentum=0.5)
        torch.testing.assert_close(bank.view1_mem, reference.view1_mem, rtol=0, atol=1e-7)
        torch.testing.assert_close(bank.view2_mem, reference.view2_mem, rtol=0, atol=1e-7)


def test_state_dict_goes_on_with_the_same_draws(tmp_path):
    index = torch.arange(5)
    bank = MemoryBank(100, 4)
    bank.sample_negatives(index, 8)
    torch.save(bank.state_dict(), tmp_path / "bank.pth")
    resumed = MemoryBank(100, 4)
    resumed.load_state_dict(torch.load(tmp_path / "bank.pth", weights_only=True))
    for _ in range(3):
        assert torch.equal(resumed.sample_negatives(index, 8), bank.sample_negatives(index, 8))


def test_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="view1_mem"):
        MemoryBank(10, 4).load_state_dict(MemoryBank(11, 4).state_dict())


def test_an_embedding_that_is_not_finite_leaves_its_own_row_alone_and_no_other():
    """Also if the same instance is in the batch a second time."""
    index, video, audio = torch.tensor([3, 1, 4, 1]), unit(4, 8, seed=1), unit(4, 8, seed=2)
    bank, expected = MemoryBank(6, 8), MemoryBank(6, 8)
    before = bank.view1_mem.clone()
    expected.update(index, video, audio, 0.5)
    video[1, 2] = torch.nan
    bank.update(index, video, audio, 0.5)
    others = torch.tensor([0, 2, 3, 4, 5])
    assert torch.equal(bank.view1_mem[others], expected.view1_mem[others])
    assert torch.equal(bank.view1_mem[1], before[1])
    assert torch.equal(bank.view2_mem, expected.view2_mem)
