"""VICLoss against the formula with loops in float64, on one process and on several."""

import pytest
import torch
import torch.distributed as dist

from criterions import VICLoss, build_criterion
from utils.errors import UserError

TERMS = {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0}


def reference(x, y, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0):
    n, dim = x.shape
    sim = sum((x[i, d] - y[i, d]) ** 2 for i in range(n) for d in range(dim)) / (n * dim)
    std, cov = 0, 0
    for z in (x, y):
        centred = [z[:, d] - sum(z[:, d]) / n for d in range(dim)]
        for a in range(dim):
            deviation = torch.sqrt(sum(centred[a] ** 2) / (n - 1) + 1e-4)
            std = std + 0.5 * torch.clamp(1 - deviation, min=0) / dim
            for b in range(dim):
                if a != b:
                    cov = cov + (sum(centred[a] * centred[b]) / (n - 1)) ** 2 / dim
    return sim_coeff * sim + std_coeff * std + cov_coeff * cov


def embeddings(n, dim, seed=0):
    """Correlated dimensions of unlike scales, some above and some below the hinge, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    scale = torch.linspace(0.2, 2, dim, dtype=torch.float64)
    x, noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    x = x @ mix * scale + 3
    return x.float().double(), (x + 0.5 * noise).float().double()


def value_and_gradients(loss_of, x, y):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = loss_of(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y))]


def assert_relative(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("n, dim", [(6, 20), (20, 6), (8, 8), (2, 5)])
def test_value_and_gradients_are_those_of_the_formula(n, dim):
    x, y = embeddings(n, dim)
    theirs = value_and_gradients(reference, x, y)
    assert_relative(value_and_gradients(VICLoss(), x, y), theirs, 1e-10)
    assert_relative(value_and_gradients(VICLoss(), x.float(), y.float()), theirs, 1e-4)


@pytest.mark.parametrize("n, dim", [(6, 20), (20, 6)])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone(term, n, dim):
    coefficients = {name: float(name == term) for name in TERMS}
    x, y = embeddings(n, dim)
    theirs = value_and_gradients(lambda a, b: reference(a, b, **coefficients), x, y)
    assert theirs[0] > 0
    assert_relative(value_and_gradients(VICLoss(**coefficients), x.float(), y.float()), theirs, 1e-4)


@pytest.mark.parametrize(
    "n, dim, dominant", [(32, 1024, 1), (200, 256, 1), (255, 256, 1), (32, 1024, 30), (512, 64, 1)]
)
def test_covariance_term_in_float32_at_real_sizes(n, dim, dominant):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] *= dominant
    x = x.float().double()

    def covariance_term(a, b):
        return sum((torch.cov(z.T) - torch.cov(z.T).diagonal().diag()).square().sum() / dim for z in (a, b))

    theirs = value_and_gradients(covariance_term, x, x + 1)
    ours = value_and_gradients(VICLoss(0, 0, 1), x.float(), (x + 1).float())
    assert_relative(ours, theirs, 1e-4)


def test_collapsed_embeddings_have_finite_gradients():
    loss, grad_x, grad_y = value_and_gradients(VICLoss(), torch.ones(4, 6), torch.ones(4, 6))
    torch.testing.assert_close(loss, torch.tensor(25 * (1 - 1e-4**0.5)))
    assert grad_x.isfinite().all() and grad_y.isfinite().all()


def test_float32_under_autocast():
    x, y = (z.bfloat16() for z in embeddings(6, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = VICLoss()(x, y)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, VICLoss()(x.float(), y.float()))


def test_stats_hold_the_terms_and_tell_a_collapse():
    x, y = embeddings(6, 20)
    criterion = VICLoss(2, 3, 4)
    loss, stats = criterion(x.requires_grad_(), y), criterion.stats
    torch.testing.assert_close(2 * stats["sim"] + 3 * stats["std"] + 4 * stats["cov"], loss.detach())
    assert not any(value.requires_grad or value.ndim for value in stats.values())
    cosines = torch.nn.functional.cosine_similarity(x.detach()[:, None], y[None], dim=2)
    torch.testing.assert_close(stats["pos_cos"], cosines.diagonal().mean())
    torch.testing.assert_close(stats["neg_cos"], cosines[~torch.eye(len(x), dtype=torch.bool)].mean())
    wide = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
    criterion(wide, torch.ones(400, 20) + 1e-3 * wide)
    assert 0.95 < criterion.stats["video_spread"] < 1.05 and criterion.stats["audio_spread"] < 0.01
    criterion(wide, wide)
    torch.testing.assert_close(criterion.stats["pos_cos"], torch.tensor(1.0))


def test_a_batch_of_one_has_no_variance():
    with pytest.raises(UserError, match="batch_size"):
        VICLoss()(torch.randn(1, 4), torch.randn(1, 4))


def test_build_criterion():
    criterion = build_criterion({"name": "VICLoss", "args": {"sim_coeff": 5.0}}, num_instances=9, embedding_dim=4)
    assert (criterion.sim_coeff, criterion.std_coeff, criterion.cov_coeff) == (5.0, 25.0, 1.0)
    with pytest.raises(UserError, match="std_coeff"):
        build_criterion({"name": "VICLoss", "args": {"std_coef": 5.0}})


@pytest.mark.parametrize("n, dim", [(6, 20), (20, 6)])
def test_no_host_sync(no_host_sync, n, dim):
    x, y = (z.float().requires_grad_() for z in embeddings(n, dim))
    criterion = VICLoss()
    with no_host_sync():
        criterion(x, y).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), no_host_sync():
        x.sum().item()


def _worker(rank, folder):
    """Four processes, then the first two of them alone: each saves its loss and its gradients."""
    torch.set_num_threads(1)
    for world_size, n, dim in ((4, 8, 20), (4, 20, 6), (2, 8, 20), (2, 20, 6)):
        if rank >= world_size:
            continue
        store = f"file://{folder}/{world_size}-{n}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        x, y = (z.float().chunk(world_size)[rank] for z in embeddings(n, dim))
        torch.save(value_and_gradients(VICLoss(), x, y), f"{folder}/result-{world_size}-{n}-{rank}")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vicreg")
    run_ranks(_worker, 4, str(folder))
    return folder


@pytest.mark.parametrize("n, dim", [(8, 20), (20, 6)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_mean_over_ranks_is_one_process_with_the_whole_batch(results, world_size, n, dim):
    theirs = value_and_gradients(reference, *embeddings(n, dim))
    losses, *gradients = zip(
        *(torch.load(results / f"result-{world_size}-{n}-{rank}") for rank in range(world_size)), strict=True
    )
    ours = [torch.stack(losses).mean(), *(torch.cat(parts) / world_size for parts in gradients)]
    assert_relative(ours, theirs, 1e-4)
