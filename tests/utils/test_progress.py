"""The progress bar in a job's log and at a terminal."""

import io
import sys

from utils import progress


def test_a_log_has_a_line_a_minute(capfd):
    for _ in progress.progress_bar(range(20_000), desc="work: ", unit="clip"):
        pass
    lines = capfd.readouterr().err.replace("\r", "").split("\n")
    told = [line for line in lines if line.strip()]
    assert len(told) == 2
    assert told[0].startswith("work: 0 of 20000 clips") and told[1].startswith("work: 20000 of 20000 clips")


def test_work_that_comes_late_is_told_after_the_interval(capfd, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    for _ in progress.progress_bar(range(3), unit="video"):
        pass
    told = [line.strip() for line in capfd.readouterr().err.replace("\r", "").split("\n") if line.strip()]
    assert [line.split(",")[0] for line in told[:4]] == [f"{n} of 3 videos" for n in range(4)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_that_is_redrawn(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.progress_bar(range(3), unit="video", mininterval=0, ncols=80, nrows=24):
        pass
    shown = sys.stderr.getvalue()
    assert "3/3" in shown and shown.count("\n") == 1 and shown.count("\r") >= 4
