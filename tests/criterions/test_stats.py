"""Figures of the training log that tell a collapse, against what they stand for."""

import pytest
import torch
import torch.nn.functional as F

from criterions.stats import effective_dims, spread


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
