"""What a run measures of itself, through the real Monitor, on embeddings made so that the answer is known."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from utils.errors import Preempted
from utils.logger import MetricsWriter
from utils.monitor import Monitor
from utils.precision import Precision


class Same(nn.Module):
    """Embeddings are the network's input; notes whether it is called in autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.video_model = nn.Identity()

    def forward(self, video, audio):
        self.in_autocast = torch.is_autocast_enabled("cpu")
        return self.video_model(video), audio


def test_bf16_is_for_the_forward_pass_alone():
    """Embeddings with much in common: similarities rounded to bf16 would tie, and ties count against the query."""
    generator = torch.Generator().manual_seed(0)
    video = 1 + 0.3 * torch.randn(100, 2, 64, generator=generator)
    audio = video + 0.7 * torch.randn(100, 2, 64, generator=generator)
    unknown = torch.full((100,), -1)
    batch = {"frames": video, "waveform": audio, "index": torch.arange(100), "label": unknown, "failures": []}
    model, device = Same(), torch.device("cpu")

    def prepare(batch):
        assert not torch.is_autocast_enabled("cpu")
        return batch["frames"], batch["waveform"]

    found = Monitor({"monitor_every": 1}, model, prepare, lambda: [batch], Precision("bf16", device)).measure(1)
    assert model.in_autocast

    video, audio = (nn.functional.normalize(x.double(), dim=2) for x in (video, audio))
    cosines = sum(video[:, window] @ audio[:, window].T for window in range(2))
    better = (cosines > cosines.diagonal()[:, None]).sum(1)
    assert 10 < (better < 1).sum() < 90  # neither hopeless nor trivial
    for k in (1, 5, 10):
        assert found[f"v2a_R@{k}"] == pytest.approx((100 * (better < k)).double().mean().item())


def test_a_run_that_is_asked_to_stop_goes_on_to_its_next_step(tmp_path, caplog):
    def stopped():
        raise Preempted("stopped by SIGTERM; run it again to go on")
        yield

    cfg, device = {"monitor_every": 1, "optimizer": {"num_epochs": 3}}, torch.device("cpu")
    writer, model = MetricsWriter(tmp_path), Same()
    Monitor(cfg, model, None, stopped, Precision("fp32", device)).record(writer, 1, 10)
    writer.close()
    assert not (tmp_path / "metrics.jsonl").exists() and "left out, stopped by SIGTERM" in caplog.text
    assert model.training


@pytest.mark.parametrize(("every", "epochs"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2, 3])])
def test_it_is_measured_every_so_many_epochs_and_after_the_last(monkeypatch, every, epochs):
    monkeypatch.setattr(Monitor, "measure", lambda self, epoch: {"R@1": 50.0})
    monitor = Monitor({"monitor_every": every, "optimizer": {"num_epochs": 3}}, None, None, None, None)
    writer = Mock(wrote=Mock(return_value=False))
    for epoch in range(4):
        monitor.record(writer, epoch, 10 * epoch)
    expected = [("retrieval", 10 * epoch, {"epoch": epoch, "R@1": 50.0}) for epoch in epochs]
    assert [call.args for call in writer.write.call_args_list] == expected
