"""A sample of `python3 -m tests.fuzz`, and that it would find what it looks for."""

import os
import time

import numpy as np

from datasets.work_pool import run_jobs
from tests.fuzz import DAMAGES, attempt, fuzz, make_damaged


def test_damaged_files_are_decoded_or_named(make_video, tmp_path, capsys):
    files = [
        make_video(tmp_path / "a.mp4", seconds=1.0),
        make_video(tmp_path / "b.avi", seconds=1.0, codec="mpeg4", audio_codec="mp3", audio_rate=44100),
        make_video(tmp_path / "c.mkv", seconds=1.0, audio_rate=None),
    ]
    (tmp_path / "work").mkdir()
    assert fuzz(files, tmp_path / "work", 60, 1, 1, 30.0, tmp_path / "kept") == []
    assert "60 files, 0 failures" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_each_damage_changes_the_file(make_video, tmp_path):
    source, other = make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.mp4", size=(32, 32))
    for i, damage in enumerate(DAMAGES):
        path = tmp_path / f"damaged{i}"
        make_damaged(path, source, other, damage, np.random.default_rng(i))
        same = path.is_file() and path.read_bytes() == source.read_bytes()
        assert same == (damage == "another ending")


def crash(path):
    os.abort()


def hang(path):
    time.sleep(60)


def test_a_crash_and_a_hang_would_be_seen(make_video, tmp_path):
    good = make_video(tmp_path / "a.mp4")
    for do, words in ((crash, "crashed"), (hang, "not done within")):
        assert words in dict(run_jobs([("a", (good,))], 1, 3.0, do=do))["a"]
    assert set(attempt(good).values()) == {"decoded"}
