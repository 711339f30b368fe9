import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from models import MODELS, build_model
from models.av_wrapper import Projection
from models.vicreg import Expander
from utils.errors import UserError

BACKBONES = {
    "video_backbone": "R2Plus1d",
    "video_backbone_args": {"depth": 18},
    "audio_backbone": "Conv2DNet",
    "audio_backbone_args": {"depth": 10},
}
XID = {"name": "xid", "arch": "av_wrapper", "args": {"proj_dim": [512, 512, 128], **BACKBONES}}
VICREG = {"name": "vicreg", "arch": "vicreg_wrapper", "args": {"exp_dim": [4096, 4096, 4096], **BACKBONES}}
VICREG_VIDEO = {
    "name": "vicreg-video",
    "arch": "vicreg_v_wrapper",
    "args": {"exp_dim": [4096, 4096, 4096], "video_backbone": "R2Plus1d", "video_backbone_args": {"depth": 18}},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(cfg, **args):
    """The same kind of model with a shallower video network, and narrower heads where `args` says so."""
    cfg = copy.deepcopy(cfg)
    cfg["args"].update({"video_backbone_args": {"depth": 10}, **args})
    return cfg


def bn(name, width):
    return [(f"{name}.{key}", (width,)) for key in ("weight", "bias", "running_mean", "running_var")] + [
        (f"{name}.num_batches_tracked", ())
    ]


def linear(name, n_in, n_out):
    return [(f"{name}.weight", (n_out, n_in)), (f"{name}.bias", (n_out,))]


def video_entries():
    yield from [("video_model.conv1.0.weight", (64, 3, 3, 7, 7)), *bn("video_model.conv1.1", 64)]
    for stage, n_in, n in (("conv2x", 64, 64), ("conv3x", 64, 128), ("conv4x", 128, 256), ("conv5x", 256, 512)):
        for index in (0, 1):
            block = f"video_model.{stage}.{index}"
            first = n if index else n_in
            yield from [(f"{block}.spatial_conv1.weight", (n, first, 1, 3, 3)), *bn(f"{block}.spatial_bn1", n)]
            yield from [(f"{block}.temporal_conv1.weight", (n, n, 3, 1, 1)), *bn(f"{block}.temporal_bn1", n)]
            yield from [(f"{block}.spatial_conv2.weight", (n, n, 1, 3, 3)), *bn(f"{block}.spatial_bn2", n)]
            yield from [(f"{block}.temporal_conv2.weight", (n, n, 3, 1, 1)), *bn(f"{block}.out_bn", n)]
            if first != n:
                yield f"{block}.res_conv.weight", (n, first, 1, 1, 1)


def audio_entries():
    yield from [("audio_model.conv1.0.weight", (64, 1, 7, 7)), *bn("audio_model.conv1.1", 64)]
    for index, n_in, n in ((1, 64, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512)):
        block = f"audio_model.block{index}"
        yield from [(f"{block}.conv1.weight", (n, n_in, 3, 3)), *bn(f"{block}.bn1", n)]
        yield from [(f"{block}.conv2.weight", (n, n, 3, 3)), *bn(f"{block}.bn2", n)]


def projection_entries(name):
    for index, n_in, n_out in ((0, 512, 512), (2, 512, 512), (4, 512, 128)):
        yield from linear(f"{name}.projection.{index}", n_in, n_out)


def expansion_entries(name):
    yield from [*linear(f"{name}.expansion.0", 512, 4096), *bn(f"{name}.expansion.1", 4096)]
    yield from [*linear(f"{name}.expansion.3", 4096, 4096), *bn(f"{name}.expansion.4", 4096)]
    yield from linear(f"{name}.expansion.6", 4096, 4096)


def xid_entries():
    yield from [
        *video_entries(),
        *audio_entries(),
        *projection_entries("video_proj"),
        *projection_entries("audio_proj"),
    ]


def vicreg_entries():
    yield from [*video_entries(), *audio_entries(), *expansion_entries("video_exp"), *expansion_entries("audio_exp")]


def vicreg_video_entries():
    yield from [*video_entries(), *expansion_entries("video_exp")]


def built_entries(cfg):
    with torch.device("meta"):
        model = build_model(cfg)
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


@pytest.mark.parametrize(
    "cfg, expected",
    [(XID, xid_entries), (VICREG, vicreg_entries), (VICREG_VIDEO, vicreg_video_entries)],
    ids=["xid", "vicreg", "vicreg-video"],
)
def test_state_dict_has_the_published_names_shapes_and_order(cfg, expected):
    assert built_entries(cfg) == list(expected())


@pytest.mark.parametrize("cfg, name", [(XID, "state-dict-xid.txt"), (VICREG, "state-dict-vicreg.txt")])
def test_state_dict_is_the_list_of_the_published_checkpoint(cfg, name):
    clips = os.environ.get("AVSSRL_CLIPS")
    if not clips:
        pytest.skip("AVSSRL_CLIPS is not set, so there is no folder of facts beside it")
    path = Path(clips).parent / "facts" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    lines = [f"{key} {'x'.join(map(str, shape))}".rstrip() for key, shape in built_entries(cfg)]
    assert lines == [line.rstrip() for line in path.read_text().splitlines()]


@pytest.mark.parametrize("cfg, width", [(small(XID), 128), (small(VICREG, exp_dim=[96, 96, 64]), 64)])
def test_audio_visual_models_embed_both_streams(cfg, width):
    model = build_model(cfg)
    video_emb, audio_emb = model(torch.randn(3, 3, 4, 32, 32), torch.randn(3, 1, 64, 40))
    assert video_emb.shape == audio_emb.shape == (3, width)
    assert model.out_dim == width
    (video_emb.pow(2).sum() + audio_emb.pow(2).sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    for part in (model.video_model.conv1, model.audio_model.conv1):
        assert part[0].weight.grad.abs().sum() > 0


def test_embeddings_come_from_their_own_stream():
    model = build_model(small(XID)).eval()
    video, audio = torch.randn(2, 3, 2, 32, 32), torch.randn(2, 1, 64, 40)
    video_emb, audio_emb = model(video, audio)
    torch.testing.assert_close(video_emb, model.video_proj.projection(model.video_model(video).reshape(2, 512)))
    torch.testing.assert_close(audio_emb, model.audio_proj.projection(model.audio_model(audio).reshape(2, 512)))


def test_video_only_model_passes_both_clips_through_the_same_network():
    model = build_model(small(VICREG_VIDEO, exp_dim=[96, 96, 64])).eval()
    assert [name for name, _ in model.named_children()] == ["video_model", "video_exp"]
    clip1, clip2 = torch.randn(2, 2, 3, 2, 32, 32)
    emb1, emb2 = model(clip1, clip2)
    assert emb1.shape == (2, 64) and not torch.allclose(emb1, emb2)
    swapped2, swapped1 = model(clip2, clip1)
    torch.testing.assert_close((swapped1, swapped2), (emb1, emb2))


def test_each_clip_has_its_own_batch_statistics():
    model = build_model(small(VICREG_VIDEO, exp_dim=[32, 32]))
    clip1 = torch.randn(3, 3, 2, 32, 32)
    with torch.no_grad():
        alone, _ = model(clip1, clip1)
        beside, _ = model(clip1, 5 + 2 * torch.randn_like(clip1))
    torch.testing.assert_close(beside, alone)


def test_checkpoint_key_is_left_to_the_script():
    assert built_entries(small(XID, checkpoint="some/file.pth.tar")) == built_entries(small(XID))


def test_projection_norm_standardises_each_dimension():
    plain, normed = Projection(16, [24, 24, 8]), Projection(16, [24, 24, 8], proj_norm="bn")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in normed.named_parameters()]
    added = set(normed.state_dict()) - set(plain.state_dict())
    assert added == {f"projection.5.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    out = normed(torch.randn(64, 16))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(dim=0, unbiased=False), torch.ones(8), atol=1e-3, rtol=0)
    assert [type(layer) for layer in plain.projection] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_backbones_and_heads_of_xid_begin_by_he():
    for name, module in build_model(small(XID)).named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            continue
        fan_out = module.weight[:, 0].numel()
        fan = module.in_features if isinstance(module, nn.Linear) else fan_out
        assert module.bias is None or not module.bias.any(), name
        assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05), name


@pytest.mark.parametrize("cfg", [small(VICREG, exp_dim=[32, 32]), small(VICREG_VIDEO, exp_dim=[32, 32])])
def test_backbones_of_vicreg_begin_as_pytorch_makes_them(cfg):
    """From He's weights VICReg had learned nothing of GRID after six epochs."""
    for name, module in build_model(cfg).named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= fan_in**-0.5, name
            assert module.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05), name


@pytest.mark.parametrize("init, scale", [("he", 2**0.5), ("pytorch", 3**-0.5)])
def test_first_weights_can_be_chosen(init, scale):
    model = build_model(small(VICREG, exp_dim=[32, 32], backbone_init=init))
    for weight in (model.video_model.conv5x.spatial_conv2.weight, model.audio_model.block4.conv2.weight):
        assert weight.std().item() == pytest.approx(scale * weight[0].numel() ** -0.5, rel=0.25)
    with pytest.raises(UserError, match="model.args.backbone_init: unknown 'xavier'; use he or pytorch"):
        build_model(small(VICREG, exp_dim=[32, 32], backbone_init="xavier"))


class Pretrained(nn.Module):
    """A user's own backbone, that comes with weights."""

    def __init__(self):
        super().__init__()
        self.out_dim = 4
        self.conv = nn.Conv2d(1, 4, 3)
        nn.init.ones_(self.conv.weight)


def test_a_backbone_of_ones_own_keeps_its_weights(monkeypatch):
    monkeypatch.setitem(MODELS["audio_backbone"], "Pretrained", Pretrained)
    model = build_model(small(XID, audio_backbone="Pretrained", audio_backbone_args={}))
    assert (model.audio_model.conv.weight == 1).all()
    mixed = build_model(small(XID, audio_backbone="Pretrained", audio_backbone_args={}, backbone_init="pytorch"))
    assert (mixed.audio_model.conv.weight == 1).all()
    monkeypatch.setitem(MODELS["video_backbone"], "Pretrained", Pretrained)
    own = {"audio_backbone": "Pretrained", "audio_backbone_args": {}, "video_backbone": "Pretrained"}
    with pytest.raises(UserError, match=r"backbone_init: no backbone \(Pretrained, Pretrained\) takes an `init`"):
        build_model(small(XID, **own, video_backbone_args={}, backbone_init="he"))


def test_embeddings_of_an_expander_begin_small():
    """From a standard deviation near one VICReg takes twice as long until anything is learned."""
    for widths in ([1024, 1024, 256], [512, 512, 512]):
        expander = Expander(512, widths)
        for layer in expander.expansion[::3]:
            for values in (layer.weight, layer.bias):
                assert values.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.2)
        out = expander(torch.randn(256, 512).relu())
        assert 0.25 < out.std(dim=0).mean() < 0.45


@pytest.mark.parametrize("cfg", [small(XID, proj_norm="bn"), small(VICREG, exp_dim=[32, 32, 32])])
def test_sync_bn_conversion_keeps_names_and_converts_every_bn(cfg):
    model = build_model(cfg)
    names = list(model.state_dict())
    num_bn = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(converted.state_dict()) == names
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == num_bn > 20
    video_emb, _ = converted.eval()(torch.randn(2, 3, 2, 32, 32), torch.randn(2, 1, 64, 40))
    assert torch.isfinite(video_emb).all()


def test_weights_follow_the_state_dict_whatever_its_memory_format():
    torch.manual_seed(1)
    source, target = build_model(small(XID)).eval(), build_model(small(XID)).eval()
    target.load_state_dict({name: value.contiguous() for name, value in source.state_dict().items()})
    inputs = torch.randn(2, 3, 2, 32, 32), torch.randn(2, 1, 64, 40)
    torch.testing.assert_close(target(*inputs), source(*inputs))
    assert target.video_model.conv2x.spatial_conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_compiled_model_has_no_graph_breaks():
    model = build_model(small(VICREG, exp_dim=[32, 32, 32])).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = torch.randn(2, 3, 2, 32, 32), torch.randn(2, 1, 64, 40)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"arch": "av_wraper"}, ["model.arch", "'av_wraper'", "vicreg_v_wrapper", "did you mean av_wrapper?"]),
        ({"arch": None}, ["model.arch", "None", "av_wrapper"]),
        ({"video_backbone": "R2plus1d"}, ["model.args.video_backbone", "'R2plus1d'", "did you mean R2Plus1d?"]),
        ({"audio_backbone": "ResNet"}, ["model.args.audio_backbone", "'ResNet'", "use Conv2DNet"]),
        ({"video_backbone_args": {"depth": 50}}, ["depth", "50", "10, 18, 34"]),
        ({"video_backbone_args": {"dept": 18}}, ["video_backbone_args.dept", "did you mean depth?"]),
        ({"audio_backbone_args": {"depth": 18}}, ["depth", "18", "use 10"]),
        ({"proj_dims": [512]}, ["model.args.proj_dims", "did you mean proj_dim?"]),
        ({"proj_dim": 128}, ["model.args.proj_dim", "128", "list"]),
        ({"proj_dim": [512, 0]}, ["model.args.proj_dim", "[512, 0]"]),
        ({"proj_norm": "batch"}, ["model.args.proj_norm", "'batch'", "null or bn"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_value_and_the_allowed_ones(change, words):
    cfg = small(XID)
    (cfg if "arch" in change else cfg["args"]).update(change)
    with pytest.raises(UserError) as error:
        build_model(cfg)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_head_widths_are_an_error():
    cfg = small(VICREG)
    del cfg["args"]["exp_dim"]
    with pytest.raises(UserError, match="model.args.exp_dim: missing, VICRegWrapper needs it"):
        build_model(cfg)
