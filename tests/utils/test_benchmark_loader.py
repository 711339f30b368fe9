"""The loader's benchmark: the baseline reads the same clips, and the figures are those of this run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.transcode import transcode
from datasets.video_dataset import ClipRecipe
from tests import tiny
from utils.benchmark import __main__ as benchmark
from utils.benchmark import loader
from utils.benchmark.loader import Stopwatch, draw_clip, read_ours, read_plain
from utils.config import load_config
from utils.errors import UserError


@pytest.fixture(scope="module")
def folders(make_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    (folder / "raw").mkdir()
    for i in range(6):
        file = make_video(folder / "raw" / f"{i}.mp4", seconds=3.0, size=(160, 96), gop=250)
        transcode(file, folder / "new" / file.name)
    return folder, tiny.write_config(folder, folder / "raw")


def test_the_baseline_reads_the_same_clip(folders):
    folder, config = folders
    recipe = ClipRecipe.from_config(load_config(config)["dataset"], augment=True)
    for i in range(6):
        clip = draw_clip(folder / "raw" / f"{i}.mp4", recipe, np.random.default_rng(i))
        ours = read_ours(folder / "raw" / f"{i}.mp4", clip, recipe, Stopwatch())
        plain = read_plain(folder / "raw" / f"{i}.mp4", clip, recipe, Stopwatch())
        assert ours[0].shape == plain[0].shape == (1, *recipe.clip_shape)
        assert (ours[0].float() - plain[0].float()).abs().mean() < 6  # the box is whole pixels in one, not in the other
        assert torch.corrcoef(torch.cat([ours[1], plain[1]]))[0, 1] > 0.98


def test_figures_of_a_run(folders, monkeypatch, tmp_path, capsys):
    folder, config = folders
    out = tmp_path / "figures.json"
    command = ["benchmark", "loader", config, "--root", folder / "raw", "--prepared", folder / "new", "--clips", 2]
    command += ["--workers", 1, "--json", out, "--png", tmp_path / "bars.png"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    benchmark.main()
    found = json.loads(out.read_text())
    assert [row["variant"] for row in found["clips"]] == ["plain, raw", "ours, raw", "ours, prepared"]
    for row in found["clips"]:
        assert row["clips_per_s"] > 0
        assert sum(row["stages_ms"].values()) == pytest.approx(1000 / row["clips_per_s"], rel=0.2)
        assert row["least"] <= row["median"] <= row["most"]
    assert found["clips"][0]["ratio"] == 1.0
    assert [(e["workers"], e["staged"]) for e in found["epochs"]] == [(1, False), (1, True)] * 2
    assert len(found["skippable"]) == 4 and all(0.3 < share < 0.8 for share in found["skippable"].values())
    assert "ours, prepared" in capsys.readouterr().out
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_videos_without_sound_are_left_out_and_named(folders, make_video, monkeypatch, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("0.mp4", "good.mp4", "silent.mp4"):  # the first is held out
        make_video(raw / name, seconds=1.0, size=(64, 64), audio_rate=None if name == "silent.mp4" else 16000)
    (raw / "broken.mp4").write_bytes(b"no video")
    command = ["benchmark", "loader", folders[1], "--root", raw, "--clips", 1, "--workers", 1]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--set", "dataset.holdout_every=9"])
    benchmark.main()
    told = capsys.readouterr().out
    assert "1 videos x 1 clips" in told
    assert all(f"{raw}/{name}.mp4" in told.partition("left out: ")[2] for name in ("silent", "broken"))
    (raw / "good.mp4").unlink()
    with pytest.raises(UserError, match="clips can be drawn from none of its 2 videos; left out: .*broken.mp4"):
        benchmark.main()


@pytest.mark.parametrize(
    "words",
    [
        ("loader", "CFG", "--root", "DIR", "--clips", "0"),
        ("loader", "CFG", "--root", "DIR", "--videos", "-1"),
        ("loader", "CFG", "--root", "DIR", "--workers", "0"),
        ("bank", "--steps", "0"),
        ("bank", "--instances", "100", "1"),
        ("scaling", "CFG", "--procs", "0"),
        ("scaling", "CFG", "--crop", "-5"),
        ("step", "CFG", "--rounds", "0"),
        ("inference", "CFG", "--depth", "x"),
        ("training", "CFG", "--steps", "1"),
    ],
)
def test_senseless_numbers_end_in_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert f"{words[-2] if words[-2].startswith('--') else '--instances'}: expected " in line and words[-1] in line


def test_a_prepared_folder_that_is_not_whole(folders, monkeypatch):
    folder, config = folders
    command = ["benchmark", "loader", config, "--root", folder / "raw", "--prepared", folder, "--clips", 1]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    with pytest.raises(UserError, match="videos are not there"):
        benchmark.main()


def test_private_memory_grows_with_what_is_written():
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("private memory is read from Linux's /proc")
    child = (  # a new process has no freed memory to take again
        "import os, numpy as np; from utils.benchmark.loader import private_memory; "
        "before = private_memory(os.getpid()); block = np.ones(50_000_000, np.uint8); "
        "print(private_memory(os.getpid()) - before)"
    )
    run = subprocess.run([sys.executable, "-c", child], cwd=tiny.REPO, env=tiny.ENV, capture_output=True, text=True)
    assert 40 < float(run.stdout) < 60, run.stderr


def test_without_proc_the_memory_of_workers_is_not_a_number(folders, monkeypatch, capsys):
    monkeypatch.setattr(loader, "private_memory", lambda pid: float("nan"))
    command = ["benchmark", "loader", folders[1], "--root", folders[0] / "raw", "--clips", 1, "--workers", 1]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    benchmark.main()
    assert "nan" in capsys.readouterr().out
