"""Helpers shared by all tests: small real media files whose frames and sound encode their index and time."""

import errno
import io
import multiprocessing
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # run Triton kernels in Python, on CPU tensors; read when a kernel is defined
torch.set_num_threads(1)  # tests run in parallel, and start processes, on few cores
# saves seconds of imports in each process; an optimizer imports the second
multiprocessing.set_forkserver_preload(["torch.distributed", "torch._dynamo", "torch.utils.tensorboard", "av"])

BITS = 8  # stripes of a picture, left to right: its index in binary, highest bit first
VIDEO_CLOCK = 90000  # Hz
TURNS = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}  # degrees counter-clockwise


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On a GPU borrowed for minutes, print a failure at once: tests that run out of time print nothing at their end."""
    if report.failed and os.environ.get("AVSSRL_NEEDS_GPU"):
        sys.__stdout__.write(f"\n{report.longreprtext[-4000:]}\n")


def _picture(index: int, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    bits = [(index >> (BITS - 1 - bit)) & 1 for bit in range(BITS)]
    row = np.array([235 if bits[x * BITS // width] else 20 for x in range(width)], np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def _frame_index(picture: np.ndarray) -> int:
    middles = ((np.arange(BITS) + 0.5) * picture.shape[1] / BITS).astype(int)
    bits = picture[:, middles].mean(axis=(0, 2)) > 128
    return int(sum(int(bit) << (BITS - 1 - k) for k, bit in enumerate(bits)))


def _chirp(times: np.ndarray) -> np.ndarray:
    """The sound of every file at `times` seconds on its clock: 300 Hz at 0 s, rising by 400 Hz per second."""
    return (0.5 * np.sin(2 * np.pi * (300 * times + 200 * times**2))).astype(np.float32)


def _add_video(container, times, size, codec, gop, bframes, fps, pixels, options):
    params = {"g": str(gop), "bf": str(bframes)}
    if codec == "libx264":
        params["x264-params"] = "b-adapt=0:scenecut=0:log-level=none"
    stream = container.add_stream(codec, rate=fps, options=params | (options or {}))
    stream.width, stream.height, stream.pix_fmt = *size, pixels
    stream.codec_context.thread_count = 1
    base = Fraction(1, fps) if codec == "mpeg4" else Fraction(1, VIDEO_CLOCK)
    stream.codec_context.time_base = base
    for index, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(_picture(index, size), format="rgb24")
        frame.pts, frame.time_base = round(time / base), base
        yield time, lambda frame=frame: stream.encode(frame)
    yield float("inf"), lambda: stream.encode(None)


def _add_audio(container, rate, seconds, start, codec, layout, volume):
    stream = container.add_stream(codec, rate=rate, layout=layout)
    channels, length = stream.codec_context.layout.nb_channels, round(seconds * rate)
    for at in range(0, length, 1024):
        samples = volume * _chirp(start + np.arange(at, min(at + 1024, length)) / rate)
        if codec.startswith("pcm"):
            data = np.repeat(np.round(samples * 32767).astype(np.int16), channels)[None]
            frame = av.AudioFrame.from_ndarray(data, format="s16", layout=layout)
        else:
            frame = av.AudioFrame.from_ndarray(np.tile(samples, (channels, 1)), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start * rate) + at
        yield start + at / rate, lambda frame=frame: stream.encode(frame)
    yield float("inf"), lambda: stream.encode(None)


def _turn(path: Path, degrees: int) -> None:
    """Write a rotation into the first (video) track header of an mp4: 16.16 fixed point."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (65536 * value for value in TURNS[degrees])
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def _make_video(
    path,
    *,
    seconds=2.0,
    fps=25,
    size=(64, 48),
    gop=12,
    bframes=2,
    audio_rate=16000,
    audio_seconds=None,
    audio_codec="aac",
    layout="mono",
    volume=1.0,
    video=True,
    video_start=0.0,
    audio_start=0.0,
    vfr_times=None,
    codec="libx264",
    pixels="yuv420p",
    rotation=0,
    options=None,
    container_options=None,
):
    """Write a media file with PyAV; its suffix sets the container. Frame k shows `frame_index` k (mod 256).

    Frames are at video_start + k / fps, or at `vfr_times` (seconds). The sound is `volume` times `chirp` on the file's
    clock. `audio_rate=None`: no audio. `options`: further options of the video encoder, `container_options`
    of the muxer. Returns the path.
    """
    path = Path(path)
    times = vfr_times if vfr_times is not None else [video_start + k / fps for k in range(round(seconds * fps))]
    with av.open(str(path), "w", options=container_options or {}) as container:
        feeds = []
        if video:
            feeds.append(_add_video(container, times, size, codec, gop, bframes, fps, pixels, options))
        if audio_rate:
            length = seconds if audio_seconds is None else audio_seconds
            feeds.append(_add_audio(container, audio_rate, length, audio_start, audio_codec, layout, volume))
        heads = [next(feed) for feed in feeds]
        while heads:  # interleave the streams by time
            first = min(range(len(heads)), key=lambda k: heads[k][0])
            container.mux(heads[first][1]())
            heads[first] = next(feeds[first], None)
            if heads[first] is None:
                del heads[first], feeds[first]
    if rotation:
        _turn(path, rotation)
    return path


@pytest.fixture(scope="session")
def make_video():
    """The function that writes small files, `_make_video` above."""
    return _make_video


@pytest.fixture(scope="session")
def frame_index():
    """The function that maps an upright picture (H, W, 3) to the index it shows."""
    return _frame_index


@pytest.fixture(scope="session")
def chirp():
    """The function that maps times in seconds to the samples that `make_video` writes there."""
    return _chirp


@pytest.fixture(scope="session")
def clips_root():
    """The folder of real clips named by AVSSRL_CLIPS; without it the test is skipped."""
    root = os.environ.get("AVSSRL_CLIPS")
    if not root or not Path(root).is_dir():
        pytest.skip("AVSSRL_CLIPS is not set to a folder of real clips")
    return Path(root)


@pytest.fixture
def unreadable(monkeypatch):
    """A function that makes a file or folder one that this process, which may be root's, must not read."""
    refused = set()

    def refuse(path):
        refused.add(str(path))
        return path

    def guarded(real):
        def call(path, *rest, **options):
            if not isinstance(path, int) and str(path) in refused:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *rest, **options)

        return call

    monkeypatch.setattr("os.scandir", guarded(os.scandir))
    monkeypatch.setattr("builtins.open", guarded(open))
    monkeypatch.setattr("io.open", guarded(io.open))
    return refuse


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video):
    """A folder of ten short videos with sound, for runs of tests.tiny."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(10):
        make_video(root / f"clip{i}.mp4", seconds=1.6, fps=16, size=(64, 48), audio_rate=16000)
    return root


@pytest.fixture(scope="session")
def run_ranks():
    """`run_ranks(worker, nprocs, *args)` runs `worker(rank, *args)` in `nprocs` processes and waits for them."""

    def run(worker, nprocs, *args):
        torch.multiprocessing.start_processes(worker, args, nprocs, start_method="forkserver")

    return run


SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select")


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        assert name not in SYNCS, f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync():
    """A context in which operations that make the host wait for a device fail, even on a CPU."""
    return _NoHostSync
