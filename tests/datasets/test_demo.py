"""The demo data set: its files, that motion and sound belong together, that a still frame does not tell the class."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from datasets import demo
from tests.tiny import children, interrupted, wait_until
from utils.errors import UserError

NAMES = list(demo.CLASSES)
PER_CLASS = (12, 6)  # rendered clips for training and testing the classifiers below
CHANCE = 1 / len(NAMES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return demo.make(tmp_path_factory.mktemp("demo") / "set", workers=2, progress=False, train_clips=2, test_clips=1)


@pytest.fixture(scope="module")
def rendered():
    """Params, frames averaged to (T, 32, 32, 3) floats, sounds and labels of the training and of the test clips."""

    def render(indices):
        params = [demo.clip_params(name, i) for name in NAMES for i in indices]
        frames = [demo.render_frames(p).reshape(-1, 32, 4, 32, 4, 3).mean((2, 4)) / 255 for p in params]
        labels = np.array([NAMES.index(p.name) for p in params])
        return params, np.stack(frames), np.stack([demo.render_sound(p) for p in params]), labels

    first, then = PER_CLASS
    return render(range(first)), render(range(first, first + then))


def read(path):
    """Frames (T, H, W, 3), their times, waveform, its first time, the codecs' names."""
    with av.open(str(path)) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        frames = list(file.decode(video, audio))
        pictures = [f for f in frames if isinstance(f, av.VideoFrame)]
        sounds = [f for f in frames if isinstance(f, av.AudioFrame)]
        return (
            np.stack([f.to_ndarray(format="rgb24") for f in pictures]),
            np.array([f.time for f in pictures]),
            np.concatenate([f.to_ndarray()[0] for f in sounds]),
            sounds[0].time,
            (video.codec_context.name, audio.codec_context.name, audio.codec_context.sample_rate),
        )


# ---------------------------------------------------------------------------------------------------------------- files


def test_lists_name_every_file_once_and_share_no_group(small):
    lists = small / "ucfTrainTestlist"
    classes = dict(line.split()[::-1] for line in (lists / "classInd.txt").read_text().splitlines())
    assert classes == {name: str(i) for i, name in enumerate(NAMES, start=1)}
    train = [line.split() for line in (lists / "trainlist01.txt").read_text().splitlines()]
    test = (lists / "testlist01.txt").read_text().splitlines()
    assert all(label == classes[path.split("/")[0]] for path, label in train)
    assert "Bounce/v_Bounce_g01_c01.mp4" in [path for path, _ in train]
    assert (len(train), len(test)) == (2 * len(NAMES), len(NAMES))
    on_disk = sorted(path.relative_to(small / "videos").as_posix() for path in small.glob("videos/*/*"))
    assert sorted([path for path, _ in train] + test) == on_disk
    assert {path.rsplit("_", 1)[0] for path, _ in train}.isdisjoint(path.rsplit("_", 1)[0] for path in test)


def test_every_file_is_h264_and_aac_of_the_promised_length(small):
    for path in small.glob("videos/*/*.mp4"):
        frames, times, sound, sound_start, codecs = read(path)
        assert codecs == ("h264", "aac", demo.SAMPLE_RATE)
        assert frames.shape == (56, demo.SIZE, demo.SIZE, 3)
        np.testing.assert_allclose(times, np.arange(56) / demo.FPS, atol=1e-4)
        assert abs(sound_start) < 1e-3
        assert 0 <= len(sound) / demo.SAMPLE_RATE - demo.SECONDS < 1024 / demo.SAMPLE_RATE + 1e-3


@pytest.mark.parametrize("name", ["Spin", "Slide"])
def test_encoding_moves_neither_stream_in_time(small, name):
    params = demo.clip_params(name, 0)
    frames, _, sound, _, _ = read(small / "videos" / name / f"v_{name}_g01_c01.mp4")
    want = demo.render_frames(params).astype(float)
    error = [np.abs(frames[8:-8] - want[8 + lag : len(want) - 8 + lag]).mean() for lag in (-1, 0, 1)]
    assert np.argmin(error) == 1 and error[1] < 8
    want, length = demo.render_sound(params), 16000
    match = [np.dot(sound[8000 : 8000 + length], want[8000 + lag :][:length]) for lag in range(-64, 65)]
    assert abs(np.argmax(match) - 64) <= 8  # half a millisecond


def test_same_seed_same_pixels_sound_and_file(tmp_path):
    files = []
    for i in range(2):
        params = demo.clip_params("Jump", 5, seed=3)
        frames, sound = demo.render_frames(params), demo.render_sound(params)
        demo.write_clip(tmp_path / f"{i}.mp4", frames, sound)
        files.append((tmp_path / f"{i}.mp4").read_bytes())
    assert files[0] == files[1]
    other = demo.clip_params("Jump", 5, seed=4)
    assert not np.array_equal(demo.render_frames(other), frames)
    assert not np.array_equal(demo.render_sound(other), sound)


# ----------------------------------------------------------------------------------------------------------------- make


def test_a_complete_set_is_left_alone_and_a_different_one_refused(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert demo.make(small, workers=1, progress=False, train_clips=2, test_clips=1) == small
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before
    with pytest.raises(UserError, match="seed 0 instead of 1") as error:
        demo.make(small, seed=1, progress=False, train_clips=2, test_clips=1)
    assert str(small) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        demo.make(tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("text", "words"), [("", "cannot be read: .*"), ("[]", "is of no demo data set")])
def test_a_broken_marker_is_named(tmp_path, text, words):
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(UserError, match=f"/demo.json: {words}; delete .* or choose another folder"):
        demo.make(tmp_path)


def test_a_failing_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_clip", full_disk)
    with pytest.raises(UserError, match="cannot be written: .*No space"):
        demo.make(tmp_path / "set", workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_run_leaves_no_set_and_no_worker(tmp_path):
    root = tmp_path / "set"
    command = [sys.executable, "-m", "datasets.demo", "--root", str(root), "--workers", "2"]
    run = subprocess.Popen(command, cwd=Path(demo.__file__).parents[1], stderr=subprocess.DEVNULL)
    wait_until(lambda: list(tmp_path.glob(".set.*.tmp/videos/*/*.mp4")))
    workers = children(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert workers
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    assert not root.exists()


def test_ctrl_c_ends_all_in_a_line_and_leaves_nothing(tmp_path):
    command = ["datasets.demo", "--root", tmp_path / "set", "--workers", "2"]
    told = interrupted(command, lambda: list(tmp_path.glob(".set.*.tmp/videos/*/*.mp4")))
    assert told.endswith("interrupted\n") and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def is_running(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# ------------------------------------------------------------------------------------------- what can be seen and heard


def accuracy(train, train_labels, test, test_labels, penalty=30.0):
    """Test accuracy of a ridge classifier in its dual form, on z-normalised features (N, D)."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    gram = train @ train.T / train.shape[1]
    targets = np.eye(len(NAMES))[train_labels] - CHANCE
    weights = np.linalg.solve(gram + penalty / len(gram) * np.eye(len(gram)), targets)
    return ((test @ train.T / train.shape[1] @ weights).argmax(1) == test_labels).mean()


def still_features(frames):
    """Of frames (N, 32, 32, 3): a 16x16 thumbnail in colour and gray, and a colour histogram."""
    colour = frames.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    levels = (frames * 7.99).astype(int)
    histogram = np.stack([(levels == k).mean((1, 2)) for k in range(8)], axis=1)
    parts = (colour, colour.mean(-1), histogram)
    return np.concatenate([part.reshape(len(frames), -1) for part in parts], axis=1)


def spectrum(signal):
    return np.abs(np.fft.rfft(signal - signal.mean(1, keepdims=True), axis=1))


def motion_features(frames):
    """Of frames (N, T, 32, 32, 3): energy, place and direction of what differs from the median frame, over time."""
    gray = frames.mean(-1)
    moved = np.abs(gray - np.median(gray, axis=1, keepdims=True))
    area, axis = moved.sum((2, 3)) + 1e-3, np.arange(32)
    x, y = (moved.sum(2) * axis).sum(2) / area, (moved.sum(3) * axis).sum(2) / area
    energy = np.abs(np.diff(gray, axis=1)).sum((2, 3))
    speeds = [np.sort(np.diff(v, axis=1), axis=1) for v in (x, y)]
    return np.concatenate([np.sort(energy, 1), *speeds, *map(spectrum, (energy, x, y, area))], axis=1)


def sound_features(sounds):
    """Of sounds (N, L): mean, spread and change of a 32-band log spectrogram, and the spectrum of its envelope."""
    sounds = sounds / np.abs(sounds).max(1, keepdims=True)
    windows = np.lib.stride_tricks.sliding_window_view(sounds, 512, axis=1)[:, ::256]
    edges = np.unique(np.geomspace(2, 256, 33).astype(int))
    bands = np.log10(np.add.reduceat(np.abs(np.fft.rfft(windows * np.hanning(512))), edges, axis=-1)[..., :-1] + 1e-4)
    steps = np.abs(np.diff(bands, axis=1)).mean(1)
    return np.concatenate([bands.mean(1), bands.std(1), steps, spectrum(bands.mean(-1))[:, :30]], axis=1)


def test_a_still_frame_does_not_tell_the_class_but_a_second_of_motion_does(rendered):
    (_, train, _, train_labels), (_, test, _, test_labels) = rendered
    stills = (5, 21, 37, 53)
    still = accuracy(
        np.concatenate([still_features(train[:, t]) for t in stills]),
        np.tile(train_labels, len(stills)),
        np.concatenate([still_features(test[:, t]) for t in stills]),
        np.tile(test_labels, len(stills)),
    )
    second = slice(16, 32)
    motion = accuracy(
        motion_features(train[:, second]), train_labels, motion_features(test[:, second]), test_labels, penalty=3
    )
    assert still < 2 * CHANCE
    assert motion > 5 * CHANCE


def test_two_seconds_of_sound_tell_the_class(rendered):
    (_, _, train, train_labels), (_, _, test, test_labels) = rendered
    window = slice(8000, 40000)
    assert accuracy(sound_features(train[:, window]), train_labels, sound_features(test[:, window]), test_labels) > 0.5


def rhythm(features):
    """Strongest frequency of curves (N, T) at `demo.FPS`, between 0.8 and 4 Hz."""
    power = np.abs(np.fft.rfft((features - features.mean(1, keepdims=True)) * np.hanning(features.shape[1]), 1024))
    hertz = np.fft.rfftfreq(1024, 1 / demo.FPS)
    band = (hertz > 0.8) & (hertz < 4)
    return hertz[band][power[:, band].argmax(1)]


@pytest.mark.parametrize("name", ["Bounce", "Pulse", "Slide", "Orbit"])
def test_within_a_class_the_pitch_or_rhythm_heard_goes_with_the_rate_seen(rendered, name):
    _, frames, sounds, labels = rendered[0]
    of_class = labels == NAMES.index(name)
    gray, sounds = frames[of_class].mean(-1)[:, :, ::2, ::2].reshape(sum(of_class), 56, -1), sounds[of_class]
    seen = np.linalg.svd(gray - gray.mean(1, keepdims=True), full_matrices=False).U[..., 0]  # first component's course
    loud = np.abs(sounds).reshape(len(sounds), -1, demo.SAMPLE_RATE // demo.FPS).mean(2)
    power = np.abs(np.fft.rfft(sounds)) ** 2
    pitch = np.log((power * np.arange(power.shape[1])).sum(1) / power.sum(1))
    heard = rhythm(loud) if name in ("Bounce", "Pulse") else pitch
    assert np.corrcoef(rhythm(seen), heard)[0, 1] > 0.6


def test_a_bounce_is_heard_when_the_body_is_lowest():
    params = demo.clip_params("Bounce", 0)
    sound, frames = demo.render_sound(params), demo.render_frames(params).astype(float)
    loud = np.abs(sound).reshape(-1, demo.SAMPLE_RATE // demo.FPS).max(1)
    onsets = [t for t in range(2, 55) if loud[t] > 3 * loud[t - 1] and loud[t] > 0.3 * loud.max()]
    moved = np.abs(frames - np.median(frames, axis=0)).sum((2, 3))  # (T, H)
    row = (moved * np.arange(demo.SIZE)).sum(1) / moved.sum(1)  # downwards
    lowest = [t for t in range(2, 55) if row[t] > row[t - 1] and row[t] >= row[t + 1]]
    assert len(onsets) >= 3
    assert all(min(abs(t - u) for u in lowest) <= 1 for t in onsets)
