"""RINCE against the formula as it is written, in float64 and one query at a time."""

import math

import pytest
import torch

from criterions import RINCE
from utils.errors import UserError

QS = [0, 0.001, 0.1, 0.4, 1.0]


def reference(scores_pos, scores_neg, q, lam):
    losses = []
    for pos, neg in zip(scores_pos[:, 0], scores_neg, strict=True):
        p = torch.exp(pos)
        total = p
        for score in neg:
            total = total + torch.exp(score)
        losses.append(-torch.log(p / total) if q == 0 else -(p**q) / q + (lam * total) ** q / q)
    return sum(losses) / len(losses)


def value_and_gradients(loss_of, *tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*tensors)
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def logits(n, k, temperature=0.07, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(n, k + 1, generator=generator, dtype=torch.float64) - 1
    scores = (cosines / temperature).float().double()  # exact in float32 too
    return scores[:, :1], scores[:, 1:]


def relative_error(ours, theirs):
    return ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("lam", [0.01, 0.5])
@pytest.mark.parametrize("q", QS)
def test_value_and_gradients_are_those_of_the_formula(q, lam):
    pos, neg = logits(6, 20)
    theirs = value_and_gradients(lambda a, b: reference(a, b, q, lam), pos, neg)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours = value_and_gradients(RINCE(q, lam), pos.to(dtype), neg.to(dtype))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype
            assert relative_error(mine, other) < tolerance


@pytest.mark.parametrize("q", [0, 0.001, 0.1, 0.4])
def test_temperature_of_a_hundredth(q):
    pos, neg = logits(6, 20, temperature=0.01)
    theirs = value_and_gradients(lambda a, b: reference(a, b, q, 0.01), pos, neg)
    ours = value_and_gradients(RINCE(q, 0.01), pos.float(), neg.float())
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 5e-5


@pytest.mark.parametrize("pos, neg", [(-80.0, 0.0), (0.0, -80.0), (-80.0, 80.0), (80.0, -80.0), (-100.0, -100.0)])
@pytest.mark.parametrize("q", QS)
def test_extreme_scores_are_finite_and_right(pos, neg, q):
    scores = torch.tensor([[pos]], dtype=torch.float64), torch.tensor([[neg, neg - 1]], dtype=torch.float64)
    theirs = value_and_gradients(lambda a, b: reference(a, b, q, 0.01), *scores)
    ours = value_and_gradients(RINCE(q, 0.01), *(score.float() for score in scores))
    for mine, other in ((ours[0], theirs[0]), (torch.cat(ours[1:], dim=1), torch.cat(theirs[1:], dim=1))):
        assert (mine.double() - other).abs().max() <= 2e-5 * other.abs().max() + 1e-15


def test_float32_keeps_the_digits_that_the_plain_formula_loses():
    q, lam = 0.001, 0.01
    errors = {"ours": 0.0, "plain": 0.0}
    for pos, neg in zip(*logits(200, 64), strict=True):
        pos, neg = pos[None], neg[None]
        exact = reference(pos, neg, q, lam)
        errors["ours"] = max(errors["ours"], relative_error(RINCE(q, lam)(pos.float(), neg.float()), exact))
        errors["plain"] = max(errors["plain"], relative_error(reference(pos.float(), neg.float(), q, lam), exact))
    assert errors["ours"] < 1e-5 and errors["plain"] > 1e-4


def test_q_to_zero_is_infonce_but_for_the_log_of_lam():
    pos, neg = logits(5, 10)
    for dtype in (torch.float32, torch.float64):
        at_zero = value_and_gradients(RINCE(0, 0.01), pos.to(dtype), neg.to(dtype))
        near_zero = value_and_gradients(RINCE(1e-7, 0.01), pos.to(dtype), neg.to(dtype))
        torch.testing.assert_close(near_zero[0], at_zero[0] + math.log(0.01), rtol=1e-5, atol=1e-5)
        for near, at in zip(near_zero[1:], at_zero[1:], strict=True):
            torch.testing.assert_close(near, at, rtol=1e-5, atol=1e-6)


def test_gradient_where_p_equals_lam_times_s():
    pos, neg = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    theirs = value_and_gradients(lambda a, b: reference(a, b, 0.4, 0.5), pos, neg)
    for mine, other in zip(value_and_gradients(RINCE(0.4, 0.5), pos, neg), theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_taken_to_float32(dtype):
    pos, neg = (scores.to(dtype) for scores in logits(6, 20))
    rince = RINCE(0.4, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rince(pos, neg)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, rince(pos.float(), neg.float()))


def test_q_of_a_call_replaces_the_constructors():
    pos, neg = logits(4, 6)
    assert torch.equal(RINCE(0.001, 0.01)(pos, neg, q=0.3), RINCE(0.3, 0.01)(pos, neg))
    assert torch.equal(RINCE(0.3, 0.01)(pos, neg, q=0), RINCE(0, 0.01)(pos, neg))


@pytest.mark.parametrize("q, lam, name", [(-0.1, 0.01, "q"), (1.1, 0.01, "q"), (0.1, 0, "lam")])
def test_settings_out_of_range(q, lam, name):
    with pytest.raises(UserError, match=f"loss.args.{name}"):
        RINCE(q, lam)
