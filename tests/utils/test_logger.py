"""utils.logger and utils.bad_videos: what a run's files keep."""

import math
import os
import re
import resource
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from datasets.video_dataset import collate
from utils import logger, report
from utils.bad_videos import BadVideos
from utils.errors import RunFailed, UserError
from utils.files import write_whole
from utils.logger import MetricsWriter, StepClock, TrainingLog, log, read_metrics
from utils.metrics import Averages
from utils.pictures import save_picture
from utils.stopping import NonFiniteGuard


@pytest.mark.parametrize(("resume_step", "kept"), [(0, [9]), (2, [1, 2, 9]), (None, [1, 2, 3, 9])])
def test_figures_of_steps_that_will_be_taken_again_are_dropped(tmp_path, resume_step, kept):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"group": "train", "st')  # of a killed run
    writer = MetricsWriter(tmp_path, resume_step)
    writer.write("train", 9, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path, "train")] == kept


def test_a_full_disk_under_the_metrics_ends_in_a_line(tmp_path, monkeypatch):
    """A limit on the size of files fails writes as a full disk does."""
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, {"loss": 1.0})
    writer.close()
    monkeypatch.setattr(writer, "_board", Mock())  # TensorBoard writes in a thread of its own
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, hard))
    try:
        with pytest.raises(UserError, match="metrics.jsonl: could not be written: .*File too large"):
            writer.write("train", 2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_bad_video_whose_name_is_no_utf_8_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.bad_videos.log.disabled", True)  # pytest's processes cannot send each other such a name
    bad = BadVideos(tmp_path, 1.0, 10)
    bad._flush([("clip\udce9.mp4", "cannot be opened")])
    assert b"clip\xe9.mp4,cannot be opened,1" in (tmp_path / "bad-videos.csv").read_bytes()


def test_bad_videos_that_cannot_be_noted_end_in_a_line(tmp_path):
    (tmp_path / "bad-videos.csv").mkdir()
    with pytest.raises(UserError, match="bad-videos.csv: could not be written: "):
        BadVideos(tmp_path, 1.0, 10)._flush([("clip.mp4", "cannot be opened")])


def test_epochs_are_counted_from_one_in_what_is_told(tmp_path):
    bad = BadVideos(tmp_path, 0.1, 10)
    bad.record({"failures": [("a.mp4", "broken"), ("b.mp4", "broken")], "failed": 2})
    with pytest.raises(UserError, match="2 of the 10 samples of epoch 1 could not be read"):
        bad.collect(0)


def test_samples_are_counted_not_attempts(tmp_path):
    bad = BadVideos(tmp_path, 0.1, 10)
    samples = [{"failures": [("a.mp4", "broken"), ("b.mp4", "broken")], "frames": 0}, {"failures": [], "frames": 0}]
    bad.record(collate(samples))
    assert bad.collect(0) == 1
    assert "a.mp4,broken,1\r\nb.mp4,broken,1" in (tmp_path / "bad-videos.csv").read_bytes().decode()


def test_a_sample_that_has_no_readable_video_is_told_apart(tmp_path):
    first, last = {"failures": [("a.mp4", "broken"), ("b.mp4", "cut")]}, {"failures": [("c.mp4", "gone")], "frames": 0}
    with pytest.raises(UserError, match="for a sample: all 2 that were tried failed; last b.mp4: cut"):
        BadVideos(tmp_path, 1.0, 10).record(collate([first, last]))
    assert "c.mp4,gone,1" in (tmp_path / "bad-videos.csv").read_text()


def test_a_run_that_goes_on_counts_bad_videos_on(tmp_path):
    bad, again = BadVideos(tmp_path, 0.2, 10), BadVideos(tmp_path, 0.2, 10)
    bad.record({"failures": [("a.mp4", "broken"), ("b.mp4", "broken")], "failed": 2})
    assert bad.collect(1) == 2
    again.load_state_dict(bad.state_dict())
    again.record({"failures": [("a.mp4", "broken")], "failed": 1})
    with pytest.raises(UserError, match="3 of the 10 samples of epoch 2 could not be read"):
        again.collect(1)
    assert "a.mp4,broken,2" in (tmp_path / "bad-videos.csv").read_text()


def test_a_stretch_of_steps_is_measured_by_itself():
    clock = StepClock()
    assert list(clock.timed(iter("ab"))) == ["a", "b"]
    clock.count(5)
    assert clock.read()["clips_per_s"] > 0 and clock.read()["wait_share"] > 0
    clock.restart()
    assert clock.read() == {"clips_per_s": 0.0, "wait_share": 0.0}


def test_the_time_that_is_left_is_of_the_clips_that_are_left(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    with caplog.at_level("INFO", "avssrl"):
        TrainingLog(writer, 3, 10, 4).report(1, 4, {"lr": 0.1, "clips_per_s": 2.0})
    writer.close()
    assert "epoch 2/3 step 4/10 | 32 s left" in caplog.text  # 16 steps of 4 clips


def test_averages_forget_what_is_taken_back():
    averages = Averages()
    for value in (1.0, 2.0, math.nan, math.nan):
        averages.add({"loss": torch.tensor(value), "terms": torch.tensor(2 * value)})
    averages.take_back(2)
    assert averages.read() == {"loss": 1.5, "terms": 3.0}
    assert averages.read() == {}


def test_the_spread_of_a_single_clip_does_not_count():
    averages = Averages()
    for spread, loss in ((0.0, 1.0), (math.nan, 3.0)):
        averages.add({"loss": torch.tensor(loss), "video_spread": torch.tensor(spread)})
    assert averages.read() == {"loss": 2.0, "video_spread": 0.0}
    averages.add({"loss": torch.tensor(math.nan), "video_spread": torch.tensor(math.nan)})
    assert str(averages.read()) == "{'loss': nan}"  # nothing else is hidden


@pytest.mark.parametrize(
    ("pos_cos", "neg_cos", "spread", "words"),
    [
        (0.5, 0.0, 0.5, None),
        (0.5, 0.0, 0.09, "their spread is 0.09"),
        (0.97, 0.96, 0.5, r"\+0.97 and \+0.96"),
        (-1.0, -1.0, 0.5, "-1.00 and -1.00"),
        (0.5, -0.97, 0.5, None),
        (0.99, 0.1, 0.5, None),
    ],
)
def test_a_collapse_is_told_in_words(tmp_path, caplog, pos_cos, neg_cos, spread, words):
    figures = {"pos_cos": pos_cos, "neg_cos": neg_cos, "video_spread": 0.9, "audio_spread": spread}
    writer = MetricsWriter(tmp_path)
    with caplog.at_level("WARNING", "avssrl"):
        TrainingLog(writer, 2, 10, 4).report(0, 5, {"loss": 0.1, "clips_per_s": 3.0, **figures})
    writer.close()
    assert bool(caplog.records) == (words is not None)
    assert words is None or re.search(words, caplog.text)


def test_a_stretch_whose_steps_were_all_left_out_is_told_without_a_loss(tmp_path):
    writer = MetricsWriter(tmp_path)
    TrainingLog(writer, 2, 10, 4).report(0, 5, {"lr": 0.1, "clips_per_s": 3.0})
    writer.close()
    (line,) = read_metrics(tmp_path, "train")
    assert line["lr"] == 0.1 and "loss" not in line


def test_a_diagnosis_that_cannot_be_written_hides_no_failure(tmp_path):
    (tmp_path / "nonfinite-epoch1-step3.json").mkdir()
    guard = NonFiniteGuard(tmp_path, "clip{}.mp4".format, 0, False)
    nan, index = torch.tensor(math.nan), torch.tensor([3])
    guard.admits({"epoch": 0, "step": 2}, [nan], nan, {"sim": nan}, [index])
    with pytest.raises(RunFailed, match="not finite in epoch 1, step 3: .*the diagnosis is lost: .*could not be writ"):
        guard.check()


def test_a_step_that_is_left_out_takes_bn_back_to_the_last_good_one(tmp_path):
    """Though its loss is finite, and only the gradients are not."""
    model, one = nn.BatchNorm1d(2), torch.ones(())

    def step(guard, norm):
        model(torch.randn(4, 2))
        return guard.admits({"epoch": 0, "step": 0}, [one], norm, {}, [torch.tensor([3])])

    guard = NonFiniteGuard(tmp_path, "clip{}.mp4".format, 1, False)
    guard.protect(model)
    assert step(guard, one)
    good = {name: value.clone() for name, value in model.named_buffers()}
    assert not step(guard, one * math.inf)
    assert all(torch.equal(value, good[name]) for name, value in model.named_buffers())
    again = NonFiniteGuard(tmp_path, "clip{}.mp4".format, 1, False)
    again.protect(model)
    again.load_state_dict(guard.state_dict())
    with pytest.raises(RunFailed, match="1 steps .skip_nonfinite. were skipped already"):
        step(again, one * math.nan)


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power must not leave the new name and none of the content: what was there goes to disk first."""
    file, flushed = tmp_path / "table.csv", []
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append((os.fstat(fd).st_size, file.read_text())))
    write_whole(file, "new", b" and whole")
    assert flushed == [(13, "old")] and file.read_text() == "new and whole"


def test_a_file_goes_into_a_folder_that_is_not_there_yet(tmp_path):
    write_whole(tmp_path / "new/deeper/table.csv", "a,b\n")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/table.csv: could not be written"):
        write_whole(tmp_path / "file/table.csv", "")
    (tmp_path / "folder/below").mkdir(parents=True)
    with pytest.raises(UserError, match="folder: could not be written"):
        write_whole(tmp_path / "folder", b"a", memoryview(b"b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "new"]
    with pytest.raises(UserError, match="file/picture.png: could not be drawn"):
        save_picture(Figure(), tmp_path / "file/picture.png")


def test_a_run_from_its_start_drops_the_figures_before_its_first_step_too(tmp_path):
    for _ in range(2):  # killed before it saved
        writer = MetricsWriter(tmp_path)
        writer.write("retrieval", 0, {"R@10": 1.0})
        writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("retrieval/R@10")] == [0]


@pytest.mark.parametrize("name", ["", "picture", "picture.txt", "."])
def test_a_picture_needs_a_name_with_an_ending_before_any_work(capsys, monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["report", "demo", "no.yaml", "--out", name])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "argument --out" in (told := capsys.readouterr().err) and "could not be drawn" in told


@pytest.mark.parametrize("name", ["", "."])
def test_a_file_needs_a_name(name):
    with pytest.raises(UserError, match="a file's name is needed"):
        write_whole(Path(name), "text")


def test_quiet_ranks_warn_in_the_file_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(logger, "is_main", lambda: False)
    monkeypatch.setattr(logger, "rank", lambda: 1)
    monkeypatch.setattr(log, "propagate", True)  # setup_logging sets it, and the level
    level = log.level
    try:
        for quiet in (True, False):
            logger.setup_logging(tmp_path, quiet)
            assert logger.is_quiet() is quiet
            log.warning("of the %s", "quiet" if quiet else "loud")
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
    assert "[rank 1] of the quiet" in (tmp_path / "train.log").read_text()
    assert "of the quiet" not in (shown := capfd.readouterr()).out + shown.err and "[rank 1] of the loud" in shown.err
