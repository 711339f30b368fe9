import os
import pickle
import time
from functools import partial

import av
import numpy as np
import pytest

from datasets import decoder_run, waveform
from datasets.decoding import ANY_METADATA, DecodeError, VideoFile, probe, read_clip

FORMATS = {
    "bframes.mp4": {"gop": 250, "bframes": 3, "seconds": 4},
    "start.mp4": {"gop": 250, "bframes": 3, "seconds": 3, "video_start": 1.5, "audio_start": 0.75},
    "h265.mp4": {"codec": "libx265", "gop": 25, "options": {"x265-params": "log-level=none"}},
    "late.ts": {"gop": 12},
    "rounded.mkv": {"audio_codec": "pcm_s16le", "audio_rate": 44100, "layout": "stereo"},
    "old.avi": {"codec": "mpeg4", "audio_rate": None},
    "vp8.webm": {"codec": "libvpx", "audio_codec": "libopus", "audio_rate": 48000},
    "odd.mp4": {"size": (65, 47), "pixels": "yuv444p", "audio_rate": 44100},
}


@pytest.fixture(scope="module", params=FORMATS)
def media(request, tmp_path_factory, make_video):
    return make_video(tmp_path_factory.mktemp("media") / request.param, **FORMATS[request.param])


@pytest.fixture(scope="module")
def video(tmp_path_factory, make_video):
    return make_video(tmp_path_factory.mktemp("media") / "video.mp4", seconds=4, gop=250, bframes=3)


def decode_all(path):
    """Times and decoded frames of the whole video stream, in output order: PyAV alone, nothing skipped or sought."""
    frames, times = [], []
    with av.open(str(path), **ANY_METADATA) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                frames += packet.decode()
            except av.error.FFmpegError:
                continue
        step = 1 / float(stream.average_rate or 25)
        for frame in frames:
            stamp = frame.dts if container.format.name == "avi" else frame.pts
            times.append(times[-1] + step if stamp is None else float(stamp * frame.time_base))
    return np.array(times), frames


def colourful(path, x264, seconds):
    """A file of 128 x 96 pictures that change fast, 25 a second, made by x264 with these parameters."""
    y, x = np.mgrid[:96, :128]
    options = {"g": "20", "bf": "0", "x264-params": f"{x264}:log-level=none"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for i in range(25 * seconds):
            picture = np.stack([x * 3 + i * 7, y * 5 + i * 11, (x + y) * 2 + i * 13], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def assert_nearest(path, times, frames, starts, rotation=0):
    """Clips at `starts`, from one open file, equal those picked from the decode of the whole file."""
    with VideoFile(path) as file:
        for k, start in enumerate(starts):
            fps = (8, 16, 30, 60)[k % 4]
            clip = file.read(video_start=start, video_seconds=0.5, fps=fps)
            targets = start + np.arange(round(0.5 * fps)) / fps
            nearest = np.abs(times - targets[:, None]).argmin(1)
            np.testing.assert_allclose(clip.frame_times, times[nearest], atol=1e-6)
            for i in (0, len(targets) // 2, len(targets) - 1):
                expected = np.rot90(frames[nearest[i]].to_ndarray(format="rgb24"), rotation // 90)
                assert np.array_equal(clip.frames[i], expected), (start, fps, i)


def assert_audio_equals_whole(path, starts, rate, tolerance=1e-3):
    """Clips at `starts` equal the whole file's samples; half an output sample of shift is left to rounded stamps."""
    first = probe(path).audio.start
    whole = read_clip(path, sample_rate=rate).waveform
    with VideoFile(path) as file:
        for start in starts:
            clip = file.read(audio_start=start, audio_seconds=0.5, sample_rate=rate)
            assert len(clip.waveform) == round(0.5 * rate) and clip.sample_rate == rate
            at = round(start * rate) - round(first * rate)
            np.testing.assert_allclose(clip.waveform, whole[at : at + len(clip.waveform)], atol=tolerance)


# Video


def test_clips_equal_a_full_decode(media):
    times, frames = decode_all(media)
    starts = np.random.default_rng(0).uniform(times[0] - 0.2, times[-1] - 0.1, 12)
    assert_nearest(media, times, frames, starts)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_picture_that_is_refreshed_piece_by_piece(tmp_path, ending):
    """After a seek decoders give out frames that are half made of ones before it; only their not being keys tells."""
    path = colourful(tmp_path / f"refresh.{ending}", "intra-refresh=1", seconds=8)
    assert_nearest(path, *decode_all(path), np.arange(0.513, 7.4, 0.351))


def test_whole_file_shows_every_frame_in_order(media, frame_index):
    clip = read_clip(media)
    times, frames = decode_all(media)
    assert [frame_index(frame) for frame in clip.frames] == list(range(len(frames)))
    np.testing.assert_allclose(clip.frame_times, times)
    assert clip.frames.dtype == np.uint8 and clip.frame_times.dtype == np.float64


def test_frames_of_an_avi_that_are_stored_in_another_order(tmp_path, make_video, frame_index):
    """An AVI has no times at which frames are shown; those that FFmpeg makes up jump back and forth."""
    path = make_video(tmp_path / "bframes.avi", bframes=2, audio_rate=None)
    clip = read_clip(path)
    assert [frame_index(frame) for frame in clip.frames] == list(range(50))
    assert (np.diff(clip.frame_times) > 0).all()
    clip = read_clip(path, video_start=0.52, video_seconds=0.4, fps=25)
    first = frame_index(clip.frames[0])
    assert [frame_index(frame) for frame in clip.frames] == list(range(first, first + 10))


def test_frames_are_those_nearest_in_time(video, frame_index):
    clip = read_clip(video, video_start=1.03, video_seconds=1.0, fps=10)
    expected = [round((1.03 + i / 10) * 25) for i in range(10)]
    assert [frame_index(frame) for frame in clip.frames] == expected
    assert clip.waveform.shape == (0,) and clip.sample_rate == 0


def test_of_two_equally_near_frames_the_earlier(video, frame_index):
    clip = read_clip(video, video_start=1.02, video_seconds=0.16, fps=25)
    assert [frame_index(frame) for frame in clip.frames] == [25, 26, 27, 28]


def test_variable_rate_and_long_gaps(tmp_path, make_video, frame_index):
    times = np.cumsum(np.random.default_rng(3).choice([0.01, 0.03, 0.1, 0.9], 40))
    path = make_video(tmp_path / "vfr.mp4", vfr_times=times.tolist(), gop=250, bframes=3, audio_rate=None)
    for start in np.linspace(times[0], times[-1] - 1, 15):
        clip = read_clip(path, video_start=start, video_seconds=1.0, fps=20)
        targets = start + np.arange(20) / 20
        assert [frame_index(f) for f in clip.frames] == np.abs(times - targets[:, None]).argmin(1).tolist()


def test_skipping_is_used_and_changes_nothing(video, monkeypatch):
    times, frames = decode_all(video)
    starts = np.random.default_rng(1).uniform(0, 3.5, 20)
    assert_nearest(video, times, frames, starts)
    pick = partial(decoder_run.nearest, start=3.0, fps=8, number=5)
    with VideoFile(video) as file:
        given_out = []
        run = decoder_run.Run(file._container, file._stream("video"), file.info.video, from_start=True)
        decode = run._decode
        monkeypatch.setattr(run, "_decode", lambda packet: given_out.extend(found := decode(packet)) or found)
        chosen = run.pick_sparingly(pick, 3.0, 3.5)
        run = decoder_run.Run(file._container, file._stream("video"), file.info.video, from_start=False)
        assert run.pick_sparingly(pick, 3.0, 3.5) == [], "the file has no more packets"
    assert [time for time, _ in chosen] == pytest.approx([3.0, 3.12, 3.24, 3.36, 3.48], abs=1e-6)
    assert len(given_out) < 60, "of the 88 frames up to the last one chosen"


def test_what_is_chosen_sparingly_is_what_a_full_decode_gives(media):
    times, _ = decode_all(media)
    with VideoFile(media) as sparing, VideoFile(media) as full:
        for start in np.random.default_rng(2).uniform(times[0] - 0.3, times[-1], 15):
            full._sparing = False
            for arguments in ({"fps": 7}, {"fps": 60}, {}):
                clips = [file.read(video_start=start, video_seconds=0.4, **arguments) for file in (sparing, full)]
                assert np.array_equal(clips[0].frame_times, clips[1].frame_times)
                assert np.array_equal(clips[0].frames, clips[1].frames)
        if media.suffix in (".mp4", ".mkv"):  # an index lets a seek land on a key frame
            assert sparing._sparing


@pytest.mark.parametrize(
    "fault", ["a frame that does not come", "another time", "doubled stamps", "no stamp", "too much"]
)
def test_where_stamps_of_packets_mislead_everything_is_decoded(video, monkeypatch, fault):
    asked = {"video_start": 2.0, "video_seconds": 1.0, "fps": 8}
    expected = read_clip(video, **asked)
    with VideoFile(video) as file:
        chosen, tried = decoder_run.Run.pick_sparingly, []
        decode, list_packets = decoder_run.Run._decode, decoder_run.Run._packets_up_to

        def pick_misled(run, *arguments):
            tried.append(run)
            if fault == "a frame that does not come":
                run._decode = lambda packet: decode(run, packet)[1:]
            elif fault == "another time":
                run._clock = run._clock[0], run._clock[1] + 1
                run._packets_up_to = lambda last: [(t + 0.003, p) for t, p in list_packets(run, last)]
            elif fault == "too much":
                monkeypatch.setattr(decoder_run, "MOST_HELD", 1000)
            elif fault == "doubled stamps":
                run._packets_up_to = lambda last: [(round(t, 1), p) for t, p in list_packets(run, last)]
            else:
                run._packets_up_to = lambda last: [(float("nan"), p) for _, p in list_packets(run, last)]
            return chosen(run, *arguments)

        monkeypatch.setattr(decoder_run.Run, "pick_sparingly", pick_misled)
        for _ in range(3):
            clip = file.read(**asked)
            assert np.array_equal(clip.frame_times, expected.frame_times)
            assert np.array_equal(clip.frames, expected.frames)
    assert len(tried) == 1, "what failed once is not tried on this file again"


@pytest.mark.parametrize(
    "made", [{}, {"size": (65, 47), "pixels": "yuv444p"}, {"rotation": 90}, {"size": (66, 48)}, "interlaced=1:tff=1"]
)
def test_a_crop_is_a_part_of_the_whole(tmp_path, make_video, made):
    if isinstance(made, str):
        path = colourful(tmp_path / "a.mp4", made, seconds=1)
    else:
        path = make_video(tmp_path / "a.mp4", seconds=1, audio_rate=None, **made)
    asked, rng = {"video_start": 0.2, "video_seconds": 0.3, "fps": 10}, np.random.default_rng(0)
    with VideoFile(path) as file:
        whole = file.read(**asked).frames
        for _ in range(20):
            height, width = (int(rng.integers(1, side + 1)) for side in whole.shape[1:3])
            top, left = int(rng.integers(whole.shape[1] - height + 1)), int(rng.integers(whole.shape[2] - width + 1))
            part = file.read(**asked, crop=(top, left, height, width)).frames
            assert np.array_equal(part, whole[:, top : top + height, left : left + width])
        with pytest.raises(ValueError, match="must lie inside"):
            file.read(**asked, crop=(1, 0, *whole.shape[1:3]))


def test_each_chosen_frame_is_converted_once(video, monkeypatch):
    class Counting:
        calls = 0

        def __init__(self, inner):
            self.inner = inner

        def reformat(self, *args, **kwargs):
            Counting.calls += 1
            return self.inner.reformat(*args, **kwargs)

    with VideoFile(video) as file:
        monkeypatch.setattr(file, "_reformatter", Counting(file._reformatter))
        clip = file.read(video_start=1, video_seconds=1, fps=100)
    assert len(clip.frames) == 100 and Counting.calls == len(np.unique(clip.frame_times)) == 26


def test_short_video_repeats_its_borders(tmp_path, make_video, frame_index):
    path = make_video(tmp_path / "short.mp4", seconds=0.2, audio_rate=None)
    clip = read_clip(path, video_start=-0.2, video_seconds=1.0, fps=10)
    assert [frame_index(f) for f in clip.frames] == [0, 0, 0, 2, 4, 4, 4, 4, 4, 4]
    assert (clip.frame_times[-5:] == clip.frame_times[-1]).all()


def test_one_frame(tmp_path, make_video):
    path = make_video(tmp_path / "one.mp4", seconds=0.04, audio_rate=None)
    assert read_clip(path).frames.shape == (1, 48, 64, 3)
    assert read_clip(path, video_start=0, video_seconds=1, fps=16).frames.shape == (16, 48, 64, 3)


def test_all_frames_of_a_window(video, frame_index):
    clip = read_clip(video, video_start=1.0, video_seconds=0.4)
    assert [frame_index(frame) for frame in clip.frames] == list(range(25, 35))
    clip = read_clip(video, video_start=3.6)
    assert [frame_index(frame) for frame in clip.frames] == list(range(90, 100))
    with pytest.raises(DecodeError, match="no frame there"):
        read_clip(video, video_start=7.0, video_seconds=0.4)


def test_rate_without_an_end(video, frame_index):
    clip = read_clip(video, fps=5)
    assert [frame_index(frame) for frame in clip.frames] == list(range(0, 100, 5))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_video_is_upright(tmp_path, make_video, frame_index, degrees):
    path = make_video(tmp_path / "turned.mp4", rotation=degrees, seconds=0.4, audio_rate=None)
    info = probe(path).video
    assert (info.rotation, info.width, info.height) == (degrees, *((48, 64) if degrees % 180 else (64, 48)))
    clip = read_clip(path)
    assert clip.frames.shape == (10, info.height, info.width, 3)
    stored = [np.rot90(frame, -degrees // 90) for frame in clip.frames]
    assert [frame_index(frame) for frame in stored] == list(range(10))


def test_seek_and_reading_order_do_not_matter(video):
    arguments = {"audio_seconds": 0.5, "sample_rate": 16000, "video_seconds": 0.5, "fps": 16}
    starts = (2.0, 0.0, 3.2, 1.1, 2.0)
    with VideoFile(video) as file:
        together = [file.read(video_start=s, audio_start=s + 0.1, **arguments) for s in starts]
    for clip, start in zip(together, starts, strict=True):
        alone = read_clip(video, video_start=start, video_seconds=0.5, fps=16)
        sound = read_clip(video, audio_start=start + 0.1, audio_seconds=0.5, sample_rate=16000)
        assert np.array_equal(clip.frames, alone.frames) and np.array_equal(clip.waveform, sound.waveform)


# Audio


def test_audio_clips_equal_the_whole(media):
    info = probe(media).audio
    if info is None:
        with pytest.raises(DecodeError, match="no audio stream"):
            read_clip(media, audio_start=0, audio_seconds=1)
        return
    starts = np.random.default_rng(0).uniform(info.start + 0.1, info.start + info.duration - 0.6, 6)
    tolerance = 0.15 if media.suffix in (".mkv", ".webm") else 1e-3  # a chirp of up to 1.1 kHz, a sample early or late
    for rate in (16000, 44100, info.sample_rate):
        assert_audio_equals_whole(media, starts, rate, tolerance)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("start", [0.75, 1.0, 1.23456, 2.0])
@pytest.mark.parametrize("name", ["aac.mp4", "pcm.mov"])
def test_samples_lie_at_their_time(tmp_path_factory, make_video, chirp, name, start, rate):
    path = tmp_path_factory.getbasetemp() / name
    if not path.exists():
        codec = {"audio_codec": "pcm_s16le"} if name == "pcm.mov" else {}
        make_video(path, seconds=3, video_start=0.5, audio_start=0.7, audio_rate=32000, layout="stereo", **codec)
    clip = read_clip(path, audio_start=start, audio_seconds=0.5, sample_rate=rate)
    expected = chirp(round(start * rate) / rate + np.arange(round(0.5 * rate)) / rate)
    assert clip.waveform.dtype == np.float32 and clip.waveform.shape == expected.shape
    inner = slice(rate // 20, None)  # AAC needs a moment after the first sample
    np.testing.assert_allclose(clip.waveform[inner], expected[inner], atol=0.02)  # a sample early: 0.1


def test_outside_the_stream_is_silence(video, chirp):
    clip = read_clip(video, audio_start=-1.0, audio_seconds=6.0, sample_rate=16000)
    assert clip.waveform.shape == (96000,)
    assert np.abs(clip.waveform[:15900]).max() < 1e-3 and np.abs(clip.waveform[82000:]).max() < 1e-3
    np.testing.assert_allclose(clip.waveform[20000:79000], chirp(np.arange(4000, 63000) / 16000), atol=0.02)
    assert not read_clip(video, audio_start=9.0, audio_seconds=0.5).waveform.any()


@pytest.mark.parametrize("layout", ["stereo", "5.1"])
def test_mono_mix_keeps_the_level(tmp_path, make_video, chirp, layout):
    path = make_video(tmp_path / "wide.mov", audio_codec="pcm_s16le", audio_rate=48000, layout=layout, video=False)
    waveform = read_clip(path).waveform
    np.testing.assert_allclose(waveform, chirp(np.arange(len(waveform)) / 48000), atol=1e-3)


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize("codec", ["flac", "aac", "pcm_s16le", "pcm_s32le", "pcm_f32le"])
def test_what_is_mixed_here_is_what_swresample_mixes(tmp_path, make_video, monkeypatch, codec, layout):
    path = make_video(tmp_path / "a.mkv", video=False, audio_codec=codec, layout=layout)
    direct = read_clip(path).waveform
    assert len(np.unique(direct)) > 1000
    monkeypatch.setattr(waveform, "SAMPLES", {})
    np.testing.assert_allclose(direct, read_clip(path).waveform, rtol=0, atol=1e-7)


@pytest.mark.parametrize("format", ["flt", "fltp"])
@pytest.mark.parametrize("channels", [1, 2])
def test_loud_samples_are_mixed_as_by_swresample_and_broken_ones_silent(format, channels):
    samples = np.random.default_rng(0).normal(0, 1, (channels, 1000)).astype(np.float32)

    def frame():
        data = samples if format == "fltp" else samples.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format, ("mono", "stereo")[channels - 1])
        frame.sample_rate = 16000
        return frame

    def cut(rate=16000):
        return waveform.cut([(0.0, waveform._mean_of_channels(frame()))], 16000, 0.0, rate, rate // 16)

    (mixed,) = av.AudioResampler("s32p", "mono", 16000).resample(frame())
    expected = mixed.to_ndarray()[0].astype(np.float32) / 2**31
    np.testing.assert_allclose(cut(), expected, rtol=0, atol=1e-7)
    samples[0, ::100], expected[::100] = np.nan, 0.0
    np.testing.assert_allclose(cut(), expected, rtol=0, atol=1e-7)
    samples[0, 1::100] = np.inf
    assert np.isfinite(cut(8000)).all()


def test_gaps_are_zeros_and_overlaps_are_trimmed():
    ones = np.ones(100, np.float32)
    pieces = [(0.0, ones), (0.1, 2 * ones), (0.5, 3 * ones), (0.55, 4 * ones)]
    cut = waveform.cut([(t, s / 8) for t, s in pieces], 1000, 0.0, 1000, 700) * 8
    expected = np.concatenate([ones, 2 * ones, 0 * ones, 0 * ones, 0 * ones, 3 * ones, 4 * ones[:50], 0 * ones[:50]])
    np.testing.assert_array_equal(cut, expected)


def test_rounded_stamps_make_no_gaps():
    rate, size = 44100, 1024
    signal = np.sin(np.arange(50 * size) / 30).astype(np.float32) / 2
    pieces = [(round(k * size / rate, 3), signal[k * size : (k + 1) * size]) for k in range(50)]
    cut = waveform.cut(pieces, rate, 0.2, rate, 20000)
    shift = min(range(-30, 31), key=lambda s: np.abs(cut - signal[8820 + s :][:20000]).max())
    assert np.array_equal(cut, signal[8820 + shift :][:20000]) and abs(shift) <= 3


# What a file is, and what it is not


def test_probe_tells_streams_without_decoding(tmp_path, make_video, monkeypatch):
    path = make_video(tmp_path / "start.mp4", seconds=2, video_start=1.0, audio_start=0.5, audio_codec="aac")
    monkeypatch.setattr(decoder_run.Run, "__iter__", None)
    info = probe(str(path))
    assert info.path == str(path) and info.video.codec == "h264" and info.audio.codec == "aac"
    assert (info.video.start, info.video.duration, info.video.fps, info.video.frames) == (1.0, 2.0, 25.0, 50)
    assert info.audio.start == pytest.approx(0.5, abs=0.07) and info.audio.duration == pytest.approx(2, abs=0.07)
    assert (info.audio.sample_rate, info.audio.channels) == (16000, 1)


@pytest.mark.parametrize("name", ["live.mkv", "bare.h264"])
def test_without_a_declared_end_a_stream_ends_with_its_data(tmp_path, make_video, frame_index, monkeypatch, name):
    live = name == "live.mkv"
    path = make_video(
        tmp_path / name,
        seconds=3,
        audio_rate=16000 if live else None,
        container_options={"live": "1"} if live else None,
    )
    with VideoFile(path) as file:
        assert file.info.video.duration == 0
        with monkeypatch.context() as patch:
            patch.setattr(decoder_run.Run, "__iter__", None)
            assert file.span("video") == pytest.approx((0, 3), abs=0.081)
            if live:
                assert file.span("audio") == pytest.approx((0, 3), abs=0.13)
        frames = file.read(video_start=2, video_seconds=2, fps=5).frames  # as where the end is declared: repeated
        assert [frame_index(frame) for frame in frames[:5]] == [50, 55, 60, 65, 70]
        assert [frame_index(frame) for frame in frames[5:]] == [74] * 5


def test_a_stream_that_is_missing(tmp_path, make_video):
    silent = make_video(tmp_path / "silent.mp4", audio_rate=None, seconds=0.4)
    deaf = make_video(tmp_path / "blind.m4a", video=False, seconds=0.4)
    assert read_clip(silent).waveform.shape == (0,) and read_clip(deaf).frames.shape == (0, 0, 0, 3)
    for path, arguments in ((silent, {"sample_rate": 16000}), (silent, {"audio_start": 0}), (deaf, {"fps": 8})):
        with pytest.raises(DecodeError, match="no (audio|video) stream") as caught:
            read_clip(path, **arguments)
        assert str(path) in str(caught.value)
    with VideoFile(silent) as file, pytest.raises(DecodeError, match="no audio stream"):
        file.span("audio")


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("mp3", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture) + cover.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence) + sound.encode(None))
    assert probe(path).video is None
    assert not read_clip(path).waveform.any()


def test_what_is_no_media(tmp_path):
    text = "a text of several lines\n" * 50
    for name in ("notes.txt", "clip.mp4", "table.csv", "code.py", "movie.avi", "page.m3u8"):
        (tmp_path / name).write_text(text)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    began = time.monotonic()
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.mp4", "nul\0byte.mp4"]:
        with pytest.raises(DecodeError) as caught:
            read_clip(path)
        message = str(caught.value)
        assert str(path) in message and "found: " in message and "\n" not in message
    assert time.monotonic() - began < 5


def test_wrong_extension_and_odd_names_are_read(tmp_path, video, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("video.avi", "data:a%03d.mp4", "--id_#1 (2)!.mp4", "no-extension", os.fsdecode(b"latin\xe9.mp4")):
        (tmp_path / name).write_bytes(video.read_bytes())
        assert len(read_clip(name, video_start=0, video_seconds=0.2).frames) == 5


def test_error_crosses_processes():
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4: asked for: open; found: nothing")))
    assert isinstance(error, DecodeError) and str(error) == "a.mp4: asked for: open; found: nothing"


BAD_ARGUMENTS = [{"fps": 0}, {"video_seconds": -1}, {"audio_start": float("nan")}, {"video_seconds": 0.1, "fps": 4}]
BAD_ARGUMENTS += [{"sample_rate": 8000.5}]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_arguments_are_checked(video, arguments):
    with pytest.raises(ValueError, match="must be"):
        read_clip(video, **arguments)


def test_a_rate_may_be_a_whole_float(video):
    clips = [read_clip(video, audio_start=0.2, audio_seconds=0.5, sample_rate=rate) for rate in (8000, 8000.0)]
    assert np.array_equal(clips[0].waveform, clips[1].waveform) and type(clips[1].sample_rate) is int


# Damage


def damage(path, kind, start, stop):
    """Overwrite the packets of one stream whose times lie between `start` and `stop` seconds."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        packets = [p for p in container.demux(stream) if p.size and start <= p.pts * p.time_base < stop]
        places = [(packet.pos, packet.size) for packet in packets]
    data = bytearray(path.read_bytes())
    for position, size in places:
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)


def test_truncated_file(tmp_path, make_video, frame_index):
    path = make_video(tmp_path / "cut.mkv", seconds=8, audio_codec="pcm_s16le")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    whole = read_clip(path)
    assert 80 < len(whole.frames) < 120 and 3.2 < len(whole.waveform) / 16000 < 4.8
    sure = len(whole.frames) - 4  # the cut may go through the last B-frames
    assert [frame_index(frame) for frame in whole.frames[:sure]] == list(range(sure))
    assert len(read_clip(path, video_start=2, video_seconds=1, fps=8).frames) == 8
    for arguments in ({"video_start": 6, "fps": 8, "video_seconds": 1}, {"audio_start": 6, "audio_seconds": 1}):
        with pytest.raises(DecodeError, match=r"of the 8\.000 s declared"):
            read_clip(path, **arguments)


@pytest.fixture(params=["a.flv", "a.mkv"])
def unequal(request, tmp_path, make_video):
    """A file of 6 s of video and 4.5 s of sound, in which only the container declares an end."""
    path = make_video(tmp_path / request.param, seconds=6, audio_seconds=4.5, audio_rate=44100)
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"OTHERTAG"))
    return path


def test_the_end_of_a_container_is_that_of_its_longest_stream(unequal):
    with VideoFile(unequal) as file:
        assert file.span("video")[1] == pytest.approx(6.05, abs=0.1)
        assert file.span("audio")[1] == pytest.approx(4.55, abs=0.1)
        for start in (3.5, 4.3, 5.0):
            clip = file.read(audio_start=start, audio_seconds=2, video_start=4.5, video_seconds=1, fps=8)
            assert clip.waveform.shape == (88200,) and len(clip.frames) == 8
            assert not clip.waveform[round((4.7 - start) * 44100) :].any()


def test_a_container_whose_end_no_stream_reaches_is_truncated(unequal):
    unequal.write_bytes(unequal.read_bytes()[: unequal.stat().st_size // 2])
    for kind, rate in (("video", {"fps": 8}), ("audio", {})):
        with VideoFile(unequal) as file, pytest.raises(DecodeError, match=r"data up to .* of the 6\..* s declared"):
            file.read(**{f"{kind}_start": 3.9, f"{kind}_seconds": 1}, **rate)
        with VideoFile(unequal) as file:
            assert file.span(kind)[1] == pytest.approx(6.05, abs=0.1)


def test_damaged_video_in_the_middle(tmp_path, make_video, capfd):
    path = make_video(tmp_path / "hole.mp4", seconds=8, gop=25)
    damage(path, "video", 3, 6)
    assert len(read_clip(path, video_start=1, video_seconds=1, fps=16).frames) == 16
    assert len(read_clip(path, video_start=6.5, video_seconds=1, fps=16).frames) == 16
    with pytest.raises(DecodeError, match="packets around 4.* do not decode"):
        read_clip(path, video_start=4, video_seconds=1, fps=16)
    assert 100 < len(read_clip(path).frames) < 150
    assert capfd.readouterr() == ("", "")


def test_damaged_audio(tmp_path, make_video, chirp):
    path = make_video(tmp_path / "hole.mp4", seconds=6)
    damage(path, "audio", 2, 5)
    with pytest.raises(DecodeError, match="packets around .* do not decode"):
        read_clip(path, audio_start=3, audio_seconds=1)
    clip = read_clip(path, video_start=3, video_seconds=1, fps=8)
    assert len(clip.frames) == 8 and clip.waveform.shape == (0,)
    sound = read_clip(path, audio_start=0.5, audio_seconds=1).waveform
    np.testing.assert_allclose(sound, chirp(0.5 + np.arange(16000) / 16000), atol=0.01)
    damage(path, "audio", -1, 9)
    with pytest.raises(DecodeError, match="no samples"):
        read_clip(path)


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to read the resident memory")
def test_opening_leaks_nothing(tmp_path, make_video):
    path = make_video(tmp_path / "tiny.mp4", seconds=1, size=(32, 32))
    handles = len(os.listdir("/proc/self/fd"))
    for k in range(1300):
        with VideoFile(path) as file:
            file.read(video_start=0.5, video_seconds=0.1, fps=10, audio_start=0.5, audio_seconds=0.1)
        if k == 300:
            before = resident_megabytes()
    assert resident_megabytes() - before < 10
    assert len(os.listdir("/proc/self/fd")) <= handles


# Real files

UNREADABLE = {"test-unsupported.avi": "no stream that can be decoded"}


def real_files(root):
    files = [p for p in sorted((root / "fixtures").rglob("*.*")) if p.suffix != ".txt" and p.is_file()]
    return files + sorted((root / "vggsound-clips").rglob("*.mp4"))[:2]


def test_real_files(clips_root):
    files = real_files(clips_root)
    assert len(files) > 15
    rng = np.random.default_rng(5)
    for path in files:
        if path.name in UNREADABLE:
            with pytest.raises(DecodeError, match=UNREADABLE[path.name]):
                read_clip(path)
            continue
        info = probe(path)
        if info.video is not None:
            times, frames = decode_all(path)
            starts = [times[0] - 0.1037, *rng.uniform(times[0], times[-1], 4)]
            assert_nearest(path, times, frames, starts, info.video.rotation)
        if info.audio is not None:
            with VideoFile(path) as file:  # sound first, then pictures
                file.read(audio_seconds=0.1)
                if info.video is not None:
                    clip = file.read(video_start=times[-1] / 2 + 0.001, video_seconds=0.1, fps=10)
                    nearest = frames[np.abs(times - times[-1] / 2 - 0.001).argmin()].to_ndarray(format="rgb24")
                    assert np.array_equal(clip.frames[0], np.rot90(nearest, info.video.rotation // 90))
                end = file.span("audio")[1]
            starts = rng.uniform(info.audio.start + 0.1, end - 0.7, 3)
            assert_audio_near_whole(path, starts.clip(info.audio.start))


def assert_audio_near_whole(path, starts, block=0.002):
    """As `assert_audio_equals_whole`, but the samples may lie up to `block` seconds early or late (rounded stamps)."""
    whole = read_clip(path, sample_rate=16000).waveform
    first = probe(path).audio.start
    for start in starts:
        clip = read_clip(path, audio_start=start, audio_seconds=0.5, sample_rate=16000).waveform[200:-200]
        at = round(start * 16000) - round(first * 16000) + 200
        reach = round(block * 16000)
        errors = [np.abs(clip - whole[at + s : at + s + len(clip)]).max() for s in range(-min(reach, at), reach + 1)]
        assert min(errors) < max(0.01, 0.3 * np.abs(clip).max()), (path.name, start)
        if path.suffix in (".mp4", ".avi"):
            assert errors[min(reach, at)] < 2e-3, (path.name, start)


def test_sound_at_rates_far_below_the_files(make_video, chirp, tmp_path):
    """Of a track shorter than its filter the resampler gives nothing."""
    path = make_video(tmp_path / "a.wav", video=False, seconds=4, audio_codec="pcm_s16le")
    for rate, seconds in ((100, 0.05), (100, 0.1), (10, 1), (4, 2), (1, 3)):
        assert len(read_clip(path, audio_start=0.5, audio_seconds=seconds, sample_rate=rate).waveform) == rate * seconds
    with pytest.raises(ValueError, match="at least one sample"):
        read_clip(path, audio_start=0.5, audio_seconds=1e-9)
    with pytest.raises(DecodeError, match="no samples there"):
        read_clip(path, audio_start=100.0)
