"""The benchmark of a whole training: what it reports is what was measured, for each kind of run."""

import json
import sys

import pytest

import datasets
from tests import tiny
from utils.benchmark import __main__ as benchmark
from utils.errors import UserError


@pytest.mark.parametrize("script", tiny.LOSSES)
def test_loader_and_step_alone_and_together(tmp_path, videos, script, monkeypatch, capsys):
    staged = script == "main-vicreg.py"
    if staged:  # as on a GPU; a step on the CPU is also done with a batch before it asks for the next
        monkeypatch.setattr(datasets, "_staged", lambda device, batch_bytes: batch_bytes)
    out = {name: tmp_path / f"{name}.json" for name in ("figures", "trace")}
    words = ["training", tiny.write_config(tmp_path, videos, script=script), "--steps", 6, "--png", tmp_path / "a.png"]
    words += ["--json", out["figures"], "--trace", out["trace"]]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words)])
    benchmark.main()
    told, found = capsys.readouterr().out, json.loads(out["figures"].read_text())
    rates, steps = found["clips_per_s"], found["steps"]
    assert set(rates) == {"step", "loader", "both"} | ({"loader, not staged"} if staged else set())
    assert min(rates.values()) > 0
    assert rates[found["slower"]] == min(rates["step"], rates["loader"])
    assert f"the slower one: the {found['slower']}" in told and "1 workers, batch 4" in told
    assert len(steps) == 6 and 0 <= found["wait_share"] < 1
    for step, following in zip(steps, steps[1:], strict=False):
        assert step["asked"] <= step["there"] <= step["queued"] <= following["asked"]
        assert step["begun"] < step["done"]
    assert steps[-1]["queued"] == pytest.approx(6 * 4 / rates["both"], rel=0.05)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(out["trace"].read_text())["traceEvents"]
    assert not (tmp_path / "runs").exists()


def test_parts_of_a_batch_are_counted_as_what_they_are(tmp_path, videos, monkeypatch, capsys):
    words = ["training", tiny.write_config(tmp_path, videos), "--steps", 2, "--json", tmp_path / "a.json"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words), "--set", "accumulate=2"])
    benchmark.main()
    found = json.loads((tmp_path / "a.json").read_text())
    assert "batch 2, " in capsys.readouterr().out
    seconds = found["steps"][-1]["queued"]
    assert 2 * 2 / seconds == pytest.approx(found["clips_per_s"]["both"], rel=0.1)


def test_videos_that_cannot_be_read_end_it(tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    for i in range(10):
        (tmp_path / "videos" / f"{i}.mp4").write_text("no video")
    words = ["training", str(tiny.write_config(tmp_path, tmp_path / "videos"))]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    with pytest.raises(UserError, match=r"no video could be read.*\.mp4: asked for: open"):
        benchmark.main()
