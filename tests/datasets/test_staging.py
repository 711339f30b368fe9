"""datasets.staging: batches through memory that is used again are the batches of a plain DataLoader."""

import gc
import logging
import time
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

import datasets
from datasets import build_fresh_clips, build_training, staging
from datasets.staging import SLOTS, StagedLoader
from datasets.video_dataset import EpochBatches, TrainingClips, VideoList, collate_readable, make_loader
from tests.datasets.test_video_dataset import RECIPE, same
from tests.tiny import REPO, needs_gpu, write_config
from utils.config import load_config
from utils.errors import UserError
from utils.prefetch import prefetch

WORKERS, SIZE = 2, 4


class Numbers(torch.utils.data.Dataset):
    """Samples that hold their position many times over; every fifth video cannot be read."""

    def __init__(self, length=96, shape=(256, 64)):
        self.length, self.shape = length, shape

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        position = key[1]
        if position % 5 == 4:
            return {"failures": [(f"video {position}", "broken")]}
        return {
            "index": position,
            "frames": torch.full(self.shape, position, dtype=torch.uint8),
            "waveform": torch.full((100,), position / 3),
            "mask": torch.tensor([position % 2 == 0]),
            "failures": [],
        }


def numbers(batch_bytes, device="cpu", **shape):
    data = Numbers(**shape)
    batches = EpochBatches(len(data), SIZE)
    return make_loader(data, WORKERS, device, batch_bytes, batch_sampler=batches, collate_fn=collate_readable)


def readable(step):
    """The positions of a batch of `numbers`."""
    return [position for position in range(step * SIZE, (step + 1) * SIZE) if position % 5 != 4]


def assert_same_batches(staged, plain):
    """Compare each batch while it may be used, which is until the next one is asked for."""
    count = 0
    for batch, other in zip(staged, plain, strict=True):
        assert same(batch, other)
        count += 1
    return count


def test_real_clips_arrive_as_ever(tmp_path, make_video):
    names = [f"{i}.mp4" for i in range(5)]
    for name in names:
        make_video(tmp_path / name, seconds=1.0, fps=16, audio_rate=16000)
    (tmp_path / names[4]).write_bytes(b"broken")
    clips = TrainingClips(VideoList(tmp_path, names), RECIPE, 12, seed=3)
    batches = EpochBatches(len(clips), SIZE)
    batches.start_at(0, 2, epochs=2)
    staged = make_loader(clips, WORKERS, batch_bytes=SIZE * RECIPE.num_bytes, batch_sampler=batches)
    assert isinstance(staged, StagedLoader)
    seen = []
    for batch, other in zip(staged, make_loader(clips, WORKERS, batch_sampler=batches), strict=True):
        assert same(batch, other)
        seen.append(batch["frames"].data_ptr())
    assert len(seen) == 28 and len(set(seen)) == staged.num_workers * SLOTS  # each slot was used, and nothing else


def test_a_batch_stays_whole_until_the_next_one_is_asked_for():
    loader = numbers(SIZE * 32_768)
    for step, batch in enumerate(loader):
        if step % 3 == 0:
            time.sleep(0.1)  # the workers fill all they may fill
        expected = readable(step)
        assert batch["index"].tolist() == expected
        assert batch["frames"].flatten(1).unique(dim=1).flatten().tolist() == expected
        assert batch["frames"].shape == (len(expected), 256, 64)
    assert step == 23


def test_a_pass_that_is_left_early_spoils_no_later_one():
    loader = numbers(SIZE * 32_768)
    for _ in range(3):
        for step, _batch in enumerate(loader):
            if step == 6:
                break
        assert assert_same_batches(loader, numbers(0)) == 24


def test_what_does_not_fit_or_has_no_memory_ends_in_a_clear_line():
    with pytest.raises(ValueError, match="a batch takes 67264 bytes, and its slot has 49152: see ClipRecipe.num_bytes"):
        next(iter(numbers(3 * (1 << 14))))  # three frames of four, without anything else
    with pytest.raises(UserError, match=r"3 batches for each of \d workers take .* GB, .*lower num_workers"):
        numbers(1 << 60)


def test_a_batch_of_which_nothing_could_be_read_is_empty():
    class Broken(Numbers):
        def __getitem__(self, key):
            return {"failures": [("a", "broken")]}

    loader = make_loader(
        Broken(16), WORKERS, batch_bytes=4096, batch_sampler=EpochBatches(16, SIZE), collate_fn=collate_readable
    )
    assert [sorted(batch) for batch in loader] == [["failures"]] * 4


def test_without_workers_nothing_is_staged():
    assert not isinstance(make_loader(Numbers(), 0, batch_bytes=4096), StagedLoader)


class FakeCuda:
    """CUDA's functions for pinning: what they are asked, and the error that they return."""

    def __init__(self, error=0):
        self.error, self.registered, self.unregistered = error, [], []

    def cudaHostRegister(self, pointer, size, flags):
        self.registered.append((pointer, size))
        return self.error

    def cudaHostUnregister(self, pointer):
        self.unregistered.append(pointer)

    def cudaGetErrorString(self, error):
        return f"error {error}"


def test_each_slot_is_pinned_once_and_released_with_the_loader(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    loader = numbers(SIZE * 32_768, "cuda")
    arrived = {batch["frames"].data_ptr() for batch in loader}
    slots = {slot.data_ptr(): slot.numel() for slot in loader.staging._slots}
    assert len(cuda.registered) == loader.num_workers * SLOTS and dict(cuda.registered) == slots
    assert all(any(0 <= place - slot < size for slot, size in slots.items()) for place in arrived)
    del loader
    gc.collect()
    assert sorted(cuda.unregistered) == sorted(slots)


def test_what_cannot_be_pinned_is_used_as_it_is(monkeypatch, caplog):
    cuda, taken = FakeCuda(error=2), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(staging, "_take_cuda_error", lambda: taken.append(True))
    caplog.set_level(logging.WARNING, logger="avssrl")
    loader = numbers(SIZE * 32_768, "cuda")
    assert assert_same_batches(loader, numbers(0)) == 24
    assert len(cuda.registered) == len(taken) == 1  # and never tried again
    assert caplog.text.count("batches cannot be pinned, and are copied more slowly: cudaHostRegister: error 2") == 1
    del loader
    gc.collect()
    assert not cuda.unregistered


@needs_gpu
def test_a_gpu_is_fed_from_pinned_slots():
    shape = (1 << 16, 64)  # 4 MB a sample
    loader, busy, sums = (
        numbers(SIZE * (1 << 22) + 4096, "cuda", shape=shape),
        torch.randn(4096, 4096, device="cuda"),
        [],
    )
    for batch in prefetch(loader, torch.device("cuda")):
        for _ in range(5):
            busy = (busy @ busy).tanh()
        sums.append((batch["frames"][:, 0, 0].clone(), batch["frames"].long().sum()))
    assert len(loader.staging._pinned) == loader.num_workers * SLOTS
    assert [first.tolist() for first, _ in sums] == [readable(step) for step in range(24)]
    assert all(total.item() == first.sum().item() * shape[0] * shape[1] for first, total in sums)
    assert next(iter(loader))["frames"].is_pinned()


@needs_gpu
def test_without_pinning_a_run_goes_on_and_says_so(caplog):
    loader = numbers(SIZE * 32_768, "cuda")
    first = loader.staging._slots[0]
    assert int(torch.cuda.cudart().cudaHostRegister(first.data_ptr(), len(first), 0)) == 0  # so that it fails later
    caplog.set_level(logging.WARNING, logger="avssrl")
    indices = [batch["index"].tolist() for batch in prefetch(loader, torch.device("cuda"))]
    torch.ones(8, device="cuda").sum().item()  # the error is not raised by another kernel
    assert indices == [readable(step) for step in range(24)]
    assert "batches cannot be pinned" in caplog.text
    assert int(torch.cuda.cudart().cudaHostUnregister(first.data_ptr())) == 0


def test_training_is_staged_for_a_gpu_and_not_for_a_cpu(tmp_path, videos):
    pre_training = load_config(write_config(tmp_path, videos), [])
    fine_tuning = load_config(REPO / "configs/ucf/8at16-fold1.yaml", ["dataset.batch_size=4"])
    labelled = VideoList(videos, [f"clip{i}.mp4" for i in range(10)], [0, 1] * 5)
    for device, kind in (("cuda", StagedLoader), ("cpu", DataLoader)):
        assert type(build_training(pre_training, torch.device(device))) is kind
        assert type(build_fresh_clips(fine_tuning, labelled, torch.device(device))) is kind


@pytest.mark.parametrize("kind", ["pre-training", "pairs", "fine-tuning"])
def test_whatever_is_trained_on_fits_and_arrives_as_ever(tmp_path, videos, kind, monkeypatch):
    if kind == "fine-tuning":
        cfg = load_config(REPO / "configs/ucf/8at16-fold1.yaml", ["dataset.batch_size=7", "num_workers=2"])
        labelled = VideoList(videos, [f"clip{i}.mp4" for i in range(10)], [0, 1] * 5)
        build = partial(build_fresh_clips, cfg, labelled)
    else:
        changes = ["dataset.spec_params.hop_length=1", "dataset.crop_size=112"]  # long time masks; frames beside sound
        cfg = load_config(write_config(tmp_path, videos), changes)
        build = partial(build_training, cfg, pairs=kind == "pairs")
    plain = build(device=torch.device("cpu"))
    monkeypatch.setattr(datasets, "_staged", lambda device, batch_bytes: batch_bytes)
    loader = build(device=torch.device("cpu"))
    assert type(loader) is StagedLoader and assert_same_batches(loader, plain) == len(plain)
