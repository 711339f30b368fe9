"""xID against a slow float64 reference, on one process and on two; its state, its log, and that it learns."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from criterions import RINCE, build_criterion, q_schedule, xID
from utils.errors import UserError

ARGS = {"num_negatives": 7, "q": 0.1, "lam": 0.05, "hard_neg_epoch": 2}
HARD = {"N_hard": 5, "s": 6, "s_prime": 4}


def batch(n=4, dim=8, num_instances=30, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    video, audio = 3 * torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    index = torch.randint(num_instances, (n,), generator=generator)
    return video.to(dtype), audio.to(dtype), index


def value_and_gradients(loss_of, video, audio):
    video, audio = video.clone().requires_grad_(), audio.clone().requires_grad_()
    loss = loss_of(video, audio)
    return [loss.detach(), *torch.autograd.grad(loss, (video, audio))]


def reference_rince(pos, neg, q, lam):
    p, total = torch.exp(pos), torch.exp(pos) + sum(torch.exp(score) for score in neg)
    return -torch.log(p / total) if q == 0 else -(p**q) / q + (lam * total) ** q / q


def reference(video, audio, index, banks, negatives, q, lam, temperature):
    """The loss, one query and one negative at a time."""
    losses = []
    for embeddings, bank in ((video, banks["audio"]), (audio, banks["video"])):
        for query, own, others in zip(embeddings, index.tolist(), negatives.tolist(), strict=True):
            query = query / query.norm()
            neg = [torch.dot(query, bank[other]) / temperature for other in others]
            losses.append(reference_rince(torch.dot(query, bank[own]) / temperature, neg, q, lam))
    return sum(losses) / len(losses)


def copy_of_banks(criterion):
    return {name: criterion.nce_average.rows(name).clone().double() for name in ("video", "audio")}


@pytest.mark.parametrize("q", [0, 0.001, 0.1, 0.4, 1.0])
def test_loss_gradients_and_bank_are_those_of_the_formula(q, monkeypatch):
    video, audio, index = batch(5)
    negatives = (index[:, None] + torch.arange(1, 8)) % 30
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        criterion = xID(30, 8, **ARGS, momentum=0.7, temperature=0.1).to(dtype)
        calls = []
        monkeypatch.setattr(
            criterion.nce_average, "sample_negatives", lambda index, k: calls.append((index, k)) or negatives
        )
        banks = copy_of_banks(criterion)
        theirs = value_and_gradients(lambda v, a: reference(v, a, index, banks, negatives, q, 0.05, 0.1), video, audio)
        ours = value_and_gradients(lambda v, a: criterion(v, a, index, q=q), video.to(dtype), audio.to(dtype))
        assert len(calls) == 1 and torch.equal(calls[0][0], index) and calls[0][1] == 7
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype
            assert (mine.double() - other).abs().max() <= tolerance * other.abs().max()
        for name, embeddings in (("video", video), ("audio", audio)):
            for own in index.unique().tolist():
                mixed = 0.7 * banks[name][own] + 0.3 * F.normalize(embeddings, dim=1)[index == own].mean(dim=0)
                banks[name][own] = mixed / mixed.norm()
            assert (criterion.nce_average.rows(name).double() - banks[name]).abs().max() < tolerance


@pytest.mark.parametrize("number", [7, 0])
@pytest.mark.parametrize("q", [0, 0.1])
def test_live_targets_are_those_of_the_formula(q, number, monkeypatch):
    """Positives are the batch's own pairs, its other instances join the bank's negatives, both sides get gradients."""
    video, audio, index = batch(5)
    index[3] = index[1]  # another clip of the same video is no negative
    negatives = (index[:, None] + torch.arange(1, number + 1)) % 30
    criterion = xID(30, 8, **ARGS | {"num_negatives": number}, temperature=0.1, live_targets=True).double()
    monkeypatch.setattr(criterion.nce_average, "sample_negatives", lambda index, k: negatives)
    banks = copy_of_banks(criterion)

    def slow(video, audio):
        losses = []
        video, audio = (torch.stack([row / row.norm() for row in rows]) for rows in (video, audio))
        for queries, targets, bank in ((video, audio, banks["audio"]), (audio, video, banks["video"])):
            for i in range(5):
                neg = [torch.dot(queries[i], bank[k]) / 0.1 for k in negatives[i].tolist()]
                neg += [torch.dot(queries[i], targets[j]) / 0.1 for j in range(5) if index[j] != index[i]]
                losses.append(reference_rince(torch.dot(queries[i], targets[i]) / 0.1, neg, q, 0.05))
        return sum(losses) / len(losses)

    ours = value_and_gradients(lambda v, a: criterion(v, a, index, q=q), video, audio)
    for mine, other in zip(ours, value_and_gradients(slow, video, audio), strict=True):
        assert (mine - other).abs().max() <= 1e-9 * other.abs().max()
    if number == 0:
        cosines = F.normalize(video, dim=1) @ F.normalize(audio, dim=1).T
        assert criterion.stats["neg_cos"] == pytest.approx(cosines[index[:, None] != index].mean().item())
        criterion(video, audio, torch.full_like(index, 3), q=q)  # clips of one video: there are no negatives
        assert criterion.stats["neg_cos"] == 0


@pytest.mark.parametrize("number", [7, 0])
def test_the_cosine_of_negatives_leaves_hard_ones_out_and_live_ones_where_there_are_random_ones(number):
    video, audio, index = batch()
    stats = []
    for n_hard, live in ((None, True), (5, True), (5, number == 0)):
        criterion = xID(30, 8, num_negatives=number, live_targets=live, N_hard=n_hard, s=7, s_prime=3, hard_neg_epoch=0)
        criterion(video, audio, index)
        stats.append(criterion.stats["neg_cos"].item())
    assert stats == pytest.approx([stats[0]] * 3)


def test_without_any_negatives():
    with pytest.raises(UserError, match=r"num_negatives: 0 leaves a query no negatives.*live_targets: true"):
        xID(30, 8, num_negatives=0)


def test_hard_negatives_join_from_their_epoch_on(monkeypatch):
    video, audio, index = batch()
    plain, hard = xID(30, 8, **ARGS).double(), xID(30, 8, **ARGS, **HARD).double()
    assert torch.equal(plain(video, audio, index, epoch=1), hard(video, audio, index, epoch=1))
    sizes = []
    score = hard.rince.forward
    monkeypatch.setattr(hard.rince, "forward", lambda pos, neg, q: sizes.append(neg.shape[1]) or score(pos, neg, q))
    assert hard(video, audio, index, epoch=2) > plain(video, audio, index, epoch=2)
    assert sizes == [7 + 6 + 4] * 2


def test_hard_negatives_are_scored_against_the_other_modality_without_gradient(monkeypatch):
    video, audio, index = batch()
    criterion = xID(30, 8, **ARGS, **HARD).double()
    bank, mixes = criterion.nce_average, {}
    draw = bank.synthetic_negatives

    def record(emb, index, name, *sizes):
        mixes[name] = draw(emb, index, name, *sizes)
        return mixes[name]

    monkeypatch.setattr(bank, "synthetic_negatives", record)
    negatives = (index[:, None] + torch.arange(1, 8)) % 30
    monkeypatch.setattr(bank, "sample_negatives", lambda index, k: negatives)
    banks = copy_of_banks(criterion)

    def with_fixed_mixes(v, a):
        losses = []
        for embeddings, name in ((v, "audio"), (a, "video")):
            for i, query in enumerate(F.normalize(embeddings, dim=1)):
                rows = torch.cat([banks[name][negatives[i]], mixes[name][i]])
                losses.append(reference_rince(banks[name][index[i]] @ query / 0.07, rows @ query / 0.07, 0.1, 0.05))
        return sum(losses) / len(losses)

    ours = value_and_gradients(lambda v, a: criterion(v, a, index, epoch=2), video, audio)
    for mine, other in zip(ours, value_and_gradients(with_fixed_mixes, video, audio), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("n_hard", [None, 0])
def test_no_hard_negatives_whatever_s_and_s_prime(n_hard):
    video, audio, index = batch()
    off, plain = xID(30, 8, **ARGS, N_hard=n_hard, s=6, s_prime=4), xID(30, 8, **ARGS)
    assert torch.equal(off(video, audio, index, epoch=5), plain(video, audio, index, epoch=5))


def test_more_hard_negatives_than_rows_are_refused_at_once():
    with pytest.raises(UserError, match="N_hard"):
        xID(30, 8, N_hard=30)


def test_eval_mode_leaves_bank_and_later_draws_alone():
    video, audio, index = batch()
    plain, looked_at = xID(30, 8, **ARGS), xID(30, 8, **ARGS)
    looked_at.eval()(video, audio, index)
    looked_at.train()
    assert torch.equal(looked_at.nce_average.view1_mem, plain.nce_average.view1_mem)
    assert torch.equal(looked_at(video, audio, index), plain(video, audio, index))
    assert not torch.equal(plain.nce_average.view1_mem, xID(30, 8, **ARGS).nce_average.view1_mem)


def test_float32_under_autocast():
    video, audio, index = batch(dtype=torch.bfloat16)
    hard = {"N_hard": 100, "s": 50, "s_prime": 50}  # so many that bfloat16 would rank them otherwise
    inside, outside = xID(900, 8, **ARGS, **hard), xID(900, 8, **ARGS, **hard)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = inside(video, audio, index, epoch=2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, outside(video.float(), audio.float(), index, epoch=2))
    assert torch.equal(inside.nce_average.view1_mem, outside.nce_average.view1_mem)


@pytest.mark.parametrize("hard", [{}, HARD])
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, hard):
    whole, resumed = xID(30, 8, **ARGS, **hard), xID(30, 8, **ARGS, **hard)
    for step in range(3):
        whole(*batch(seed=step, dtype=torch.float32), epoch=2)
    torch.save(whole.state_dict(), tmp_path / "criterion.pth")
    resumed.load_state_dict(torch.load(tmp_path / "criterion.pth", weights_only=True))
    for step in range(3, 6):
        inputs = batch(seed=step, dtype=torch.float32)
        assert torch.equal(resumed(*inputs, epoch=2), whole(*inputs, epoch=2))
    assert torch.equal(resumed.nce_average.view2_mem, whole.nce_average.view2_mem)


def test_a_published_state_dict_loads():
    criterion, rows = xID(30, 8), F.normalize(torch.randn(2, 30, 8), dim=-1)
    criterion.load_state_dict({"nce_average.view1_mem": rows[0], "nce_average.view2_mem": rows[1]})
    assert torch.equal(criterion.nce_average.view1_mem, rows[0])
    assert torch.equal(criterion.nce_average.view2_mem, rows[1])
    with pytest.raises(RuntimeError, match="view2_mem"):
        criterion.load_state_dict({"nce_average.view1_mem": rows[0]})


def test_q_rises_from_the_first_epoch_to_the_last():
    assert [q_schedule(epoch, 5, 0.0, 0.4) for epoch in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert q_schedule(0, 1, 0.001, 0.4) == 0.001
    video, audio, index = batch()
    for epoch, q in ((0, 0.1), (3, 0.3), (6, 0.5)):
        scheduled, given = xID(30, 8, **ARGS, q_max=0.5, num_epochs=7).eval(), xID(30, 8, **ARGS).eval()
        assert scheduled.q_at(epoch) == pytest.approx(q)
        torch.testing.assert_close(scheduled(video, audio, index, epoch), given(video, audio, index, epoch, q=q))
    assert xID(30, 8, **ARGS, q_max=0.5).q_at(6) == 0.1


def test_stats_tell_alignment_and_collapse():
    criterion = xID(500, 16, num_negatives=200)
    rows = F.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    index = torch.arange(500)
    criterion.nce_average.update(index, rows, rows, momentum=0.0)
    criterion(rows.requires_grad_(), rows, index)
    stats = {name: value.item() for name, value in criterion.stats.items()}
    assert stats["pos_cos"] == pytest.approx(1) and abs(stats["neg_cos"]) < 0.02
    assert stats["video_spread"] == pytest.approx(1, abs=0.03)
    assert not any(value.requires_grad or value.ndim for value in criterion.stats.values())
    same = torch.full((500, 16), 0.25)
    criterion.nce_average.update(index, same, same, momentum=0.0)
    criterion(same, same, index)
    assert criterion.stats["neg_cos"].item() == pytest.approx(1)
    assert criterion.stats["audio_spread"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hard", [{}, HARD, {"live_targets": True}, {"live_targets": True, "num_negatives": 0}])
def test_no_host_sync(no_host_sync, hard):
    video, audio, index = batch(dtype=torch.float32)
    criterion = xID(30, 8, **ARGS | hard)
    with no_host_sync():
        criterion(video.requires_grad_(), audio.requires_grad_(), index, epoch=2).backward()


def test_build_criterion():
    cfg = {"name": "xID", "args": {"num_instances": 50000, "q": 0.2, "N_hard": None, "checkpoint": "run.pth.tar"}}
    criterion = build_criterion(cfg, num_instances=20, embedding_dim=8, num_epochs=3, seed=4)
    assert criterion.nce_average.view1_mem.shape == (20, 8)
    assert [criterion.q_at(epoch) for epoch in range(3)] == pytest.approx([0.2, 0.3, 0.4])
    assert torch.equal(criterion.nce_average.view1_mem, xID(20, 8, seed=4).nce_average.view1_mem)
    assert build_criterion(cfg, embedding_dim=1).nce_average.num_instances == 50000


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"name": "xid"}, r"loss\.name: unknown 'xid'; use xID, VICLoss"),
        ({"name": "xID", "args": {"momentun": 0.5}}, r"loss\.args\.momentun.*did you mean momentum"),
        ({"name": "xID"}, r"loss\.args\.num_instances: missing"),
        ({"name": "xID", "args": {"num_instances": 1}}, "at least 2"),
    ],
)
def test_mistakes_in_the_yaml(cfg, message):
    with pytest.raises(UserError, match=message) as error:
        build_criterion(cfg, embedding_dim=8)
    assert "\n" not in str(error.value)


def train(steps, rank, world_size):
    """Steps of xID on this rank's share of a batch of 8 with duplicates; losses, gradients and the bank."""
    criterion = xID(12, 8, **ARGS, **HARD).double()
    results = []
    for step in range(steps):
        video, audio, index = (part.chunk(world_size)[rank] for part in batch(8, num_instances=12, seed=step))
        results += value_and_gradients(lambda v, a: criterion(v, a, index, epoch=step), video, audio)
    return results, criterion.nce_average.state_dict()


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(train(5, rank, 2), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(run_ranks, tmp_path):
    run_ranks(_worker, 2, str(tmp_path))
    expected, bank = train(5, 0, 1)
    (first, bank_0), (second, bank_1) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for ours_0, ours_1, theirs in zip(first, second, expected, strict=True):
        ours = (ours_0 + ours_1) / 2 if theirs.ndim == 0 else torch.cat([ours_0, ours_1]) / 2
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for name in ("view1_mem", "view2_mem", "_extra_state"):
        assert torch.equal(bank_0[name], bank_1[name])
        torch.testing.assert_close(bank_0[name], bank[name], rtol=0, atol=1e-14)


def recall_at_1(video, audio):
    nearest = (F.normalize(video, dim=1) @ F.normalize(audio, dim=1).T).argmax(dim=1)
    return (nearest == torch.arange(len(video))).double().mean().item()


def test_learns_what_two_views_share():
    """Linear encoders of two views of a shared cause; held-out pairs find each other."""
    generator = torch.Generator().manual_seed(0)
    cause = torch.randn(400, 6, generator=generator)
    views = [cause @ torch.randn(6, 20, generator=generator) for _ in range(2)]
    views = [view + 0.3 * torch.randn(400, 20, generator=generator) for view in views]
    torch.manual_seed(0)
    encoders = torch.nn.Linear(20, 8), torch.nn.Linear(20, 8)
    criterion = xID(300, 8, num_negatives=64, q=0)
    optimizer = torch.optim.Adam([*encoders[0].parameters(), *encoders[1].parameters()], lr=1e-2)
    for _ in range(20):
        for index in torch.randperm(300, generator=generator).split(30):
            loss = criterion(encoders[0](views[0][index]), encoders[1](views[1][index]), index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        recall = recall_at_1(encoders[0](views[0][300:]), encoders[1](views[1][300:]))
    assert recall > 0.3  # chance: 0.01


def test_one_clip_without_negatives_is_refused():
    alone = xID(5, 8, num_negatives=0, live_targets=True)
    with pytest.raises(UserError, match="num_negatives: 0, and a batch, or its part, of one clip"):
        alone(torch.randn(1, 8), torch.randn(1, 8), torch.tensor([2]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_an_index_may_be_of_any_whole_numbers(dtype):
    losses = []
    for index in (torch.tensor([3, 0, 5]), torch.tensor([3, 0, 5], dtype=dtype)):
        torch.manual_seed(0)
        criterion = xID(8, 4, **ARGS)
        losses.append((criterion(torch.randn(3, 4), torch.randn(3, 4), index), criterion.nce_average.view1_mem))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def test_a_builders_arguments_go_before_those_of_the_file():
    cfg = {"name": "xID", "args": {"num_instances": 9, "embedding_dim": 4, "seed": 5, "num_epochs": 11}}
    criterion = build_criterion(cfg)
    assert (criterion.nce_average.seed, criterion.num_epochs, criterion.nce_average.num_instances) == (5, 11, 9)
    criterion = build_criterion(cfg, num_instances=7, num_epochs=3, seed=0)
    assert (criterion.nce_average.seed, criterion.num_epochs, criterion.nce_average.num_instances) == (0, 3, 7)
    with pytest.raises(UserError, match="loss.name: unknown"):
        build_criterion({"name": ["xID"]})


def test_a_temperature_at_which_the_loss_would_overflow_is_refused():
    with pytest.raises(UserError, match=r"temperature: 0.02, with q up to 1: .* of at most 40"):
        xID(30, 8, q=0.0, q_max=1.0, temperature=0.02, num_epochs=10)
    xID(30, 8, q=0.0, q_max=1.0, temperature=0.02)  # q is constant
    scores = torch.full((2, 1), 40.0, requires_grad=True), torch.full((2, 1024), 40.0)
    RINCE(1.0, 0.01)(*scores).backward()
    assert scores[0].grad.square().sum().isfinite()


def test_the_log_says_which_loss_it_is():
    criterion = xID(30, 8, num_epochs=5, temperature=0.2, **ARGS, **HARD)
    said = "positive: its row; negatives: 7 random rows and from epoch 3 on 10 mixed from the 5 nearest rows; "
    assert said + "temperature 0.2; q 0.1 to 0.4" in repr(criterion)
    live = repr(xID(30, 8, num_negatives=0, live_targets=True, q=0.0))
    assert "positive: the clip's other embedding; negatives: the batch; temperature 0.07; q 0 to 0" in live
