import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.network_blocks import StemConv
from models.video import R2Plus1d
from utils.errors import UserError

STAGES = ("conv2x", "conv3x", "conv4x", "conv5x")
SHAPES = {
    "even": (2, 3, 4, 40, 40),
    "odd": (2, 3, 5, 33, 47),
    "one clip": (1, 3, 5, 33, 47),
    "one frame": (2, 3, 1, 40, 56),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def conv_bn_relu(state, x, conv, bn, training, stride=(1, 1, 1)):
    weight = state[f"{conv}.weight"]
    x = F.conv3d(x, weight, stride=stride, padding=[k // 2 for k in weight.shape[2:]])
    return bn_relu(state, x, bn, training)


def bn_relu(state, x, bn, training):
    mean, var = state[f"{bn}.running_mean"].clone(), state[f"{bn}.running_var"].clone()
    return F.relu(F.batch_norm(x, mean, var, state[f"{bn}.weight"], state[f"{bn}.bias"], training))


def plain_block(state, x, block, stride, training):
    residual = F.conv3d(x, state[f"{block}.res_conv.weight"], stride=stride) if stride == 2 else x
    stride_hw, stride_t = (1, stride, stride), (stride, 1, 1)
    x = conv_bn_relu(state, x, f"{block}.spatial_conv1", f"{block}.spatial_bn1", training, stride_hw)
    x = conv_bn_relu(state, x, f"{block}.temporal_conv1", f"{block}.temporal_bn1", training, stride_t)
    x = conv_bn_relu(state, x, f"{block}.spatial_conv2", f"{block}.spatial_bn2", training)
    x = F.conv3d(x, state[f"{block}.temporal_conv2.weight"], padding=(1, 0, 0))
    return bn_relu(state, x + residual, f"{block}.out_bn", training)


def plain_r2plus1d(state, x, training):
    """R(2+1)D-18 written with 3D convolutions, in whatever memory format `x` has."""
    x = conv_bn_relu(state, x, "conv1.0", "conv1.1", training, (1, 2, 2))
    embs = {"conv1": F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))}
    x = embs["conv1"]
    for name in STAGES:
        for index in range(2):
            stride = 2 if index == 0 and name != "conv2x" else 1
            x = plain_block(state, x, f"{name}.{index}", stride, training)
        embs[name] = x
    embs["pool"] = F.adaptive_max_pool3d(x, 1)
    return embs


def random_bn(model):
    """Give BN weights, biases and running statistics other than their initial ones and zeros."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.3, 0.3)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare_with_plain(shape, dtype, training, tolerance):
    """The largest relative error of a gradient; those of the features are within `tolerance`."""
    model = R2Plus1d(18).to(dtype).train(training)
    random_bn(model)
    video = torch.randn(shape, dtype=dtype)
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    weights = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}

    expected_input, found_input = video.clone().requires_grad_(), video.clone().requires_grad_()
    expected = plain_r2plus1d(state, expected_input, training)
    found = model(found_input, return_embs=True)
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape
        assert relative_error(found[name], expected[name]) < tolerance, name

    direction = torch.randn_like(expected["pool"])
    expected["pool"].backward(direction)
    found["pool"].backward(direction)
    errors = [relative_error(parameter.grad, weights[name].grad) for name, parameter in model.named_parameters()]
    return max(*errors, relative_error(found_input.grad, expected_input.grad))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_3d_network_in_float64(shape, training):
    assert compare_with_plain(shape, torch.float64, training, tolerance=1e-10) < 1e-10


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_3d_network_in_float32(shape):
    """Whose rounding is each processor's own: an activation near 0 may pass ReLU in one form alone, for some seed."""
    for seed in range(3):
        torch.manual_seed(seed)
        if compare_with_plain(shape, torch.float32, training=False, tolerance=1e-5) < 1e-5:
            return
    pytest.fail("the gradients of three networks differ")


def test_running_statistics_are_updated_in_training_only():
    model = R2Plus1d(10)
    before = model.conv1[1].running_mean.clone()
    model.eval()(torch.randn(2, 3, 2, 32, 32))
    assert torch.equal(model.conv1[1].running_mean, before)
    model.train()(torch.randn(2, 3, 2, 32, 32))
    assert not torch.equal(model.conv1[1].running_mean, before)
    assert model.conv5x.out_bn.num_batches_tracked == 1


@pytest.mark.parametrize("depth, blocks", [(10, [1, 1, 1, 1]), (18, [2, 2, 2, 2]), (34, [3, 4, 6, 3])])
def test_depth_sets_the_blocks_and_their_names(depth, blocks):
    with torch.device("meta"):
        names = set(dict(R2Plus1d(depth).named_parameters()))
    for stage, count in zip(STAGES, blocks, strict=True):
        spatial = {name for name in names if name.startswith(stage) and name.endswith("spatial_conv1.weight")}
        indices = [""] if depth == 10 else [f"{i}." for i in range(count)]
        assert spatial == {f"{stage}.{index}spatial_conv1.weight" for index in indices}


def test_features_and_their_shapes():
    model = R2Plus1d(10)
    video = torch.randn(2, 3, 8, 64, 96)
    embs = model(video, return_embs=True)
    assert {name: tuple(emb.shape) for name, emb in embs.items()} == {
        "conv1": (2, 64, 8, 16, 24),
        "conv2x": (2, 64, 8, 16, 24),
        "conv3x": (2, 128, 4, 8, 12),
        "conv4x": (2, 256, 2, 4, 6),
        "conv5x": (2, 512, 1, 2, 3),
        "pool": (2, model.out_dim, 1, 1, 1),
    }
    assert torch.equal(model(video), embs["pool"])


class CopiedShapes(TorchDispatchMode):
    """Collect the shapes of tensors that are copied from one memory layout to another."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy"):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(2, 3, 8, 56, 56), (1, 3, 8, 16, 16), (3, 3, 1, 16, 16), (2, 3, 8, 32, 16)])
def test_no_activation_is_copied(shape):
    model = R2Plus1d(18)
    video = torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
    if shape == (1, 3, 8, 16, 16):
        model.eval()  # one value a channel is left, of which BN cannot take statistics
    with CopiedShapes() as copied:
        embs = model(video, return_embs=True)
        embs["pool"].sum().backward()
    stem = model.conv1[0].weight.numel()
    assert all(torch.Size(shape).numel() == stem for shape in copied.shapes), copied.shapes
    for name, emb in embs.items():
        assert emb.is_contiguous(memory_format=torch.channels_last_3d), name
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_input_in_another_layout_is_converted_once():
    model = R2Plus1d(10).eval()
    video = torch.randn(2, 3, 4, 32, 40)
    with CopiedShapes() as copied:
        model(video)
    assert copied.shapes.count(tuple(video.shape)) == 1
    assert len(copied.shapes) == 2  # the video, and the stem's weight


def test_compiles_without_graph_breaks():
    model = R2Plus1d(10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    video = torch.randn(2, 3, 4, 32, 32)
    model.eval()
    expected = model(video)
    found = compiled(video)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert torch.isfinite(model.conv1[0].weight.grad).all()
    torch.compiler.reset()


@pytest.mark.parametrize("group", [4, 8])
def test_a_stem_with_channels_of_zeros_is_the_same(group, monkeypatch):
    stem = StemConv(3, 16, kernel_size=7, stride=2).double()
    video, results = torch.randn(2, 3, 5, 20, 24, dtype=torch.float64), []
    for multiple in (1, group):
        monkeypatch.setattr(StemConv, "_channel_group", staticmethod(lambda x, multiple=multiple: multiple))
        inputs = video.clone().requires_grad_()
        found = stem(inputs)
        found.square().sum().backward()
        results.append((found.detach(), inputs.grad, stem.weight.grad))
        stem.weight.grad = None
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-10, atol=1e-10)
        assert padded.stride() == plain.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_after_the_stems_pool_gives_the_bits_of_relu_before_it(dtype):
    """Large shifts in both directions: windows without a positive value, and in bf16 windows with equal ones."""
    stem = R2Plus1d(depth=10).conv1.to(dtype)
    stem[1].bias.data = torch.randn_like(stem[1].bias) * 2
    x, target = torch.randn(2, 3, 4, 33, 40).to(dtype), torch.randn(2, 64, 4, 9, 10).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    found = []
    for forward in (stem, lambda x: stem[2](stem[1](stem[0](x)).relu())):
        stem.zero_grad()
        y = forward(x)
        (y * target).sum().backward()
        found.append([y, *(parameter.grad for parameter in stem.parameters())])
    assert 0.1 < (found[0][0] == 0).float().mean() < 0.9
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_runs_under_bf16_autocast():
    model = R2Plus1d(10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(torch.randn(2, 3, 4, 32, 32))
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_pool_is_the_global_maximum():
    embs = R2Plus1d(10)(torch.randn(2, 3, 4, 40, 40), return_embs=True)
    expected = embs["conv5x"].flatten(2).max(dim=2).values
    assert torch.equal(embs["pool"].flatten(1), expected)


@pytest.mark.parametrize("depth", [50, "18", [18], None])
def test_unknown_depth_is_an_error_with_the_allowed_ones(depth):
    with pytest.raises(UserError, match="depth.*10, 18, 34"):
        R2Plus1d(depth)
