"""python3 -m utils.benchmark scaling: real processes, and the bytes that they exchange."""

import json
import subprocess
import sys

import pytest
from torch.nn.modules.batchnorm import _BatchNorm

from models import build_model
from tests.tiny import ENV, REPO
from utils.config import load_config


def scaling(*words, status=0):
    full = [sys.executable, "-m", "utils.benchmark", "scaling", *map(str, words)]
    done = subprocess.run(full, capture_output=True, text=True, env=ENV, cwd=REPO, timeout=200)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_bytes_are_those_of_the_gradients_the_gathered_batch_and_bn_s_moments(tmp_path):
    cfg, file = REPO / "configs/demo/vicreg.yaml", tmp_path / "a.json"
    sizes = ("--procs", 2, "--batch-size", 2, "--crop", 32, "--steps", 1, "--rounds", 1)
    told = scaling(cfg, *sizes, "--set", "gradient_compression=bf16", "--json", file).stdout
    assert "only the bytes mean something" in told
    (two,) = json.loads(file.read_text())["rows"]
    assert two["processes"] == 2
    model = build_model(load_config(cfg)["model"])
    parameters = sum(p.numel() for p in model.parameters())
    channels = 8 * sum(bn.num_features for bn in model.modules() if isinstance(bn, _BatchNorm))  # float64 on a CPU
    embeddings = 4 * 512 * 4  # of the whole batch, float32: gathered forward, their gradients summed backward
    assert two["payload"]["allreduce"] == 2 * parameters + 2 * embeddings + 2 * channels
    assert two["payload"]["allgather"] == 2 * embeddings + 2 * 3 * channels
    assert two["wire"] == pytest.approx(two["payload"]["allreduce"] + two["payload"]["allgather"] / 2)
