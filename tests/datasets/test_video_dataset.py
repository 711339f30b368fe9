"""datasets.video_dataset: what a position of an epoch holds, and that nothing but the seed decides about it."""

import gc
import multiprocessing
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets import sampling
from datasets.decoded import DecodedVideos
from datasets.decoding import VideoFile
from datasets.preprocessing import crop_and_resize, no_video_augmentation
from datasets.video_dataset import (
    ClipRecipe,
    EpochBatches,
    EvenClips,
    TrainingClips,
    VideoList,
    collate,
    collate_readable,
    cut_out,
    epoch_order,
    make_loader,
    read_frames,
)

RECIPE = ClipRecipe(
    video_seconds=0.5,
    video_fps=8.0,
    crop_size=32,
    frame_size=36,
    transforms="msc+color",
    resize="bilinear",
    area=(0.08, 1.0),
    aspect=(3 / 4, 4 / 3),
    color=(0.4, 0.4, 0.4, 0.2),
    augment=True,
    audio_seconds=0.5,
    sample_rate=8000,
    spec_params={"n_fft": 256, "hop_length": 128, "n_mels": 32},
    tfmask_params={
        "time_mask_ratio": 0.2,
        "time_mask_size": 5,
        "freq_mask_ratio": 0.2,
        "freq_mask_size": 3,
        "var_masks": True,
    },
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video):
    """Six videos, of which number 4 is broken and number 5 silent."""
    root = tmp_path_factory.mktemp("videos")
    names = [f"clip {i} (#&!).mp4" for i in range(6)]
    for i, name in enumerate(names):
        make_video(root / name, seconds=1.5, fps=16, audio_rate=None if i == 5 else 16000)
    data = (root / names[4]).read_bytes()
    (root / names[4]).write_bytes(data[: len(data) // 4])
    return VideoList(root, names, labels=[0, 1, 0, 1, 0, 1], classes=["a", "b"])


def good(videos):
    return videos if len(videos) == 4 else VideoList(videos.root, [videos.name(i) for i in range(4)], [0, 1, 0, 1])


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) if key != "failures" else a[key] == b[key]
        for key in a
    )


def test_a_list_keeps_names_labels_and_its_fingerprint(tmp_path):
    names = ["a.mp4", "sub/é ü.mp4", "--0PQM4-hqg_000030.mp4", "tail "]
    videos = VideoList(tmp_path, names, [3, 1, 2, 0])
    assert [videos.name(i) for i in range(4)] == names and videos.path(1) == tmp_path / names[1]
    assert videos.labels.tolist() == [3, 1, 2, 0]
    assert videos.fingerprint == VideoList("/elsewhere", names).fingerprint
    assert videos.fingerprint != VideoList(tmp_path, names[::-1]).fingerprint
    assert videos.fingerprint != VideoList(tmp_path, [*names[:3], "tail  "]).fingerprint
    assert videos._names.is_shared()


def test_videos_known_to_have_no_sound_are_replaced_and_do_not_count(videos):
    """They keep their place in the list, so that a run from before they were known goes on. Number 5 is silent."""
    whole = VideoList(videos.root, [name for name in videos.names() if name != videos.name(4)])
    unknown, known = (TrainingClips(whole, RECIPE, 2, seed=0, without_sound=rows) for rows in ((), (4,)))
    samples = [(unknown[0, i], known[0, i]) for i in range(len(unknown))]
    assert sum(len(before["failures"]) for before, _ in samples) >= 2
    for before, now in samples:
        assert not now["failures"] and now["index"] != 4 and now["index"] == before["index"]
    assert TrainingClips(whole, RECIPE, 2, seed=0, without_sound=[0, 1, 2, 4])[0, 0]["index"] == 3


@pytest.mark.parametrize("decoded", [False, True])
def test_sound_that_begins_when_the_video_has_ended_is_no_sound_of_it(tmp_path, make_video, decoded):
    make_video(tmp_path / "apart.mkv", seconds=1.0, audio_start=3.0, audio_seconds=2.0)
    videos, kept = VideoList(tmp_path, ["apart.mkv"]), DecodedVideos(tmp_path / "kept", 8000) if decoded else None
    for sample in (TrainingClips(videos, RECIPE, 1, 0, False, kept)[0, 0], EvenClips(videos, RECIPE, 2, kept)[0]):
        ((name, reason),) = sample["failures"]
        assert "frames" not in sample and name == "apart.mkv"
        assert (
            "expected video and sound at the same time, found video from 0.000 to 1.000 s and sound from 3.0" in reason
        )


def test_every_video_comes_equally_often_and_epochs_differ():
    orders = [epoch_order(7, 3, seed=1, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert np.bincount(order).tolist() == [3] * 7
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[1], epoch_order(7, 3, seed=1, epoch=1))
    assert not np.array_equal(orders[1], epoch_order(7, 3, seed=2, epoch=1))


def test_a_recipe_says_what_the_configuration_does():
    section = {
        "video_clip_duration": 0.7,
        "video_fps": 9.0,
        "crop_size": 56,
        "frame_size": 60,
        "transforms": "crop+color",
        "resize": "nearest",
        "min_area": 0.3,
        "aspect_ratio": [0.5, 1.5],
        "color": [0.1, 0.2, 0.3, 0.4],
    }
    sound = {"audio_clip_duration": 1.5, "audio_srate": 11025, "spec_params": {"n_mels": 7}, "tfmask_params": {"a": 1}}
    shared = 0.7, 9.0, 56, 60, "crop+color", "nearest", (0.3, 1.0), (0.5, 1.5), (0.1, 0.2, 0.3, 0.4)
    assert ClipRecipe.from_config(section, augment=False) == ClipRecipe(*shared, False)
    assert ClipRecipe.from_config(section | sound, augment=True) == ClipRecipe(*shared, True, *sound.values())
    assert ClipRecipe.from_config(section | {"frame_size": None}, augment=True).frame_size == 64


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_a_clip_is_resized_as_asked_and_cut_from_the_middle(resize):
    frames = torch.randint(0, 256, (2, 80, 108, 3), dtype=torch.uint8)
    recipe = replace(RECIPE, resize=resize)
    whole = crop_and_resize(frames, (0, 0, 80, 108), 36, resize)
    assert torch.equal(cut_out(frames, recipe), whole[:, 2:34, 2:34])
    box = sampling.random_resized_crop(80, 108, RECIPE.area, RECIPE.aspect, np.random.default_rng(0))
    expected = crop_and_resize(frames, box, 32, "bilinear" if resize == "bilinear" else "bilinear-plain")
    assert torch.equal(cut_out(frames, recipe, np.random.default_rng(0)), expected)


def test_a_plain_random_crop_lies_anywhere():
    places = torch.cartesian_prod(*map(torch.arange, (36, 36, 1))).view(1, 36, 36, 3).byte()
    recipe, rng = replace(RECIPE, transforms="crop+color"), np.random.default_rng(0)
    corners = {tuple(cut_out(places, recipe, rng)[0, 0, 0, :2].tolist()) for _ in range(300)}
    assert corners == {(top, left) for top in range(5) for left in range(5)}


def test_the_mean_scale_is_that_of_the_crops_that_are_drawn():
    rng = np.random.default_rng(0)
    for area in ((0.5, 1.0), (0.75, 1.0), (0.08, 1.0), (0.5, 0.5)):
        recipe = replace(RECIPE, area=area, aspect=(1.0, 1.0))
        sides = [sampling.random_resized_crop(1000, 1000, area, recipe.aspect, rng)[2] for _ in range(4000)]
        assert recipe.mean_scale == pytest.approx(np.mean(sides) / 1000, abs=0.01), area
    for recipe in (replace(RECIPE, augment=False), replace(RECIPE, transforms="crop+color")):
        assert recipe.mean_scale == recipe.test_scale == 32 / 36


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_a_random_crop_is_resized_as_asked_when_only_the_crop_is_read(videos, resize):
    recipe = replace(RECIPE, resize=resize, crop_size=16)
    with VideoFile(videos.path(0)) as file:
        frames = torch.from_numpy(file.read(video_start=0.5, video_seconds=0.5, fps=8.0).frames)
        clips = [read_frames(file, 0.5, recipe, np.random.default_rng(seed)) for seed in range(3)]
    expected = [cut_out(frames, recipe, np.random.default_rng(seed)) for seed in range(3)]
    assert torch.equal(torch.stack(clips), torch.stack(expected))


def test_a_sample_has_the_promised_shapes(videos):
    sample = TrainingClips(good(videos), RECIPE, 2, seed=0)[0, 3]
    assert sample["frames"].shape == (4, 32, 32, 3) and sample["frames"].dtype == torch.uint8
    assert sample["waveform"].shape == (4000,) and sample["waveform"].dtype == torch.float32
    assert sample["mel_mask"].shape == (32,) and sample["time_mask"].shape == (RECIPE.num_spectrogram_frames,)
    assert sample["video_aug"].shape == (5,) and 0.7 <= sample["gain"] <= 1
    assert sample["label"] == sample["index"] % 2 and sample["failures"] == []


def test_only_seed_epoch_and_position_decide(videos):
    """Not the number of workers, not the batch, not where the epoch was entered."""
    clips = TrainingClips(good(videos), RECIPE, 2, seed=5)
    whole = EpochBatches(len(clips), 4)
    whole.start_at(1)
    first = list(make_loader(clips, 0, batch_sampler=whole))
    for batch, again in zip(first, make_loader(clips, 2, batch_sampler=whole), strict=True):
        assert same(batch, again)
    late = EpochBatches(len(clips), 4)
    late.start_at(1, 1)
    (resumed,) = make_loader(TrainingClips(good(videos), RECIPE, 2, seed=5), 1, batch_sampler=late)
    assert same(resumed, first[1])
    assert not same(clips[1, 0], clips[2, 0]) and not same(clips[1, 0], TrainingClips(good(videos), RECIPE, 2, 6)[1, 0])


@pytest.fixture(scope="module")
def sound_in_the_middle(tmp_path_factory, make_video):
    """A video of 3 s with sound from 1 s to 2 s."""
    root = tmp_path_factory.mktemp("middle")
    sound = {"audio_rate": 8000, "audio_codec": "pcm_s16le", "audio_start": 1.0, "audio_seconds": 1.0}
    make_video(root / "a.mov", seconds=3.0, fps=16, **sound)
    return VideoList(root, ["a.mov"])


def heard(chirp, start):
    """The half second of sound from `start`, at RECIPE's rate."""
    return chirp((round(start * 8000) + np.arange(4000)) / 8000)


def test_a_sample_shows_and_sounds_as_at_its_starts(sound_in_the_middle, frame_index, chirp, monkeypatch):
    drawn, draw = [], sampling.audio_visual
    monkeypatch.setattr(sampling, "audio_visual", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    recipe = replace(RECIPE, augment=False, crop_size=64, frame_size=64)
    clips = TrainingClips(sound_in_the_middle, recipe, 40, seed=0)
    for position in range(40):
        sample = clips[0, position]
        video, audio = drawn[position]
        assert frame_index(sample["frames"][0].numpy()) == round(video * 16)
        np.testing.assert_allclose(sample["waveform"], heard(chirp, audio), atol=1e-3)
        assert (sample["video_aug"] == no_video_augmentation()).all() and sample["gain"] == 1
        assert not sample["mel_mask"].any() and not sample["time_mask"].any()
    starts = [video for video, _ in drawn]
    assert min(starts) < 1.0 and max(starts) > 1.5, "pictures may lie where there is no sound"


def test_even_windows_show_and_sound_as_at_their_starts(sound_in_the_middle, frame_index, chirp):
    recipe = replace(RECIPE, video_seconds=1.0, crop_size=64, frame_size=64)
    sample = EvenClips(sound_in_the_middle, recipe, windows=2)[0]
    assert [frame_index(clip[0].numpy()) for clip in sample["frames"]] == [12, 20]  # at 0.75 s and 1.25 s
    np.testing.assert_allclose(sample["waveform"], [heard(chirp, 1.0), heard(chirp, 1.5)], atol=1e-3)


def test_every_sample_is_augmented_in_its_own_way(videos, monkeypatch):
    """Two of one video, too."""
    monkeypatch.setattr(sampling, "audio_visual", lambda *_: (0.625, 0.0))
    masks = RECIPE.tfmask_params | {"time_mask_ratio": 0.9, "freq_mask_ratio": 0.9}
    clips = TrainingClips(VideoList(videos.root, videos.names()[:1]), replace(RECIPE, tfmask_params=masks), 8, seed=0)
    samples = [clips[0, position] for position in range(8)]
    for name in ("frames", "video_aug", "gain", "mel_mask", "time_mask"):
        assert len({np.asarray(sample[name]).tobytes() for sample in samples}) == 8, name


def test_each_clip_of_a_pair_is_augmented_in_its_own_way(videos, monkeypatch):
    monkeypatch.setattr(sampling, "two_apart", lambda *_: (0.625, 0.625))
    clips = TrainingClips(VideoList(videos.root, videos.names()[:1]), RECIPE, 8, seed=0, pairs=True)
    samples = [clips[0, position] for position in range(8)]
    for name in ("frames", "video_aug"):
        assert len({np.asarray(sample[key]).tobytes() for sample in samples for key in (name, name + "_2")}) == 16, name


@pytest.mark.parametrize("pairs", [False, True])
def test_from_an_epoch_on_samples_are_as_without_augmentation(videos, pairs):
    ends, always, never = (
        TrainingClips(good(videos), replace(RECIPE, augment=augment), 2, seed=0, pairs=pairs, plain_from=plain_from)
        for augment, plain_from in ((True, 3), (True, None), (False, None))
    )
    for epoch, like, unlike in ((0, always, never), (2, always, never), (3, never, always), (4, never, always)):
        assert same(ends[epoch, 1], like[epoch, 1]) and not same(ends[epoch, 1], unlike[epoch, 1])


def test_pairs_lie_elsewhere_in_each_sample(sound_in_the_middle):
    clips = TrainingClips(sound_in_the_middle, replace(RECIPE, augment=False), 8, seed=0, pairs=True)
    samples = [clips[0, position] for position in range(8)]
    assert len({tuple(sample[name].numpy().tobytes() for name in ("frames", "frames_2")) for sample in samples}) > 4


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_processes_and_parts_share_the_batches_of_one(world_size, parts):
    one = list(EpochBatches(27, 8))
    assert [len(batch) for batch in one] == [8, 8, 8]
    ranks = [list(EpochBatches(27, 8, accumulate=parts, rank=r, world_size=world_size)) for r in range(world_size)]
    for step, batch in enumerate(one):
        together = [key for part in range(parts) for rank in ranks for key in rank[step * parts + part]]
        assert together == batch


@pytest.mark.parametrize("parts", [1, 2])
def test_a_pass_of_several_epochs_is_their_batches_on_end(parts):
    batches, single = EpochBatches(27, 8, accumulate=parts), EpochBatches(27, 8, accumulate=parts)
    expected = []
    for epoch, step in ((3, 2), (4, 0), (5, 0)):
        single.start_at(epoch, step)
        expected += list(single)
    batches.start_at(3, 2, epochs=3)
    assert list(batches) == expected and len(batches) == len(expected) == 7 * parts


def test_a_short_last_batch_is_kept_if_asked_for():
    batches = [list(EpochBatches(27, 8, rank=r, world_size=2, drop_last=False)) for r in range(2)]
    assert [len(batch) for batch in batches[0]] == [4, 4, 4, 1] == [len(batch) for batch in batches[1]]
    assert EpochBatches(27, 8).steps == 3 and EpochBatches(27, 8, drop_last=False).steps == 4
    assert EpochBatches(25, 8, world_size=2, drop_last=False).steps == 3, "one clip is no batch for two processes"


def test_a_bad_video_is_replaced_by_the_same_other_one_and_named(videos):
    clips = TrainingClips(videos, RECIPE, 2, seed=0)
    order = clips.order(0)
    for position, video in enumerate(order):
        sample = clips[0, position]
        assert same(sample, TrainingClips(videos, RECIPE, 2, seed=0)[0, position])
        if video < 4:
            assert sample["index"] == video and not sample["failures"]
        else:
            half_an_epoch_on = np.roll(order, -(position + len(order) // 2 + 1))
            assert sample["index"] == next(other for other in half_an_epoch_on if other < 4)
            name, reason = sample["failures"][0]
            assert name == videos.name(video) and ("no audio stream" in reason) == (video == 5)
    batch = collate([clips[0, position] for position in range(len(clips))])
    assert len(batch["index"]) == len(clips) and len(batch["failures"]) >= 4


def test_nothing_readable_gives_a_batch_of_failures(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_text("no video")
    clips = TrainingClips(VideoList(tmp_path, [f"{i}.mp4" for i in range(3)]), RECIPE, 1, seed=0)
    batch = collate([clips[0, 0], clips[0, 1]])
    assert set(batch) == {"failures", "failed", "unreadable"} and batch["failed"] == 2
    assert sorted(batch["failures"][:3]) == sorted(batch["failures"][3:]), "each video is tried once for a sample"
    assert batch["unreadable"] == batch["failures"][:3]


def test_of_two_videos_the_good_one_replaces_the_bad(videos):
    pair = VideoList(videos.root, [videos.name(0), videos.name(4)])
    clips = TrainingClips(pair, RECIPE, 1, seed=0)
    for position, video in enumerate(clips.order(0)):
        sample = clips[0, position]
        assert sample["index"] == 0 and len(sample["failures"]) == video


def test_pairs_are_two_clips_of_one_silent_video(videos):
    sample = TrainingClips(VideoList(videos.root, [videos.name(5)] * 2), RECIPE, 1, seed=0, pairs=True)[0, 0]
    assert sample["frames"].shape == sample["frames_2"].shape == (4, 32, 32, 3)
    assert "waveform" not in sample and not torch.equal(sample["frames"], sample["frames_2"])


def test_even_windows_leave_out_what_cannot_be_read(videos):
    clips = EvenClips(videos, RECIPE, windows=3)
    sample = clips[0]
    assert sample["frames"].shape == (3, 4, 32, 32, 3) and sample["waveform"].shape == (3, 4000)
    batch = collate_readable([clips[i] for i in range(6)])
    assert batch["index"].tolist() == [0, 1, 2, 3] and len(batch["failures"]) == 2
    assert set(collate_readable([clips[4]])) == {"failures"}
    assert "failed" not in batch, "which is for training alone"


def test_even_windows_show_the_middle_of_their_sound(videos, frame_index):
    recipe = replace(RECIPE, video_seconds=0.25, audio_seconds=1.0, crop_size=64, frame_size=64)
    frames = EvenClips(videos, recipe, windows=3)[0]["frames"].numpy()
    assert [[frame_index(frame) for frame in clip] for clip in frames] == [[6, 8], [10, 12], [14, 16]]


def test_clips_of_a_recorded_live_stream_come_from_all_of_it(tmp_path, make_video):
    make_video(tmp_path / "live.mkv", audio_rate=None, container_options={"live": "1"})
    plain = replace(RECIPE, augment=False)
    sample = TrainingClips(VideoList(tmp_path, ["live.mkv"]), plain, 1, seed=0, pairs=True)[0, 0]
    assert not torch.equal(sample["frames"], sample["frames_2"])


class FrozenObjects(torch.utils.data.Dataset):
    """How many objects the collector leaves alone, in the process that answers."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return gc.get_freeze_count()


def test_workers_keep_the_collector_off_shared_pages():
    frozen = next(iter(make_loader(FrozenObjects(), 1, collate_fn=list)))
    assert frozen[0] > gc.get_freeze_count() + 10_000


class Slow:
    """A first sample at once, a second that takes a minute."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        time.sleep(60 * index)
        return index


def test_workers_leave_when_their_parent_says_so_and_nobody_else():
    batches = iter(make_loader(Slow(), 1, batch_size=None, collate_fn=None))
    assert next(batches) == 0
    (worker,) = multiprocessing.active_children()
    subprocess.run(["sh", "-c", f"kill -TERM {worker.pid} && kill -USR1 {worker.pid}"], check=True)  # not its parent
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
