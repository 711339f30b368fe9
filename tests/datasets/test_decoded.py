"""datasets.decoded: kept videos give the samples that decoding gives, and are kept for the very file they are of."""

import json
import os
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from datasets import decoded
from datasets.decoded import DecodedFile, DecodedVideos
from datasets.decoding import VideoFile, probe
from datasets.video_dataset import EvenClips, TrainingClips, VideoList, make_loader
from tests.datasets.test_video_dataset import RECIPE
from tests.tiny import run, write_config

PLAIN_CROP = replace(RECIPE, transforms="crop+color", crop_size=24)
CENTRE = replace(RECIPE, augment=False)
LONG = replace(RECIPE, video_seconds=4.0, audio_seconds=4.0)  # longer than the videos
FORMATS = {
    "sub/bframes (#&!).mp4": {"gop": 250, "bframes": 3},
    "start.mp4": {"video_start": 1.5, "audio_start": 0.75, "audio_seconds": 3.0},
    "turned.mp4": {"rotation": 90},
    "odd.mp4": {"size": (65, 47), "pixels": "yuv444p", "audio_rate": 44100, "layout": "stereo"},
    "uneven.mp4": {"vfr_times": [0, 0.04, 0.4, 0.5, 0.52, 0.56, 1.2, 1.3, 1.9, 2.0]},
    "old.avi": {"codec": "mpeg4", "audio_codec": "pcm_s16le", "audio_rate": 48000},
    "late.ts": {},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video):
    """A video of each format, with sound."""
    root = tmp_path_factory.mktemp("videos")
    (root / "sub").mkdir()
    for name, options in FORMATS.items():
        make_video(root / name, **options)
    return VideoList(root, list(FORMATS))


@pytest.fixture
def opened(monkeypatch):
    """The files that FFmpeg opened."""
    files, plain = [], av.open
    monkeypatch.setattr(av, "open", lambda file, *rest, **options: files.append(file) or plain(file, *rest, **options))
    return files


def training(videos, kept=None, recipe=RECIPE, pairs=False, rate=RECIPE.sample_rate):
    store = kept and DecodedVideos(kept, 0 if pairs else rate)
    return TrainingClips(videos, recipe, 3, seed=0, pairs=pairs, decoded=store)


def samples(clips):
    keys = range(len(clips)) if isinstance(clips, EvenClips) else [(0, position) for position in range(len(clips))]
    return [clips[key] for key in keys]


def low(waveform):
    """What lies below 2 kHz of 16: where decoding began decides about the noise that AAC may put above."""
    spectrum = np.fft.rfft(np.asarray(waveform) * np.hanning(len(waveform)))
    spectrum[len(spectrum) // 4 :] = 0
    return np.fft.irfft(spectrum)


def assert_same(found, expected, noisy=False):
    """All the same to the bit, but for sound: resampled from another place on, or `noisy` as `low` tells."""
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() and a["failures"] == b["failures"]
        for key in a.keys() - {"failures"}:
            if key == "waveform":
                sounds = [low(sound) if noisy else sound for sound in (a[key], b[key])]
                np.testing.assert_allclose(*sounds, rtol=0, atol=1e-4 if noisy else 2e-6)
            else:
                assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


@pytest.mark.parametrize("recipe", [RECIPE, PLAIN_CROP, CENTRE, LONG])
@pytest.mark.parametrize("pairs", [False, True])
def test_samples_are_those_without_and_the_second_pass_decodes_nothing(tmp_path, videos, opened, recipe, pairs):
    expected = samples(training(videos, recipe=recipe, pairs=pairs))
    assert not any(sample["failures"] for sample in expected)
    assert_same(samples(training(videos, tmp_path, recipe, pairs)), expected)
    opened.clear()
    assert_same(samples(training(videos, tmp_path, recipe, pairs)), expected)
    assert opened == []


def test_even_windows_are_those_without(tmp_path, videos, opened):
    expected = samples(EvenClips(videos, CENTRE, 3))
    kept = DecodedVideos(tmp_path, CENTRE.sample_rate)
    for _ in range(2):
        opened.clear()
        assert_same(samples(EvenClips(videos, CENTRE, 3, kept)), expected)
    assert opened == []
    assert len(list(tmp_path.glob("sub/bframes (#&!).mp4.*.8000.decoded"))) == 1


def test_frames_are_the_nearest_ones_wherever_a_clip_starts(tmp_path, videos):
    """Before the first frame and after the last one, too, and at times midway between two."""
    kept = DecodedVideos(tmp_path, 0)
    for name in FORMATS:
        with VideoFile(videos.root / name) as file, kept.open(videos.root, name) as kept_file:
            assert isinstance(kept_file, DecodedFile) and kept_file.info == file.info
            start, end = file.span("video")
            assert kept_file.span("video") == (start, end)
            for at in (*np.arange(start - 0.3, end + 0.2, 0.1), *np.arange(start, end, 0.14)):
                window = {"video_start": float(at), "video_seconds": 0.3, "fps": 50, "crop": (3, 5, 21, 30)}
                clips = [either.read(**window) for either in (file, kept_file)]
                assert np.array_equal(clips[0].frames, clips[1].frames), (name, at)
                assert np.array_equal(clips[0].frame_times, clips[1].frame_times), (name, at)


def test_sound_is_kept_at_its_rate(tmp_path, videos):
    with DecodedVideos(tmp_path, 8000).open(videos.root, "turned.mp4") as file:
        with pytest.raises(ValueError, match="kept at 8000 Hz, not at 16000"):
            file.read(audio_start=0.0, audio_seconds=0.5, sample_rate=16000)
        outside = file.read(audio_start=-3.0, audio_seconds=9.0, sample_rate=8000).waveform
    assert outside.shape == (72000,) and not outside[:20000].any() and not outside[45000:].any()
    assert np.abs(outside[24500:39500]).max() > 0.4


def test_two_roots_with_the_same_names_are_kept_apart(tmp_path, make_video, opened, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lists = [VideoList(root, ["clip.mp4"]) for root in ("a", "b")]
    for seconds, videos in enumerate(lists, start=1):
        videos.root.mkdir()
        make_video(videos.path(0), seconds=seconds)
    first = [samples(training(videos, tmp_path / "kept")) for videos in lists]
    opened.clear()
    for videos, expected in zip(lists, first, strict=True):
        assert_same(samples(training(videos, tmp_path / "kept")), expected)
    shutil.copytree("a", "c")  # a job's copy, which keeps times
    samples(training(VideoList(tmp_path / "c", ["clip.mp4"]), tmp_path / "kept"))
    assert opened == []


@pytest.mark.parametrize("change", ["other content", "another time"])
def test_a_replaced_video_is_decoded_anew(tmp_path, make_video, opened, change):
    videos, kept = VideoList(tmp_path, ["clip.mp4"]), tmp_path / "kept"
    make_video(tmp_path / "clip.mp4", seconds=1.0)
    samples(training(videos, kept))
    if change == "other content":
        make_video(tmp_path / "clip.mp4", seconds=2.0, size=(80, 64))
    else:
        os.utime(tmp_path / "clip.mp4", ns=(0, 1))
    opened.clear()
    found = samples(training(videos, kept))
    assert len(opened) > 0
    assert_same(found, samples(training(videos)))
    opened.clear()
    samples(training(videos, kept))
    assert opened == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"?\n",
        lambda data: data.replace(b'"size"', b'"si"e"'),
    ],
)
def test_a_kept_file_that_is_not_whole_is_made_anew(tmp_path, make_video, damage):
    videos, store = VideoList(tmp_path, ["clip.mp4"]), tmp_path / "kept"
    make_video(tmp_path / "clip.mp4", seconds=1.0)
    expected = samples(training(videos, store))
    (kept,) = store.rglob("*.decoded")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert_same(samples(training(videos, store)), expected)
    assert kept.read_bytes() == whole


@pytest.fixture
def damaged(tmp_path, make_video):
    """A good video and three bad ones: cut off in the middle, no video at all, without sound; and one that is gone."""
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("good.mp4", "cut.mkv", "nothing.mp4", "silent.mp4"):
        make_video(root / name, seconds=4, audio_rate=None if name == "silent.mp4" else 16000)
    data = (root / "cut.mkv").read_bytes()
    (root / "cut.mkv").write_bytes(data[: len(data) // 2])
    (root / "nothing.mp4").write_text("no video")
    return VideoList(root, ["good.mp4", "cut.mkv", "nothing.mp4", "silent.mp4", "gone.mp4"])


@pytest.mark.parametrize("pairs", [False, True])
def test_bad_videos_are_read_as_without_and_tried_once(tmp_path, damaged, opened, pairs):
    recipe = replace(RECIPE, video_seconds=0.25, audio_seconds=0.25)
    expected = samples(training(damaged, None, recipe, pairs))
    of_cut = {bool(sample["failures"]) for sample in expected if sample["index"] == 1}
    assert pairs or False in of_cut, "its beginning can be read"
    assert any("cut.mkv" in str(sample["failures"]) for sample in expected)
    assert_same(samples(training(damaged, tmp_path / "kept", recipe, pairs)), expected)
    opened.clear()
    samples(training(VideoList(damaged.root, ["cut.mkv"]), None, recipe, pairs))
    without = len(opened)
    samples(training(VideoList(damaged.root, ["cut.mkv"]), tmp_path / "kept", recipe, pairs))
    assert without > 0 and len(opened) == 2 * without


def test_a_video_too_large_to_keep_is_decoded_each_time(tmp_path, videos, monkeypatch):
    monkeypatch.setattr(decoded, "LARGEST", 10_000)
    assert_same(samples(training(videos, tmp_path)), samples(training(videos)))
    assert max(path.stat().st_size for path in tmp_path.rglob("*.decoded")) < 1000


def test_processes_may_decode_the_same_video_at_once(tmp_path, videos):
    one = VideoList(videos.root, ["odd.mp4"])
    keys = [[(0, position)] for position in (0, 1, 2, 0)]
    loaders = [make_loader(training(one, kept), 2, batch_sampler=keys) for kept in (tmp_path, None)]
    for batch, expected in zip(*loaders, strict=True):
        assert_same([batch], [expected])
    (path,) = tmp_path.rglob("*.*")
    assert path.name.startswith("odd.mp4.") and path.name.endswith(".8000.decoded")


def losses(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [value for line in map(json.loads, lines) for key, value in line.items() if "loss" in key or "R@" in key]


@pytest.fixture(scope="module")
def ten(tmp_path_factory, make_video):
    """Ten videos for the scripts, in a sound that is resampled."""
    root = tmp_path_factory.mktemp("ten")
    for i in range(10):
        make_video(root / f"clip{i}.mov", seconds=1.6, fps=16, audio_rate=44100, audio_codec="pcm_s16le")
    return root


def test_a_run_has_the_losses_of_one_without(tmp_path, ten):
    changes = {"script": "main-vicreg.py", "monitor_every": 1, "optimizer__num_epochs": 1}
    for name, once in (("plain", False), ("kept", True)):
        file = write_config(tmp_path, ten, name, dataset__decode_once=once, **changes)
        run(file, script="main-vicreg.py")
    assert len(list((tmp_path / "cache/decoded").rglob("*.decoded"))) == 10
    plain = losses(tmp_path, "plain")
    assert len(plain) >= 4 and losses(tmp_path, "kept") == pytest.approx(plain, rel=1e-4)


def test_a_disk_that_is_full_ends_a_run_with_one_line(tmp_path, ten):
    (tmp_path / "full").touch()
    changes = {"model__arch": "vicreg_v_wrapper", "dataset__train__video_only": True, "dataset__decode_once": True}
    file = write_config(tmp_path, ten, "full", "main-vicreg.py", cache_dir=str(tmp_path / "full"), **changes)
    error = run(file, script="main-vicreg.py", status=2).stderr
    assert error.startswith("error: cache_dir: ") and error.count("\n") == 1
    assert ".0.decoded: could not be written" in error and "dataset.decode_once=false" in error


@pytest.mark.parametrize(
    ("source", "pairs"), [("grid-s1", False), ("vggsound-clips", False), ("fixtures/ucf101", True)]
)
def test_real_files(tmp_path, clips_root, opened, source, pairs):
    root = clips_root / source
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in (".mp4", ".avi"))
    small = [name for name in names[:20] if probe(root / name).video.height <= 360][:4]  # larger ones are not kept
    videos = VideoList(root, small)
    recipe = replace(RECIPE, crop_size=112, sample_rate=16000, video_seconds=1.0, video_fps=16, audio_seconds=2.0)
    expected = samples(training(videos, None, recipe, pairs))
    assert len(expected) >= 6 and not any(sample["failures"] for sample in expected)
    for _ in range(2):
        opened.clear()
        assert_same(samples(training(videos, tmp_path, recipe, pairs, 16000)), expected, noisy=source == "grid-s1")
    assert opened == []
