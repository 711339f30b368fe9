"""`python3 -m datasets.prepare` as a user runs it: killed, run again, in shards, on files that crash the decoder."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from datasets import build_videos, transcode
from datasets.decoding import probe
from datasets.evaluation import data_fingerprint, present_videos
from datasets.manifest import COLUMNS, FILE, append_rows, manifest_of, read_rows, write_rows
from datasets.prepare import PART, is_done, main, row_of
from datasets.video_dataset import VideoList
from datasets.work_pool import _Worker, run_jobs
from tests import tiny
from tests.datasets.test_decoding import damage
from tests.tiny import interrupted
from tests.tiny_evaluation import make_ucf
from utils.errors import UserError

CLIPS = ("train/a b(1)_000001.mp4", "train/--x_000002.mp4", "train/#y&!_000003.mp4", "test/z_000004.mp4")


@pytest.fixture
def raw(make_video, tmp_path):
    """A small VGGSound: four videos, one without sound, and one file that is no video."""
    root = tmp_path / "raw"
    for i, name in enumerate(CLIPS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make_video(root / name, seconds=1.0, audio_rate=16000 if i else None)
    (root / "train/bad_000009.mp4").write_text("no video")
    (root / "vggsound.csv").write_text('--x,2,playing,train\n"#y&!",3,singing,train\n')
    return root


def prepare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    main()


def test_a_broken_link_costs_itself_alone(raw, tmp_path, monkeypatch):
    (raw / "train/gone_000001.mp4").symlink_to(tmp_path / "nowhere.mp4")
    prepare(monkeypatch, "vggsound", "--root", raw, "--out", tmp_path / "out", "--workers", 1)
    errors = {row["path"] for row in read_rows(tmp_path / "out" / FILE) if row["error"]}
    assert errors == {"train/bad_000009.mp4", "train/gone_000001.mp4"}


def test_subfolders_are_left_out_as_training_does(raw, tmp_path, monkeypatch):
    (raw / "train/more").mkdir()
    shutil.copy(raw / CLIPS[0], raw / "train/more/x_000001.mp4")
    prepare(monkeypatch, "vggsound", "--root", raw, "--out", tmp_path / "out", "--workers", 1)
    (raw / "train/bad_000009.mp4").unlink()
    lists = [build_videos(dataset(root), "train").fingerprint for root in (raw, tmp_path / "out")]
    assert lists[0] == lists[1]


def test_a_file_is_no_place_for_a_data_set(raw, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--out .*file: is no folder"):
        prepare(monkeypatch, "vggsound", "--root", raw, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def dataset(root, name="vggsound"):
    return {"name": name, "root": str(root), "list": None, "holdout_every": None, "labels": None, "label_column": None}


def test_a_prepared_folder_works_as_the_raw_one(raw, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    prepare(monkeypatch, "vggsound", "--root", raw, "--out", out, "--workers", 2)
    rows = {row["path"]: row for row in read_rows(out / FILE)}
    assert set(rows) == {*CLIPS, "train/bad_000009.mp4"}
    assert rows[CLIPS[0]]["audio"] == "none" and rows[CLIPS[1]]["audio"] == "sound"
    assert rows[CLIPS[1]]["label"] == "playing" and rows[CLIPS[1]]["split"] == "train"
    assert "found:" in rows["train/bad_000009.mp4"]["error"]
    summary = (out / "summary.txt").read_text()
    assert "4 videos" in summary and "1 dropped" in summary and "bad_000009.mp4" in summary
    assert (out / "contact-sheet.png").stat().st_size > 10_000
    videos = build_videos(dataset(out), "train")
    assert [videos.name(i) for i in range(len(videos))] == sorted(CLIPS[:3])  # without the bad one
    heard = build_videos(dataset(out), "train", with_sound=True)
    assert build_videos(dataset(out), "train").names() == sorted(CLIPS[:3])
    assert heard.names() == sorted(set(CLIPS[:3]) - {CLIPS[0]}) and len(heard.labels) == 2  # a raw folder tells nothing
    assert len(build_videos(dataset(raw), "train", with_sound=True)) == 4
    (raw / "train/bad_000009.mp4").unlink()
    assert videos.fingerprint == build_videos(dataset(raw), "train").fingerprint  # a run goes on from raw to prepared
    assert list(videos.classes) == ["playing", "singing"]


def test_a_run_counts_what_could_not_be_prepared_as_absent(tmp_path, make_video, monkeypatch):
    """Lists of UCF-101 name it all the same; in pre-training another clip takes its place."""
    root, out = make_ucf(tmp_path / "ucf", make_video), tmp_path / "out"
    bad = sorted((root / "videos").rglob("*g01_c01.mp4"))[0]
    bad.write_text("no video")
    prepare(monkeypatch, "ucf101", "--root", root, "--out", out, "--workers", 1)
    listed = build_videos(dataset(out, "ucf101") | {"fold": 1}, "trainlist01")
    assert str(bad.relative_to(root)) in [listed.name(i) for i in range(len(listed))]
    before = data_fingerprint(listed)
    make_video(bad, seconds=1.0)
    prepare(monkeypatch, "ucf101", "--root", root, "--out", out, "--workers", 1)
    assert data_fingerprint(listed) != before


def test_read_only_lists_are_copied_again(tmp_path, make_video, monkeypatch):
    root, out = make_ucf(tmp_path / "ucf", make_video, train=1, test=1), tmp_path / "out"
    lists = root / "ucfTrainTestlist"
    for path in (*lists.iterdir(), lists):
        path.chmod(0o555 if path == lists else 0o444)
    for _ in range(2):
        prepare(monkeypatch, "ucf101", "--root", root, "--out", out, "--workers", 1)
    copies = sorted((out / "ucfTrainTestlist").iterdir())
    assert [copy.read_bytes() for copy in copies] == [path.read_bytes() for path in sorted(lists.iterdir())]
    assert all(path.stat().st_mode & 0o200 for path in (*copies, out / "ucfTrainTestlist"))


def test_names_may_be_anything(tmp_path, make_video):
    """Bytes that are no UTF-8, signs that matplotlib takes for mathematics; by a process whose output is UTF-8."""
    root, out = tmp_path / "raw", tmp_path / "out"
    root.mkdir()
    names = [os.fsdecode(name) for name in (b"caf\xe9.mp4", b"make $$$ fast, $ave 50%.mp4", b"bad\xe9.mp4")]
    for name in names[:2]:
        make_video(root / name, seconds=0.5)
    (root / names[2]).write_text("no video")
    full = [sys.executable, "-m", "datasets.prepare", "folder", "--root", root, "--out", out, "--workers", "1"]
    done = subprocess.run(full, cwd=tiny.REPO, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert b"bad\xe9.mp4" in (out / "summary.txt").read_bytes() and (out / "contact-sheet.png").is_file()
    assert {row["path"] for row in read_rows(out / FILE)} == set(names)


def test_hidden_files_are_no_videos(raw):
    """What a download that was killed leaves, say, or macOS beside each file."""

    def found():
        layouts = (("vggsound", "train"), ("folder", "all"))
        return [build_videos(dataset(raw, name), split).fingerprint for name, split in layouts]

    before = found()
    for name in (".b_000002.77.part.mp4", "._a b(1)_000001.mp4", ".trash/c_000001.mp4"):
        (raw / "train" / name).parent.mkdir(exist_ok=True)
        shutil.copy(raw / CLIPS[0], raw / "train" / name)
    assert found() == before


def test_what_is_finished_is_not_done_again(raw, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ("vggsound", "--root", raw, "--out", out, "--workers", 1)
    prepare(monkeypatch, *arguments)
    before = {name: (out / name).stat().st_mtime_ns for name in CLIPS}
    (out / CLIPS[0]).unlink()  # lost
    os.utime(raw / CLIPS[1], (1, 1))  # changed
    prepare(monkeypatch, *arguments)
    assert "3 done before, 2 to do" in capsys.readouterr().out
    after = {name: (out / name).stat().st_mtime_ns for name in CLIPS}
    assert [name for name in CLIPS if before[name] != after[name]] == list(CLIPS[:2])
    prepare(monkeypatch, *arguments, "--short-side", 24)  # another recipe: all of it
    assert {row["height"] for row in read_rows(out / FILE) if not row["error"]} == {"24"}


def test_what_can_no_longer_be_prepared_leaves_no_older_file(tmp_path, make_video, monkeypatch):
    """Lists of UCF-101 name it all the same, and training would take the older file."""
    root, out = make_ucf(tmp_path / "ucf", make_video, train=1, test=1), tmp_path / "out"
    arguments = ("ucf101", "--root", root, "--out", out, "--workers", 1)
    prepare(monkeypatch, *arguments)
    raw = sorted((root / "videos").rglob("*.mp4"))[0]
    assert (out / raw.relative_to(root)).is_file()
    raw.write_text("no video")
    prepare(monkeypatch, *arguments)
    assert not (out / raw.relative_to(root)).exists()
    assert len(list((out / "videos").rglob("*.mp4"))) == 3


def test_a_recipe_is_what_it_does_not_how_it_is_spelt(raw, tmp_path, monkeypatch, capsys):
    arguments = ("vggsound", "--root", raw, "--out", tmp_path / "out", "--workers", 1, "--fps")
    prepare(monkeypatch, *arguments, "16")
    capsys.readouterr()
    prepare(monkeypatch, *arguments, "16.0")
    assert "5 done before, 0 to do" in capsys.readouterr().out
    monkeypatch.setitem(transcode.ENCODER, "crf", "30")
    prepare(monkeypatch, *arguments, "16")
    assert "0 done before, 5 to do" in capsys.readouterr().out


def test_killed_and_run_again(make_video, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for i in range(20):
        make_video(raw / f"{i:02d}.mp4", seconds=1.0, size=(320, 240))
    command = [sys.executable, "-m", "datasets.prepare", "folder", "--root", raw, "--out", out, "--workers", 1]
    command = list(map(str, command))
    started = subprocess.Popen(command, cwd=tiny.REPO, env=tiny.ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    part = out / PART.format(1, 1)
    while len(read_rows(part)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    done = len(read_rows(part))
    assert 5 <= done < 20
    assert not (out / FILE).exists()  # nobody takes half a folder for the whole
    with part.open("a") as file:
        file.write("17.mp4,,,1.0,2")  # the half line of a killed run
    for name, age in ((".03.mp4.1.tmp", 1e6), (".04.mp4.2.tmp", 0)):
        (out / name).write_text("a half file")
        os.utime(out / name, (time.time() - age,) * 2)
    ended = subprocess.run(command, cwd=tiny.REPO, env=tiny.ENV, capture_output=True, text=True, check=True)
    assert f" {done} done before, {20 - done} to do" in ended.stdout
    assert len(read_rows(out / FILE)) == 20 and not part.exists()
    assert sorted(p.name for p in out.glob("*.mp4")) == [f"{i:02d}.mp4" for i in range(20)]
    assert not (out / ".03.mp4.1.tmp").exists(), "a killed worker's"
    assert (out / ".04.mp4.2.tmp").exists(), "another shard's, which may be writing to it"


def test_a_second_process_of_one_shard_is_refused(raw, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "datasets.prepare", "vggsound", "--root", str(raw), "--out", str(out)]
    with (out / f".{PART.format(1, 1)}.lock").open("a") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        ended = subprocess.run(command, cwd=tiny.REPO, env=tiny.ENV, capture_output=True, text=True)
    assert ended.returncode == 2 and "another process is writing there" in ended.stderr
    assert not (out / PART.format(1, 1)).exists()


def test_labels_in_a_subfolder_come_along(make_video, tmp_path, monkeypatch):
    (tmp_path / "raw/a").mkdir(parents=True)
    make_video(tmp_path / "raw/a/0.mp4", seconds=0.4)
    (tmp_path / "raw/a/labels.csv").write_text("file,kind\na/0.mp4,one\n")
    prepare(monkeypatch, "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    settings = {"labels": "a/labels.csv"}
    lists = [build_videos(dataset(tmp_path / side, "folder") | settings, "all") for side in ("raw", "out")]
    assert lists[0].classes == lists[1].classes == ("one",)


def comparable(out):
    """The manifest's lines without what holds the folder's name, and sizes: x264 may give a byte more or less."""
    return [{k: v for k, v in row.items() if k not in ("error", "bytes")} for row in read_rows(out / FILE)]


def test_two_shards_are_merged(raw, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare(monkeypatch, "vggsound", "--root", raw, "--out", out, "--workers", 1, "--shard", "1/2")
    assert not (out / FILE).exists()
    assert "run the other shards" in capsys.readouterr().out
    prepare(monkeypatch, "vggsound", "--root", raw, "--out", out, "--workers", 1, "--shard", "2/2")
    prepare(monkeypatch, "vggsound", "--root", raw, "--out", whole, "--workers", 1)
    assert comparable(out) == comparable(whole)


def test_shards_of_another_recipe_are_not_merged(raw, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ("vggsound", "--root", raw, "--out", out, "--workers", 1)
    for shard in ("1/2", "2/2"):
        prepare(monkeypatch, *arguments, "--shard", shard)
    (out / FILE).unlink()
    capsys.readouterr()
    prepare(monkeypatch, *arguments, "--shard", "1/2", "--short-side", 24)
    assert "run the other shards" in capsys.readouterr().out
    assert not (out / FILE).exists()
    prepare(monkeypatch, *arguments, "--short-side", 32)  # in one go, then a shard again: the old parts are stale
    prepare(monkeypatch, *arguments, "--shard", "1/2", "--short-side", 32)
    assert {row["height"] for row in read_rows(out / FILE) if not row["error"]} == {"32"}


def test_a_manifest_is_of_the_files_that_are_there(raw, tmp_path, monkeypatch, capsys):
    """A shard of another recipe replaces some; after it, or when it was killed, the first recipe finds its own."""
    out = tmp_path / "out"
    arguments = ("vggsound", "--root", raw, "--out", out, "--workers", 1)
    prepare(monkeypatch, *arguments)
    whole = comparable(out)
    capsys.readouterr()
    prepare(monkeypatch, *arguments, "--shard", "1/2", "--fps", 10)
    assert not (out / FILE).exists()
    assert "2 videos, 0.00 hours; 1 dropped" in capsys.readouterr().out, "the summary is the shard's"
    (out / PART.format(1, 2)).unlink()  # as if killed before it could note them
    prepare(monkeypatch, *arguments)
    assert "3 done before, 2 to do" in capsys.readouterr().out
    assert comparable(out) == whole and not (out / PART.format(0, 0)).exists()
    for name in CLIPS:
        assert probe(out / name).video.fps == 25


def test_new_videos_do_not_retract_a_manifest(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("vggsound", "--root", raw, "--out", out, "--workers", 1)
    prepare(monkeypatch, *arguments)
    before = (out / FILE).read_bytes()
    for name in ("train/zz_1.mp4", "train/zz_2.mp4"):
        shutil.copy(raw / CLIPS[0], raw / name)
    prepare(monkeypatch, *arguments, "--shard", "6/7")
    assert (out / FILE).read_bytes() == before


def test_what_ran_out_of_time_is_tried_again(raw, tmp_path, monkeypatch, capsys):
    arguments = ("vggsound", "--root", raw, "--out", tmp_path / "out", "--workers", 1)
    prepare(monkeypatch, *arguments, "--time-limit", 0.001)
    assert all(row["error"] for row in read_rows(tmp_path / "out" / FILE))
    prepare(monkeypatch, *arguments)
    rows = read_rows(tmp_path / "out" / FILE)
    assert [row["path"] for row in rows if row["error"]] == ["train/bad_000009.mp4"]


def test_a_video_that_ends_before_it_says_is_pointed_out(make_video, tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    file = make_video(tmp_path / "raw/a.mkv", seconds=6.0, audio_rate=None)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    prepare(monkeypatch, "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    assert "shorter than declared: 1 (a.mkv)" in (tmp_path / "out/summary.txt").read_text()


def test_what_is_lost_in_the_middle_of_a_file_is_pointed_out(make_video, tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    for kind in ("audio", "video"):
        damage(make_video(tmp_path / f"raw/{kind}.mp4", seconds=8.0, gop=25), kind, 2, 5)
    prepare(monkeypatch, "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    summary = (tmp_path / "out/summary.txt").read_text()
    assert "left out: 1 (audio.mp4)" in summary and "video.mp4: asked for: all frames; found: packets aro" in summary


def test_check_writes_no_video(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(monkeypatch, "vggsound", "--root", raw, "--check", "--workers", 1)
    assert len(read_rows(tmp_path / "check-raw" / FILE)) == 5
    assert not list((tmp_path / "check-raw").rglob("*.mp4"))


def test_evaluation_lists_work_on_a_prepared_folder(make_video, tmp_path, monkeypatch):
    raw = make_ucf(tmp_path / "raw", make_video)
    out = tmp_path / "out"
    broken = raw / "videos/HandstandPushups/v_HandstandPushups_g05_c01.mp4"
    broken.write_bytes(broken.read_bytes()[:100])
    prepare(monkeypatch, "ucf101", "--root", raw, "--out", out, "--workers", 1)
    lists = [build_videos(dataset(root, "ucf101") | {"fold": 1}, "testlist01") for root in (raw, out)]
    assert lists[0].fingerprint == lists[1].fingerprint
    with pytest.raises(UserError, match="1 of the 6 videos of a list are missing"):
        present_videos(lists[1], allow_missing=False)
    present, missing = present_videos(lists[1], allow_missing=True)
    assert (len(present), len(missing)) == (5, 1)
    before = data_fingerprint(present)
    rows = read_rows(out / FILE)
    write_rows(out / FILE, [row | {"source": "another"} for row in rows])
    os.utime(out / FILE, (2, 2))
    assert data_fingerprint(present) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "3/2"), "expected I/N"),
        (("--fps", "none"), "expected keep"),
        *((("--time-limit", value), "expected seconds above 0, at most 1000000") for value in (0, "inf", "nan", 1e300)),
        (("--check",), "or --check"),
    ],
)
def test_mistakes(raw, tmp_path, monkeypatch, options, message):
    with pytest.raises(UserError, match=message):
        prepare(monkeypatch, "vggsound", "--root", raw, "--out", tmp_path / "out", *options)


def test_a_manifest_that_cannot_be_read_is_a_mistake(raw, tmp_path, monkeypatch):
    (raw / FILE).mkdir()
    with pytest.raises(
        UserError, match="raw/manifest.csv: cannot be read: Is a directory; make it readable, or delete"
    ):
        build_videos(dataset(raw), "train")
    (tmp_path / "out" / FILE).mkdir(parents=True)
    with pytest.raises(UserError, match="out/manifest.csv: cannot be read: Is a directory"):
        prepare(monkeypatch, "vggsound", "--root", raw, "--out", tmp_path / "out")


def test_a_list_that_cannot_be_copied_is_a_mistake(raw, tmp_path, monkeypatch, unreadable):
    unreadable(raw / "vggsound.csv")
    with pytest.raises(UserError, match="vggsound.csv: cannot be read: Permission denied; make it readable"):
        prepare(monkeypatch, "vggsound", "--root", raw, "--out", tmp_path / "out")


def test_the_raw_folder_is_never_written_to(raw, monkeypatch):
    for out in (raw, raw / "prepared"):
        with pytest.raises(UserError, match="only read"):
            prepare(monkeypatch, "vggsound", "--root", raw, "--out", out)


def test_a_crash_and_a_hang_cost_one_file_each(make_video, tmp_path, monkeypatch):
    """Real deaths: the worker that has the first file is killed as by a crash, the one with the second is stopped."""
    sources = [make_video(tmp_path / f"{i}.mp4", seconds=8.0 if i < 2 else 0.5, size=(320, 240)) for i in range(4)]
    given = _Worker.give

    def give(worker, name, arguments):
        given(worker, name, arguments)
        if name in ("0", "1"):
            os.kill(worker.process.pid, signal.SIGSEGV if name == "0" else signal.SIGSTOP)

    monkeypatch.setattr(_Worker, "give", give)
    jobs = [(str(i), (source, tmp_path / f"out{i}.mp4", 256, None)) for i, source in enumerate(sources)]
    outcomes = dict(run_jobs(jobs, 2, time_limit=8.0))
    assert "crashed (exit status -11)" in outcomes["0"]
    assert "not done within 8 s" in outcomes["1"]
    assert [outcomes[name].frames for name in "23"] == [12, 12]


def give_or_fail(what):
    """A job that gives the number of its process, or fails."""
    if isinstance(what, Exception):
        raise what
    return os.getpid()


def test_an_error_in_a_worker_says_what_it_is_and_costs_nothing_else():
    errors = {"a": TypeError("no\nnumber"), "b": OSError(24, "Too many open files"), "c": MemoryError()}
    outcomes = run_jobs(
        [("0", (0,)), *((name, (error,)) for name, error in errors.items()), ("1", (1,))], 1, 60.0, give_or_fail
    )
    outcomes = dict(outcomes)
    assert outcomes["a"] == "a: asked for: all of it; found: an unexpected error: TypeError: no number"
    assert outcomes["b"].endswith("error: OSError: [Errno 24] Too many open files")
    assert outcomes["c"].endswith("error: MemoryError: ")
    assert outcomes["0"] == outcomes["1"], "the same process goes on"
    for name in errors:
        row = row_of("a", "", outcomes[name], "source", None)
        assert not is_done(row, "source", None), "it may be the machine's fault"


def test_ctrl_c_ends_all_in_a_line(make_video, tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(20):
        make_video(tmp_path / f"raw/{i:02d}.mp4", seconds=1.0, size=(320, 240))
    command = ["datasets.prepare", "folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", "2"]
    told = interrupted(command, lambda: len(read_rows(tmp_path / "out" / PART.format(1, 1))) > 2)
    assert told.endswith("interrupted\n") and "Traceback" not in told


def test_a_manifest_is_read_again_when_it_changes(tmp_path):
    row = dict.fromkeys(("label", "split"), "") | {"source": "s", "error": ""}
    write_rows(tmp_path / FILE, [row | {"path": "a.mp4"}])
    assert manifest_of(tmp_path).paths == ["a.mp4"]
    write_rows(tmp_path / FILE, [row | {"path": name} for name in ("b.mp4", "a.mp4", "\udcff.mp4")])
    assert manifest_of(tmp_path).paths == ["a.mp4", "b.mp4", "\udcff.mp4"]
    assert manifest_of(tmp_path / "nowhere") is None
    (tmp_path / FILE).write_text("x,y\n1,2\n")
    with pytest.raises(UserError, match="expected the columns"):
        manifest_of(tmp_path)


def test_a_video_list_from_a_manifest_touches_no_file(tmp_path):
    names = [f"train/v{i:05d}_000001.mp4" for i in range(500)]
    row = {"source": "s", "error": ""}
    write_rows(tmp_path / FILE, [row | {"path": name} for name in names])
    (tmp_path / "train").mkdir()
    videos = build_videos(dataset(tmp_path), "train")
    assert isinstance(videos, VideoList) and len(videos) == 500
    present, missing = present_videos(videos, allow_missing=False)
    assert len(present) == 500 and not missing
    assert len(np.unique(present.labels)) == 1


def test_a_full_disk_under_the_manifest_ends_in_a_line(tmp_path):
    rows = [dict.fromkeys(COLUMNS, "x") | {"path": name} for name in "ab"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for write in (write_rows, lambda file, rows: list(append_rows(file, rows))):
            with pytest.raises(UserError, match="manifest.csv: could not be written: .*File too large"):
                write(tmp_path / FILE, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
