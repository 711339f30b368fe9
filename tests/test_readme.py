"""The Python in README, as a reader would run it."""

import re

import torch

from models import build_model
from tests.tiny import REPO
from utils.config import load_config


def test_the_encoder_in_code_of_ones_own(tmp_path, make_video, monkeypatch):
    monkeypatch.chdir(REPO)
    code = re.search(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)[1]
    model = build_model(load_config("configs/VGGSound-N1024.yaml")["model"])
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "c.tar")
    make_video(tmp_path / "a.mp4", seconds=4.5)
    found = {}
    exec(code.replace("checkpoint.pth.tar", f"{tmp_path}/c.tar").replace("video.mp4", f"{tmp_path}/a.mp4"), found)
    assert found["frames"].shape == (16, 224, 224, 3) and found["features"].shape == (1, 512)
    weights = found["encoder"].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.video_model.state_dict().items())
