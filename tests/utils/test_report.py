"""utils.report curves: the pictures of runs from their metrics alone."""

import json
import sys

import pytest

from tests import tiny
from utils import report
from utils.errors import UserError


@pytest.fixture
def run(tmp_path, make_video):
    """A configuration, and a function that writes the metrics of its run."""
    (tmp_path / "videos").mkdir()
    for i in range(5):
        make_video(tmp_path / "videos" / f"{i}.mp4", seconds=0.4, size=(32, 32))

    def write(*rows: dict) -> None:
        folder = tmp_path / "runs/tiny"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return tiny.write_config(tmp_path, tmp_path / "videos"), write


def retrieval(epoch):
    return {"group": "retrieval", "step": 10 * epoch, "epoch": epoch, "v2a_R@10": 5.0 + epoch, "a2v_R@10": 5.0}


def test_curves_of_a_run(run, tmp_path, monkeypatch, capsys):
    cfg, write = run
    drawn, plot = [], report.plt.Axes.plot

    def record(axes, x, y, *arguments, **options):
        drawn.append((list(x), list(y)))
        return plot(axes, x, y, *arguments, **options)

    monkeypatch.setattr(report.plt.Axes, "plot", record)
    monkeypatch.setattr(sys, "argv", ["report", "curves", str(cfg), "--out", str(tmp_path / "curves.png")])
    train = [{"group": "train", "step": step, "loss": 3.0 / step} for step in (5, 10, 15)]
    write(retrieval(0), *train, retrieval(2))
    report.main()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and "picture: " in capsys.readouterr().out
    assert drawn[0] == ([0.5, 1.0, 1.5], [0.6, 0.3, 0.2])
    assert drawn[1] == ([0, 2], [5.0, 7.0])
    write(retrieval(0))
    with pytest.raises(UserError, match="no held-out retrieval yet"):
        report.main()
    metrics = next(tmp_path.rglob("metrics.jsonl"))
    metrics.write_text(metrics.read_text() + '{"group": "retrie')  # of a run that was killed
    with pytest.raises(UserError, match="no held-out retrieval yet"):
        report.main()
    metrics.unlink()
    with pytest.raises(UserError, match="no such metrics; start the run first"):
        report.main()


def test_a_run_without_sound_has_no_retrieval(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "retrieval", str(tiny.REPO / "configs/VGGSound-VICReg-Video.yaml")])
    with pytest.raises(UserError, match="trains on video alone"):
        report.main()
