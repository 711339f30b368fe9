"""Downloading VGGSound, with a downloader that does what YouTube does: gives, refuses, and asks to slow down."""

import csv
import os
import threading
from http.client import HTTPException

import pytest

from datasets.download_vggsound import FATES, FIRST_WAIT, Pause, download_all, main, read_clips
from utils.errors import UserError

CLIPS = [("--a", 1, "train"), ("b_b", 20, "train"), ("c", 300, "test"), ("d", 4, "test")]


class Site:
    """Clips by id: what to raise, in order; when the list is empty the clip is given."""

    def __init__(self, **answers):
        self.answers, self.asked, self.lock = answers, [], threading.Lock()

    def __call__(self, clip, target):
        with self.lock:
            self.asked.append(clip[0])
            answers = self.answers.get(clip[0], [])
            answer = answers.pop(0) if answers else None
        if answer:
            target.write_bytes(b"half")
            raise RuntimeError(answer) if isinstance(answer, str) else answer
        target.write_bytes(b"video")


class Clock:
    """A clock that only sleeping advances."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


def fates(out):
    with (out / FATES).open() as file:
        return {row["id"]: row["fate"] for row in csv.DictReader(file)}


def test_each_clip_has_a_fate(tmp_path):
    site = Site(b_b=["ERROR: Private video. Sign in"], c=["HTTP Error 503: Service Unavailable"])
    counts = download_all(CLIPS, tmp_path, site, workers=2)
    assert counts == {"done": 2, "gone": 1, "failed": 1}
    assert fates(tmp_path) == {"--a": "done", "b_b": "gone", "c": "failed", "d": "done"}
    assert (tmp_path / "train/--a_000001.mp4").read_bytes() == b"video"
    assert sorted(p.name for p in tmp_path.rglob("*.mp4")) == ["--a_000001.mp4", "d_000004.mp4"]  # no half files


def test_the_next_call_tries_only_what_may_come(tmp_path):
    download_all(CLIPS, tmp_path, Site(b_b=["Video unavailable"], c=["connection reset"]), workers=1)
    again = Site()
    counts = download_all(CLIPS, tmp_path, again, workers=1)
    assert again.asked == ["c"]
    assert counts == {"done": 3, "gone": 1}
    (tmp_path / "test/d_000004.mp4").unlink()  # lost
    with (tmp_path / FATES).open("a") as file:
        file.write("d,4,te")  # the half line of a killed run
    last = Site()
    download_all(CLIPS, tmp_path, last, workers=1)
    assert last.asked == ["d"]
    with (tmp_path / FATES).open() as file:
        assert list(csv.reader(file))[-1][:4] == ["d", "4", "test", "done"]


def test_asked_to_slow_down_all_wait_longer_each_time(tmp_path):
    clock = Clock()
    waits = {"workers": 1, "sleep": clock.sleep, "clock": clock}
    site = Site(c=["HTTP Error 429: Too Many Requests"] * 3)
    counts = download_all(CLIPS, tmp_path, site, **waits)
    assert clock.slept == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
    assert counts == {"done": 4}
    clock.slept.clear()
    always = Site(e=["HTTP Error 429"] * 100)
    assert download_all([("e", 1, "test")], tmp_path / "other", always, **waits) == {"failed": 1}
    assert 3 <= len(clock.slept) < 10


def test_one_event_seen_by_all_workers_counts_once():
    clock = Clock()
    pause = Pause(clock.sleep, clock)
    for expected in (FIRST_WAIT, 2 * FIRST_WAIT):
        sent = [pause.wait() for _ in range(4)]
        clock.now += 1
        for began in sent:
            pause.back_off(began)
        clock.now += 1
        pause.relax(sent[0])  # an answer to what was sent before
        clock.slept.clear()
        pause.wait()
        assert clock.slept == [expected - 1]
    pause.relax(pause.wait())
    pause.back_off(pause.wait())
    pause.wait()
    assert clock.slept[-1] == FIRST_WAIT


def test_a_fault_of_the_downloader_costs_one_clip(tmp_path):
    faults = {"--a": TypeError("'NoneType' object"), "b_b": KeyError("url"), "c": HTTPException("half a header")}
    counts = download_all(CLIPS, tmp_path, Site(**{clip: [fault] for clip, fault in faults.items()}), workers=2)
    assert counts == {"failed": 3, "done": 1}
    assert "failed,TypeError: 'NoneType' object," in (tmp_path / FATES).read_text()
    assert download_all(CLIPS, tmp_path, Site(), workers=1) == {"done": 4}


def test_an_id_is_no_reason_and_a_broken_connection_is_not_for_ever(tmp_path):
    told = {
        "Ab429cdEfgh": "ERROR: [youtube] Ab429cdEfgh: Private video. Sign in",
        "b_b": "the YouTube account associated with this video has been terminated",
        "c": "curl: (56) GnuTLS recv error (-110): The TLS connection was non-properly terminated.",
    }
    clock = Clock()
    site = Site(**{name: [answer] for name, answer in told.items()})
    download_all([(name, 1, "train") for name in told], tmp_path, site, workers=1, sleep=clock.sleep, clock=clock)
    assert fates(tmp_path) == {"Ab429cdEfgh": "gone", "b_b": "gone", "c": "failed"} and clock.slept == []


def test_the_halves_of_a_killed_process_are_deleted(tmp_path):
    for name in (".--a_000001.part/--a_000001.mp4", ".--a_000001.part/--a_000001.f134.mp4", ".b_000001.part/b.mp4"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"half")
    download_all([("--a", 1, "train")], tmp_path, Site(), workers=1)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["--a_000001.mp4", ".b_000001.part"]


def test_a_clip_costs_the_same_however_many_there_are(tmp_path, monkeypatch):
    """185,000 clips lie in one folder: listing it for each would take a day."""
    listed = []
    monkeypatch.setattr("os.scandir", lambda path, real=os.scandir: listed.append(str(path)) or real(path))
    monkeypatch.setattr("os.listdir", lambda path, real=os.listdir: listed.append(str(path)) or real(path))
    download_all([("a", 1, "train")], tmp_path, Site(b=["Private video"]), workers=1)
    assert str(tmp_path / "train") not in listed


def test_a_limit(tmp_path):
    site = Site()
    download_all(CLIPS, tmp_path, site, workers=1, limit=2)
    assert site.asked == ["--a", "b_b"]


def test_the_csv(tmp_path, monkeypatch):
    (tmp_path / "v.csv").write_text('--a,1,"people, clapping",train\nb,20,dog,test\n')
    assert read_clips(tmp_path / "v.csv") == [("--a", 1, "train"), ("b", 20, "test")]
    (tmp_path / "v.csv").write_text("a,b,c\n")
    with pytest.raises(UserError, match="expected rows of id"):
        read_clips(tmp_path / "v.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_clips(tmp_path / "absent.csv")


def test_without_yt_dlp_or_ffmpeg_one_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "v.csv").write_text("a,1,dog,train\n")
    monkeypatch.setattr("sys.argv", ["download", "--csv", str(tmp_path / "v.csv"), "--out", str(tmp_path / "out")])
    monkeypatch.setitem(__import__("sys").modules, "yt_dlp", None)
    with pytest.raises(UserError, match="requirements-download.txt"):
        main()


@pytest.mark.parametrize("out", ["list.csv", "/proc/no"])
def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path, monkeypatch, out):
    (tmp_path / "list.csv").write_text("a,1,dog,train\n")
    monkeypatch.setattr("datasets.download_vggsound.yt_dlp_download", Site)
    monkeypatch.setattr("sys.argv", ["download", "--csv", str(tmp_path / "list.csv"), "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match="--out .*: cannot be written"):
        main()
