"""The frozen encoder, compiled: the same features, and one shape compiled."""

import contextlib

import pytest
import torch
from torch import nn

from datasets.preprocessing import VideoPrep
from models.network_blocks import SpatialConv, SpatialMaxPool
from utils import compiling, frozen
from utils.frozen import FrozenEncoder

CPU = torch.device("cpu")


class Small(nn.Module):
    """A convolution, a pool, their mean, by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = SpatialConv(3, 8), SpatialMaxPool()

    def forward(self, video):
        return {"pool": self.pool(torch.relu(self.conv(video))).mean((2, 3, 4))}


def encoder(compiled_size):
    torch.manual_seed(0)
    return FrozenEncoder(Small(), VideoPrep(), contextlib.nullcontext, CPU, compiled_size=compiled_size)


def test_compiled_features_are_those_of_the_plain_encoder():
    if not compiling.compiles(True, CPU):
        pytest.skip(f"torch.compile does not work here: {compiling.obstacle('cpu')}")
    plain, compiled = encoder(None), encoder(4)
    frames = torch.randint(256, (9, 2, 12, 12, 3), dtype=torch.uint8)
    change = torch.tensor([[1.0, 1.1, 0.9, 1.2, 0.05]]).repeat(9, 1)
    compiled(frames[:4], change[:4])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for part in (slice(0, 4), slice(4, 8), slice(8, 9)):  # a last, smaller part is not compiled anew
            found, expected = compiled(frames[part], change[part]), plain(frames[part], change[part])
            torch.testing.assert_close(found["pool"], expected["pool"], rtol=1e-4, atol=1e-5)
    assert compiled.check() == compiled.hash == plain.hash
    torch.compiler.reset()


@pytest.mark.parametrize(("rank", "share"), [(0, 2), (1, 3)])
def test_a_rank_s_share_of_a_training_batch_is_compiled_too(monkeypatch, rank, share):
    monkeypatch.setattr(frozen, "rank", lambda: rank)
    monkeypatch.setattr(frozen, "world_size", lambda: 2)
    network, sizes = encoder(5), []

    def compiled(clips):
        sizes.append(len(clips))
        return network.extractor.forward(clips)

    network.extractor._compiled_call_impl, network.prepare._compiled_call_impl = compiled, None
    for size in (1, 2, 3, 5):
        frames = torch.zeros(size, 2, 12, 12, 3, dtype=torch.uint8)
        assert len(network.training_features({"frames": frames}, frames.shape[1:])["pool"]) == size
        assert len(network(frames)["pool"]) == size
    assert sizes == [share, 5]


def test_a_batch_without_a_readable_clip_leaves_drifting_statistics(monkeypatch):
    monkeypatch.setattr(frozen, "convert_sync_bn", lambda model: model)  # as on a single GPU
    network = Small()
    network.conv = nn.Sequential(network.conv, nn.BatchNorm3d(8))
    drifting = FrozenEncoder(network, VideoPrep(), contextlib.nullcontext, CPU, drifts=True)
    before = drifting.drift()
    assert drifting.training_features({"failures": [("a.mp4", "no video")]}, (2, 12, 12, 3)) == {}
    assert all(torch.equal(value, before[name]) for name, value in drifting.drift().items())
