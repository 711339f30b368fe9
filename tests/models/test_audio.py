import pytest
import torch
import torch.nn.functional as F

from models.audio import Conv2DNet
from utils.errors import UserError

BLOCK_STRIDES = {"block1": 2, "block2": 2, "block3": 2, "block4": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain_conv2dnet(state, x):
    """The network by the book, in contiguous memory, with batch statistics in BN."""

    def conv_bn_relu(x, conv, bn, stride):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.relu(F.batch_norm(x, None, None, state[f"{bn}.weight"], state[f"{bn}.bias"], training=True))

    embs = {"conv1": conv_bn_relu(x, "conv1.0", "conv1.1", 2)}
    x = embs["conv1"]
    for block, stride in BLOCK_STRIDES.items():
        x = conv_bn_relu(x, f"{block}.conv1", f"{block}.bn1", stride)
        x = embs[block] = conv_bn_relu(x, f"{block}.conv2", f"{block}.bn2", 1)
    embs["pool"] = F.adaptive_max_pool2d(x, 1)
    return embs


@pytest.mark.parametrize("shape", [(2, 1, 64, 62), (2, 1, 33, 47), (1, 1, 40, 40)])
def test_equals_the_plain_network(shape):
    model = Conv2DNet().double()
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    weights = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    audio = torch.randn(shape, dtype=torch.float64)
    expected = plain_conv2dnet(state, audio)
    found = model(audio, return_embs=True)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected["pool"])
    expected["pool"].backward(direction)
    found["pool"].backward(direction)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-7, atol=1e-7)


def test_features_and_their_shapes():
    model = Conv2DNet()
    audio = torch.randn(2, 1, 128, 125)
    embs = model(audio, return_embs=True)
    assert {name: tuple(emb.shape) for name, emb in embs.items()} == {
        "conv1": (2, 64, 64, 63),
        "block1": (2, 64, 32, 32),
        "block2": (2, 128, 16, 16),
        "block3": (2, 256, 8, 8),
        "block4": (2, 512, 8, 8),
        "pool": (2, model.out_dim, 1, 1),
    }
    assert torch.equal(model(audio), embs["pool"])
    assert all(emb.is_contiguous(memory_format=torch.channels_last) for emb in embs.values())


def test_spectrogram_may_be_a_view_of_any_strides():
    model = Conv2DNet().eval()
    audio = torch.randn(2, 1, 70, 64)
    expected = model(audio.transpose(2, 3).contiguous())
    torch.testing.assert_close(model(audio.transpose(2, 3)), expected)


def test_unknown_depth_is_an_error():
    with pytest.raises(UserError, match="depth 18 of Conv2DNet; use 10"):
        Conv2DNet(depth=18)
