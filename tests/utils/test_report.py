"""utils.report curves: the pictures of runs from their metrics alone."""

import json
import shutil
import sys

import pytest
import torch

from tests import tiny
from utils import checkpoint, report
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
    train = [
        {"group": "train", "step": step, "epoch": epoch, "loss": 3.0 / step}
        for step, epoch in ((5, 0), (10, 0), (15, 1))
    ]
    write(retrieval(0), *train, retrieval(2))
    report.main()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and "picture: " in capsys.readouterr().out
    assert drawn[0] == ([0.5, 1.0, 1.5], [0.6, 0.3, 0.2])
    assert drawn[1] == ([0, 2], [5.0, 7.0])
    changed = [*sys.argv, "--set", "model.name=another"]
    monkeypatch.setattr(sys, "argv", changed)
    with pytest.raises(UserError, match="another: no such|another/metrics.jsonl: no such"):
        report.main()
    monkeypatch.setattr(sys, "argv", changed[:-2])
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


def test_a_run_has_one_colour(run, tmp_path, monkeypatch):
    cfg, write = run
    drawn, plot = [], report.plt.Axes.plot

    def record(axes, *arguments, **options):
        lines = plot(axes, *arguments, **options)
        drawn.append((lines[0].get_color(), lines[0].get_linestyle()))
        return lines

    monkeypatch.setattr(report.plt.Axes, "plot", record)
    write(retrieval(0), {"group": "train", "step": 5, "epoch": 0, "loss": 3.0}, retrieval(1))
    other = tiny.write_config(tmp_path, tmp_path / "videos", name="other")
    shutil.copytree(tmp_path / "runs/tiny", tmp_path / "runs/other")
    monkeypatch.setattr(sys, "argv", ["report", "curves", str(cfg), str(other), "--out", str(tmp_path / "curves.png")])
    report.main()
    assert drawn == [("C0", "-"), ("C0", "-"), ("C0", "--"), ("C1", "-"), ("C1", "-"), ("C1", "--")]


def test_a_run_without_sound_has_no_retrieval(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "retrieval", str(tiny.REPO / "configs/VGGSound-VICReg-Video.yaml")])
    with pytest.raises(UserError, match="trains on video alone"):
        report.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_video):
    """A run without monitoring on six videos, four to train on, in two copies of one name."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "videos").mkdir()
    for i in range(6):
        make_video(folder / "videos" / f"{i}.mp4", seconds=0.6, size=(32, 32))
    (folder / "videos/labels.csv").write_text("name,label\n0.mp4,a\n1.mp4,a\n2.mp4,b\n")  # 0 and 5 are held out
    changes = {"optimizer__num_epochs": 1, "dataset__train__clips_per_video": 1}
    cfg = tiny.write_config(folder, folder / "videos", **changes)
    tiny.run(cfg)
    other = tiny.write_config(folder, folder / "videos", "other", model__model_dir=str(folder / "more"), **changes)
    other.write_text(other.read_text().replace("name: other", "name: tiny"))
    shutil.copytree(folder / "runs/tiny", folder / "more/tiny")
    return folder, cfg, other


def show(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    report.main()


def test_demo_without_labels_and_without_monitoring(trained, monkeypatch, capsys, tmp_path):
    folder, cfg, other = trained
    show(monkeypatch, "demo", cfg, other, "--out", tmp_path / "demo.png")
    lines = capsys.readouterr().out.splitlines()
    names = [f"tiny ({folder}/{place}/tiny)" for place in ("runs", "more")]
    assert "2 held-out videos" in "".join(lines)
    for name in ("chance", *names):
        (line,) = (line for line in lines if line.startswith(name + "  "))
        assert line.endswith(" -")  # kNN: no labels
    assert (tmp_path / "demo.png").stat().st_size > 20_000


def test_demo_of_a_published_checkpoint(trained, monkeypatch, capsys, tmp_path):
    """Where README says to put it; it has no audio statistics, and the names that DDP gives."""
    folder, cfg, _ = trained
    ours = checkpoint.load(folder / "runs/tiny/checkpoint.pth.tar")
    theirs = {"model": {f"module.{name}": value for name, value in ours["model"].items()}, "epoch": 100}
    (folder / "runs/theirs").mkdir()
    torch.save(theirs, folder / "runs/theirs/checkpoint.pth.tar")
    published = tmp_path / "theirs.yaml"
    published.write_text(cfg.read_text().replace("name: tiny", "name: theirs"))
    show(monkeypatch, "demo", published, "--out", tmp_path / "demo.png")
    assert "theirs untrained" in capsys.readouterr().out


@pytest.mark.parametrize("only_some", [True, False])
def test_demo_with_few_labels(trained, monkeypatch, capsys, tmp_path, only_some):
    folder, cfg, _ = trained
    labels = folder / "videos/all.csv"
    labels.write_text("name,label\n" + "".join(f"{i}.mp4,{'ab'[i % 2]}\n" for i in range(0, 6, 1 + only_some)))
    text = cfg.read_text().replace("name: folder", "name: folder\n  labels: all.csv\n  label_column: label")
    some = tmp_path / "some.yaml"
    some.write_text(text)
    show(monkeypatch, "demo", some, "--out", tmp_path / "demo.png")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny  "))
    assert line.endswith(" -")  # four training videos at most: fewer than five neighbours


def test_what_cannot_be_compared(trained, monkeypatch, tmp_path):
    _, cfg, other = trained
    with pytest.raises(UserError, match="given twice"):
        show(monkeypatch, "demo", cfg, cfg)
    text = cfg.read_text()
    thirds = tmp_path / "thirds.yaml"
    thirds.write_text(text.replace("holdout_every: 5", "holdout_every: 3").replace("name: tiny", "name: thirds"))
    with pytest.raises(UserError, match="its held-out videos, .* are not those of"):
        show(monkeypatch, "demo", cfg, thirds)
    with pytest.raises(UserError, match="trains on video alone"):
        show(monkeypatch, "demo", tiny.REPO / "configs/VGGSound-VICReg-Video.yaml")


def test_a_map_of_too_few_videos(trained, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--map: 2 videos could be read"):
        show(monkeypatch, "retrieval", trained[1], "--map", tmp_path / "map.png")


def test_retrieval_without_motion_and_without_the_order_of_sound(trained, monkeypatch, capsys):
    show(monkeypatch, "retrieval", trained[1], "--controls")
    whole, motion, order = capsys.readouterr().out.splitlines()[-3:]
    assert whole.startswith("v2a_R@1 ") and motion.startswith("without motion: v2a_R@1 ")
    assert order.startswith("without order of sound: v2a_R@1 ")


def test_retrieval_in_the_precision_of_the_run(trained, monkeypatch):
    embed, dtypes = report.embed, []

    def spied(model, batches, prepare, autocast):
        hook = model.video_model.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
        embeddings = embed(model, batches, prepare, autocast)
        hook.remove()
        return embeddings

    monkeypatch.setattr(report, "embed", spied)
    show(monkeypatch, "retrieval", trained[1])
    show(monkeypatch, "retrieval", trained[1], "--set", "precision=bf16")
    with pytest.raises(UserError, match="--checkpoint: expected a file, found an empty name"):
        show(monkeypatch, "retrieval", trained[1], "--checkpoint", "")
    assert set(dtypes[: len(dtypes) // 2]) == {torch.float32} and set(dtypes[len(dtypes) // 2 :]) == {torch.bfloat16}


def test_retrieval_with_other_mel_bins(trained, monkeypatch, tmp_path):
    cfg = tmp_path / "bins.yaml"
    cfg.write_text(trained[1].read_text().replace("n_mels: 32", "n_mels: 40"))
    with pytest.raises(UserError, match="n_mels: 40, but the audio statistics have 32"):
        show(monkeypatch, "retrieval", cfg)


def test_steps_of_an_epoch_that_still_goes_on():
    lines = [{"epoch": 0, "step": 4}, {"epoch": 0, "step": 10}, {"epoch": 1, "step": 14}]
    assert report.steps_of_an_epoch(lines) == 10
    assert report.steps_of_an_epoch(lines[:2]) == 10
    assert report.steps_of_an_epoch([]) == 1


def test_guessing_finds_the_largest_class():
    labels = torch.tensor([0, 0, 0, 1, -1, -1, -1, -1])
    found = report.chance(8, labels)
    assert found["kNN@5"] == 75.0 and found["v2a_R@1"] == 12.5 and found["v2a_R@10"] == 100.0
