"""models.classifiers: pooling from a fixed set, several features, dropout that does not ask how many processes run.

And models.linear_probe.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.classifiers import ClassificationWrapper, FeatureExtractor, MOSTWrapper, build_pooling
from models.linear_probe import LinearProbe
from models.video import R2Plus1d
from utils.errors import UserError


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return R2Plus1d(10).eval()


@pytest.mark.parametrize(
    ("text", "kind", "shape"),
    [
        (None, nn.Identity, (2, 8, 4, 6, 6)),
        ("AdaptiveMaxPool3d((1, 1, 1))", nn.AdaptiveMaxPool3d, (2, 8, 1, 1, 1)),
        ("AdaptiveAvgPool3d(1)", nn.AdaptiveAvgPool3d, (2, 8, 1, 1, 1)),
        ("nn.AdaptiveMaxPool3d((2,1,1))", nn.AdaptiveMaxPool3d, (2, 8, 2, 1, 1)),
        ("torch.nn.MaxPool3d((1, 3, 3))", nn.MaxPool3d, (2, 8, 4, 2, 2)),
        ("AvgPool3d(2)", nn.AvgPool3d, (2, 8, 2, 3, 3)),
    ],
)
def test_pooling_by_name(text, kind, shape):
    pool = build_pooling(text)
    assert type(pool) is kind and pool(torch.randn(2, 8, 4, 6, 6)).shape == shape


@pytest.mark.parametrize(
    "text",
    ["", "Linear(3)", "AdaptiveMaxPool3d", "AdaptiveMaxPool3d((1, 1))", "AvgPool3d(0)", "print(1)", "AvgPool3d(x)"],
)
def test_other_pooling_is_refused(text):
    with pytest.raises(UserError, match="pooling"):
        build_pooling(text)


def test_features_by_name_and_their_widths(backbone):
    video = torch.randn(2, 3, 4, 32, 32)
    extractor = FeatureExtractor(
        backbone, ["pool", "conv5x", "conv5x"], [None, None, "AdaptiveAvgPool3d(1)"], [512, 512, 512]
    )
    features = extractor(video)
    assert list(features) == ["pool", "conv5x", "conv5x-2"]
    embs = backbone(video, return_embs=True)
    torch.testing.assert_close(features["pool"], embs["pool"].flatten(1))
    torch.testing.assert_close(features["conv5x-2"], embs["conv5x"].mean((2, 3, 4)))
    with pytest.raises(UserError, match=r"64 for feature pool, which has 512 values a clip; set it .* leaves 512$"):
        FeatureExtractor(backbone, ["pool"], feat_dims=[64])(video)
    with pytest.raises(UserError, match=r"256 for feature conv4x, which has 1024 values .* leaves 256$"):
        FeatureExtractor(backbone, ["conv4x"], feat_dims=[256]).check((4, 32, 32, 3))
    with pytest.raises(UserError, match="no feature 'conv9'"):
        FeatureExtractor(backbone, ["conv9"])(video)
    with pytest.raises(UserError, match="feat_dims: 2 values for 3 feat_names"):
        FeatureExtractor(backbone, ["pool", "conv4x", "conv5x"], feat_dims=[512, 256])


def test_too_little_memory_is_no_mistake_in_the_pooling(backbone):
    def hungry(feature):
        raise torch.OutOfMemoryError("CUDA out of memory")

    extractor = FeatureExtractor(backbone, ["conv5x"], ["AvgPool3d(1)"])
    extractor.pools[0].forward = hungry
    with pytest.raises(torch.OutOfMemoryError):
        extractor(torch.randn(1, 3, 4, 32, 32))


def test_linear_classifiers_normalise_as_asked():
    torch.manual_seed(0)
    names = ["plain", "unit", "bn"]
    probe = MOSTWrapper(names, 3, [8], use_bn=[False, False, True], l2_norm=[False, True, None])
    features = {name: 5 * torch.randn(6, 8) + 2 for name in names}
    logits = probe.train()(features)
    bn = (features["bn"] - features["bn"].mean(0)) / (features["bn"].var(0, unbiased=False) + 1e-5).sqrt()
    inputs = {"plain": features["plain"], "unit": F.normalize(features["unit"], dim=1), "bn": bn}
    for name, x in inputs.items():
        linear = probe.classifiers[name].classifier
        torch.testing.assert_close(logits[name], x @ linear.weight.T + linear.bias, atol=1e-4, rtol=1e-4)
    assert not list(probe.classifiers["bn"].bn.parameters())
    alone = probe({name: value[:1] for name, value in features.items()})  # a batch of one has no variance
    assert torch.isfinite(alone["bn"]).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe(features)["plain"].dtype == torch.float32


def test_dropout_of_a_batch_hangs_on_its_key_alone(backbone):
    model = ClassificationWrapper(backbone, 4, use_dropout=True, dropout=0.25)
    keep = model.draw_dropout(1000, (0, 3, 7))
    assert torch.equal(keep, model.draw_dropout(1000, (0, 3, 7)))
    assert not torch.equal(keep, model.draw_dropout(1000, (0, 3, 8)))
    assert keep.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs((keep == 0).float().mean().item() - 0.25) < 0.01
    video = torch.randn(2, 3, 4, 32, 32)
    dropped = model(video, keep[:2])
    torch.testing.assert_close(dropped, model.head(backbone(video).flatten(1) * keep[:2]))
    without = ClassificationWrapper(backbone, 4, use_dropout=False, dropout=0.25)
    assert torch.equal(without.draw_dropout(3, (0,)), torch.ones(3, 512))


def linear_probe(base_lr=0.1, other_lrs=(0.1, 0.03), names=("pool",), **args):
    lr = {"name": "multistep", "base_lr": base_lr, "gamma": 0.5, "milestones": [1], "warmup_epochs": 0}
    optimizer = {"name": "sgd", "weight_decay": 0.0, "betas": [0.0, 0.9], "lr": lr, "other_lrs": other_lrs}
    args = {"feat_dims": [8], "use_bn": [False], "l2_norm": [False], "use_dropout": False, "dropout": 0.5} | args
    cfg = {"seed": 3, "optimizer": optimizer, "model": {"args": args}}
    return LinearProbe(cfg, names, 3, torch.device("cpu"))


def test_linear_probes_start_alike_and_each_trains_at_its_own_rate():
    probe, features, labels = linear_probe(), {"pool": torch.randn(6, 8)}, torch.arange(6) % 3
    weights = {rate: head.classifiers["pool"].classifier.weight for rate, head in probe.heads.items()}
    assert list(weights) == [0.1, 0.03] and torch.equal(weights[0.1], weights[0.03])
    before = weights[0.1].detach().clone().requires_grad_()
    bias = probe.heads[0.1].classifiers["pool"].classifier.bias.detach().clone()
    loss = F.cross_entropy(features["pool"] @ before.T + bias, labels)
    (gradient,) = torch.autograd.grad(loss, before)
    losses = probe.step(features, labels, epoch=1, progress=0.0)
    assert losses == {"loss pool 0.1": pytest.approx(loss.item()), "loss pool 0.03": pytest.approx(loss.item())}
    for rate, weight in weights.items():
        torch.testing.assert_close(weight, before - rate / 2 * gradient)


def test_a_feature_trains_its_classifier_as_it_would_alone():
    features, labels = {"pool": torch.randn(6, 8), "conv5x": torch.randn(6, 8)}, torch.arange(6) % 3
    both, alone = (linear_probe(names=names) for names in (("pool", "conv5x"), ("pool",)))
    for probe in (both, alone):
        probe.step({name: features[name] for name in probe.heads[0.1].classifiers}, labels, epoch=0, progress=0.0)
    for rate, head in alone.heads.items():
        expected = head.classifiers["pool"].classifier.weight
        torch.testing.assert_close(both.heads[rate].classifiers["pool"].classifier.weight, expected)


def test_a_linear_probe_drops_features_in_training_alone():
    torch.manual_seed(0)
    probe, features, labels = linear_probe(use_dropout=True), torch.randn(6, 8), torch.arange(6) % 3
    found = probe.logits({"pool": features.view(3, 2, 8)})
    losses = probe.step({"pool": features}, labels, epoch=0, progress=0.0)
    fresh = linear_probe().heads[0.1].classifiers["pool"].classifier(features)
    for rate, logits in found.items():
        torch.testing.assert_close(logits["pool"], fresh.view(3, 2, 3).detach())
        assert losses[f"loss pool {rate:g}"] != pytest.approx(F.cross_entropy(fresh, labels).item(), rel=1e-3)


def test_other_rates_change_nothing_in_a_rate_s_result_with_dropout():
    features, labels = torch.randn(4, 6, 8), torch.arange(6) % 3

    def trained(base_lr, *other_lrs):
        probe = linear_probe(base_lr, other_lrs, use_dropout=True)
        torch.manual_seed(7)
        losses = [probe.step({"pool": x}, labels, 0, 0.0) for x in features]
        return probe.heads, losses

    together, losses = trained(0.1, 0.03, 0.3)
    for rate in (0.1, 0.03, 0.3):
        alone, own_losses = trained(rate)
        name = f"loss pool {rate:g}"
        assert [step[name] for step in losses] == [step[name] for step in own_losses]
        for found, expected in zip(together[rate].parameters(), alone[rate].parameters(), strict=True):
            assert torch.equal(found, expected)
