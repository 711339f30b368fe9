"""Figures of the training log that tell a collapse, against what they stand for."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from criterions import VICLoss, xID
from criterions.stats import effective_dims, spread
from utils.distributed import rank, world_size
from utils.metrics import Averages, collapse_warning


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("n", "dim"), [(12, 40), (60, 8)])
def test_effective_dims_is_the_participation_ratio_of_the_covariance(n, dim):
    unit = F.normalize(rows(n, dim) * torch.arange(1, dim + 1) ** 0.5, dim=1)
    values = torch.linalg.eigvalsh(unit.T.cov())
    expected = values.sum() ** 2 / values.square().sum()
    torch.testing.assert_close(effective_dims(unit), expected)
    assert effective_dims(unit.float()).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_spread_out_line_has_one_dimension():
    axis, signs = F.normalize(rows(64), dim=0), torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    assert spread(signs * axis) > 0.75
    assert effective_dims(signs * axis).item() == pytest.approx(1)
    assert effective_dims(F.normalize(rows(2000, 16), dim=1)).item() == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize("n", [2, 4, 32])
def test_the_spread_of_random_rows_is_1_in_small_batches_too(n):
    drawn = [spread(F.normalize(torch.randn(n, 128), dim=1)) for _ in range(50)]
    assert torch.stack(drawn).mean().item() == pytest.approx(1, abs=0.25)
    assert spread(torch.full((n, 4), 0.5)) == 0 and spread(torch.ones(1, 4) / 2).isnan()


def test_a_point_has_none():
    assert effective_dims(torch.full((8, 4), 0.5)).item() == 0
    assert effective_dims(torch.ones(1, 4) / 2).item() == 0


def figures_of(collapsed):
    """What xID and VICReg measure on two clips of different videos, over all ranks."""
    video, audio = F.normalize(rows(2, 16), dim=1), F.normalize(rows(2, 16).flip(1), dim=1)
    if collapsed:
        video, audio = video[:1].expand(2, 16), audio[:1].expand(2, 16)
    share = 2 // world_size()
    own, figures = slice(rank() * share, (rank() + 1) * share), {}
    criterions = {"xid": xID(8, 16, num_negatives=4).double(), "vicreg": VICLoss()}
    for name, criterion in criterions.items():
        more = (torch.tensor([5, 2])[own],) if name == "xid" else ()
        averages = Averages()
        criterion(video[own], audio[own], *more)
        averages.add(criterion.stats)
        figures[name] = averages.read()
    return figures


def _rank_with_one_clip(own_rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=own_rank, world_size=2)
    found = {collapsed: figures_of(collapsed) for collapsed in (False, True)}
    torch.save(found, f"{folder}/found{own_rank}")
    dist.destroy_process_group()


def test_ranks_of_one_clip_each_measure_what_one_process_does(run_ranks, tmp_path):
    run_ranks(_rank_with_one_clip, 2, str(tmp_path))
    for own_rank, collapsed in ((0, False), (0, True), (1, True)):
        found, expected = torch.load(tmp_path / f"found{own_rank}")[collapsed], figures_of(collapsed)
        for name in ("xid", "vicreg"):
            assert found[name] == pytest.approx(expected[name], abs=1e-12)
            assert ("their spread is 0.00" in (collapse_warning(found[name]) or "")) == collapsed
