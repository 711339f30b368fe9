"""One raw video -> one prepared file: the same pictures, sound and times, up to compression."""

import av
import numpy as np
import pytest

from datasets.decoding import DecodeError, VideoFile, read_clip
from datasets.transcode import GOP, SAMPLE_RATE, inspect, prepared_size, transcode
from tests.datasets.test_decoding import damage
from utils.errors import UserError


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures, dB."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


def lag(a: np.ndarray, b: np.ndarray) -> int:
    """By how many samples `b` is behind `a`, by the peak of their cross-correlation."""
    return int(np.argmax(np.correlate(b, a, "full"))) - (len(a) - 1)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"bframes": 0, "gop": 250, "seconds": 3.0},
        {"audio_start": 0.3, "video_start": 0.0},
        {"audio_start": 0.0, "video_start": 0.4},
        {"audio_start": 1.5, "video_start": 1.2},
        {"vfr_times": [0.0, 0.04, 0.2, 0.21, 0.5, 0.9, 1.3, 1.31, 1.9]},
        {"rotation": 90},
        {"audio_rate": 44100, "layout": "stereo"},
    ],
)
def test_same_pictures_sound_and_times(make_video, frame_index, tmp_path, made):
    raw = make_video(tmp_path / "raw.mp4", **made)
    facts = transcode(raw, tmp_path / "new.mp4")
    old, new = read_clip(raw), read_clip(tmp_path / "new.mp4")
    assert len(new.frames) == len(old.frames) == facts.frames
    assert new.frames.shape == old.frames.shape  # small: not enlarged; a rotation is carried out
    assert (facts.width, facts.height) == new.frames.shape[2:0:-1]
    np.testing.assert_allclose(new.frame_times, old.frame_times - facts.shift, atol=1e-4)
    assert min(new.frame_times[0], VideoFile(tmp_path / "new.mp4").info.audio.start) < 1e-3  # one stream starts at 0
    assert psnr(old.frames, new.frames) > 30
    start = max(VideoFile(raw).info.audio.start, old.frame_times[0]) + 0.2
    sounds = [
        read_clip(file, audio_start=start - shift, audio_seconds=0.5, sample_rate=SAMPLE_RATE).waveform
        for file, shift in ((raw, 0.0), (tmp_path / "new.mp4", facts.shift))
    ]
    assert lag(*sounds) == 0
    assert np.abs(sounds[0] - sounds[1]).max() < 1e-3


def test_key_frames_are_close_and_most_frames_can_be_skipped(make_video, tmp_path):
    import av

    transcode(make_video(tmp_path / "raw.mp4", seconds=3.0, gop=250, bframes=3), tmp_path / "new.mp4")
    with av.open(str(tmp_path / "new.mp4")) as file:
        packets = [p for p in file.demux(video=0) if p.size]
        assert file.streams.audio[0].codec_context.name == "flac"
    times = np.array([packet.pts for packet in packets])
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert keys == list(range(0, len(packets), GOP))
    for i in keys:  # groups are closed: none is shown before its key frame or after the next one
        assert times[i] == times[i:].min()
    with av.open(str(tmp_path / "new.mp4")) as file:
        assert file.streams.video[0].codec_context.name == "h264"
        file.streams.video[0].codec_context.skip_frame = "NONREF"
        referred_to = sum(1 for _ in file.decode(video=0))
    assert 0.25 < referred_to / len(packets) < 0.36  # of a whole group 4 in 12


def test_size_is_reduced_to_even_numbers():
    assert prepared_size(1280, 720, 256) == (456, 256)
    assert prepared_size(720, 1280, 256) == (256, 456)
    assert prepared_size(320, 240, 256) == (320, 240)
    assert prepared_size(321, 241, 256) == (320, 240)
    assert prepared_size(103, 255, 256) == (102, 254)  # never enlarged
    assert prepared_size(1, 1, 256) == (2, 2)


def test_another_frame_rate_takes_the_nearest_frames(make_video, frame_index, tmp_path):
    raw = make_video(tmp_path / "raw.mp4", seconds=2.0, fps=25)
    facts = transcode(raw, tmp_path / "new.mp4", fps=10.0)
    new = read_clip(tmp_path / "new.mp4")
    np.testing.assert_allclose(np.diff(new.frame_times), 0.1, atol=1e-4)
    assert facts.frames == 20
    shown = [frame_index(frame) for frame in new.frames]
    assert shown == [int(np.ceil(i * 2.5 - 0.5)) for i in range(20)]  # of two equally near, the earlier


@pytest.mark.parametrize("fps", [None, 10.0])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8, 9, 13, 50])  # pictures are stored in another order than shown
def test_the_last_frame_is_held_as_long_as_in_the_raw_file(make_video, tmp_path, frames, fps):
    shown, end = frames / 25, frames / 25 + 4
    raw = make_video(tmp_path / "raw.mp4", seconds=shown, fps=25, audio_seconds=end, bframes=0)
    with av.open(str(raw)) as old, av.open(str(tmp_path / "held.mp4"), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        packets = [packet for packet in old.demux() if packet.dts is not None]
        last = max((packet for packet in packets if packet.stream.type == "video"), key=lambda packet: packet.pts)
        last.duration = round(4.04 / last.time_base)
        for packet in packets:
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    facts = transcode(tmp_path / "held.mp4", tmp_path / "new.mp4", fps=fps)
    assert facts.duration == pytest.approx(end, abs=0.1 if fps else 0.001)
    assert inspect(tmp_path / "new.mp4").duration == pytest.approx(facts.duration, abs=0.001)
    with VideoFile(tmp_path / "held.mp4") as held, VideoFile(tmp_path / "new.mp4") as new:
        assert held.span("video") == pytest.approx((0, end), abs=0.001)
        assert new.span("video") == pytest.approx((0, facts.duration), abs=0.001)
    start = {"video_start": end - 1.5, "video_seconds": 0.5, "fps": 16}
    assert psnr(read_clip(tmp_path / "held.mp4", **start).frames, read_clip(tmp_path / "new.mp4", **start).frames) > 30


@pytest.mark.parametrize("late", [0.0234, 0.01277, 0.5004])
def test_sound_that_begins_later_keeps_its_place_to_the_sample(make_video, tmp_path, late):
    options = {"audio_rate": 48000, "audio_codec": "mp2", "video_start": 1.0, "audio_start": 1.0 + late}
    raw = make_video(tmp_path / "raw.ts", seconds=4, **options)
    facts = transcode(raw, tmp_path / "new.mp4")
    old = read_clip(raw, audio_start=3.0, audio_seconds=0.5, sample_rate=16000).waveform
    start = 3.0 - facts.shift
    new = read_clip(tmp_path / "new.mp4", audio_start=start, audio_seconds=0.5, sample_rate=16000).waveform
    assert np.abs(new - old).max() < 1e-4  # 16 bits; one sample off, the chirp differs by 0.2


def test_sound_is_told_apart(make_video, tmp_path):
    kinds = {}
    kinds["sound"] = inspect(make_video(tmp_path / "a.mp4"))
    kinds["none"] = inspect(make_video(tmp_path / "b.mp4", audio_rate=None))
    for kind, facts in kinds.items():
        assert facts.audio == kind
    assert -12 < kinds["sound"].loudness < -6  # a sine of amplitude 0.5
    assert kinds["none"].loudness == -np.inf


@pytest.mark.parametrize(("volume", "loudness", "kind"), [(0.01, -49, "sound"), (0.001, -69, "silent")])
def test_a_track_is_silent_below_60_dbfs(make_video, tmp_path, volume, loudness, kind):
    raw = make_video(tmp_path / "raw.mov", seconds=0.5, audio_codec="pcm_s16le", volume=volume)
    for facts in (inspect(raw), transcode(raw, tmp_path / "new.mp4")):
        assert facts.audio == kind and facts.loudness == pytest.approx(loudness, abs=0.5)


def test_samples_of_16_bits_stay_what_they_are(make_video, tmp_path):
    raw = make_video(tmp_path / "raw.mov", seconds=0.5, audio_codec="pcm_s16le", volume=0.5)
    transcode(raw, tmp_path / "new.mp4")
    old, new = (read_clip(file, sample_rate=SAMPLE_RATE).waveform for file in (raw, tmp_path / "new.mp4"))
    assert old.any() and np.array_equal(old, new)


def test_a_smaller_picture_shows_the_mean_of_what_it_covers(make_video, tmp_path):
    raw = make_video(tmp_path / "raw.mp4", size=(32, 32), seconds=3.5, audio_rate=None)
    transcode(raw, tmp_path / "new.mp4", short_side=4)
    old, new = read_clip(raw).frames, read_clip(tmp_path / "new.mp4").frames
    assert new.shape == (len(old), 4, 4, 3)
    expected = old.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4))  # of two stripes, such as a bright and a dark one
    assert np.abs(new - expected).mean() < 5


def test_a_still_picture_is_told_apart(make_video, tmp_path):
    moving = make_video(tmp_path / "a.mp4")
    assert not inspect(moving).still
    still = make_video(tmp_path / "b.mp4", vfr_times=[0.0, 5.0])  # its second frame comes when all is over
    with VideoFile(still) as file:
        assert sum(1 for _ in file.frames()) == 2
    one = make_video(tmp_path / "c.mp4", seconds=0.04)
    assert inspect(one).still


def test_what_cannot_be_read_leaves_nothing_behind(make_video, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    sound = make_video(tmp_path / "sound.mp4", video=False)
    for source in (tmp_path / "text.mp4", sound, tmp_path / "absent.mp4"):
        with pytest.raises(DecodeError, match=source.name):
            transcode(source, tmp_path / "out" / "new.mp4")
    assert not list((tmp_path / "out").glob("**/*"))


def test_pictures_lost_in_the_middle_are_not_held_over(make_video, tmp_path):
    raw = make_video(tmp_path / "raw.mp4", seconds=8, gop=25)
    damage(raw, "video", 2, 5)
    for prepare in (inspect, lambda file: transcode(file, tmp_path / "new.mp4")):
        with pytest.raises(DecodeError, match=r"raw.mp4: asked for: all frames; found: packets around .* not decode"):
            prepare(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.mp4"]


@pytest.mark.parametrize("hole", [(0, 1.5), (6, 9)])
def test_pictures_lost_at_an_end_make_the_video_shorter(make_video, tmp_path, hole):
    raw = make_video(tmp_path / "raw.mp4", seconds=8, gop=25)
    damage(raw, "video", *hole)
    facts = transcode(raw, tmp_path / "new.mp4")
    assert facts.declared == 8 and 5 < facts.duration < 7


def test_what_a_truncated_file_lacks_is_known_without_a_duration_of_its_video(make_video, tmp_path):
    raw = make_video(tmp_path / "raw.flv", seconds=6, audio_rate=44100)
    assert inspect(raw).declared == pytest.approx(6, abs=0.1)
    raw.write_bytes(raw.read_bytes()[: raw.stat().st_size // 2])
    assert inspect(raw).declared - inspect(raw).duration > 2


@pytest.mark.parametrize("hole", [(-1, 2), (2, 5), (6, 9)])
def test_sound_lost_anywhere_is_broken(make_video, tmp_path, hole):
    raw = make_video(tmp_path / "raw.mp4", seconds=8)
    assert transcode(raw, tmp_path / "new.mp4").audio == "sound"
    damage(raw, "audio", *hole)
    assert inspect(raw).audio == transcode(raw, tmp_path / "new.mp4").audio == "broken"
    assert VideoFile(tmp_path / "new.mp4").info.audio is None


@pytest.mark.parametrize("prepare", [inspect, lambda raw: transcode(raw, raw.with_name("new.mp4"))])
def test_a_picture_that_cannot_be_converted_is_named(make_video, tmp_path, monkeypatch, prepare):
    def refuse(motion, time, frame):
        raise av.error.InvalidDataError(0, "bad\npicture")

    monkeypatch.setattr("datasets.transcode._Motion.see", refuse)
    with pytest.raises(DecodeError, match=r"raw.mp4: asked for: .*; found: .*bad picture"):
        prepare(make_video(tmp_path / "raw.mp4", seconds=0.4))


def test_a_failing_disk_leaves_nothing_behind(make_video, tmp_path):
    raw = make_video(tmp_path / "raw.mp4")
    (tmp_path / "file").write_text("in the way of a folder")
    with pytest.raises(UserError, match="could not be written"):
        transcode(raw, tmp_path / "file" / "new.mp4")


def test_real_clips(clips_root, tmp_path):
    files = (
        sorted(clips_root.glob("vggsound-clips/test/*.mp4"))[:1] + sorted(clips_root.glob("fixtures/hmdb51/*/*/*"))[:2]
    )
    for raw in files:
        facts = transcode(raw, tmp_path / raw.name)
        with VideoFile(raw) as file:
            start = file.info.video.start + 0.503  # no moment lies half-way between two frames
        old = read_clip(raw, video_start=start, video_seconds=0.5, fps=16)
        new = read_clip(tmp_path / raw.name, video_start=start - facts.shift, video_seconds=0.5, fps=16)
        np.testing.assert_allclose(new.frame_times, old.frame_times - facts.shift, atol=0.5 / facts.fps)
        if old.frames.shape == new.frames.shape:
            assert psnr(old.frames, new.frames) > 35
