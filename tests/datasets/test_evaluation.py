"""datasets.evaluation: clips from one pass are those of single reads, and no position is lost or counted twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets import evaluation, sampling
from datasets.decoding import VideoFile
from datasets.evaluation import (
    FreshClips,
    SharedBatches,
    VideoClips,
    data_fingerprint,
    present_videos,
    read_windows,
)
from datasets.preprocessing import no_video_augmentation
from datasets.video_dataset import ClipRecipe, VideoList, read_frames
from utils.errors import UserError

RECIPE = ClipRecipe(
    0.5, 12.0, 32, 36, "msc+color", "bilinear", (0.2, 1.0), (0.75, 4 / 3), (0.4, 0.4, 0.4, 0.2), augment=True
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video):
    root = tmp_path_factory.mktemp("clips")
    make_video(root / "a.mp4", seconds=4, fps=25, audio_rate=None)
    make_video(root / "b.avi", seconds=3, fps=30, codec="mpeg4", gop=300, audio_rate=None)
    times = sorted(np.random.default_rng(0).uniform(0, 3, 40).tolist())
    make_video(root / "c.mkv", vfr_times=times, seconds=3, bframes=0, audio_rate=None)
    make_video(root / "short.mp4", seconds=0.2, fps=25, audio_rate=None)
    return VideoList(root, ["a.mp4", "b.avi", "c.mkv", "short.mp4"], [0, 1, 0, 1], ["x", "y"])


@pytest.mark.parametrize("pass_bytes", [256_000_000, 800_000])
@pytest.mark.parametrize("augment", [False, True])
def test_one_pass_gives_what_single_reads_give(videos, augment, pass_bytes, monkeypatch):
    monkeypatch.setattr(evaluation, "PASS_BYTES", pass_bytes)
    for i in range(len(videos)):
        with VideoFile(videos.path(i)) as file:
            start, seconds = file.info.video.start, file.info.video.duration
            room = max(0, seconds - RECIPE.video_seconds)
            starts = [*(start + room * np.random.default_rng(i).random(9)), start, start + room]
            rngs = [np.random.default_rng((i, k)) for k in range(len(starts))] if augment else None
            found = read_windows(file, starts, RECIPE, rngs)
        for k, clip in enumerate(found):
            with VideoFile(videos.path(i)) as file:
                single = read_frames(file, starts[k], RECIPE, np.random.default_rng((i, k)) if augment else None)
            assert torch.equal(clip, single), f"{videos.name(i)}, clip {k}"


def test_a_clip_may_lie_in_a_gap_between_frames(make_video, tmp_path):
    """As in a slide show: a frame every three seconds."""
    make_video(tmp_path / "slides.mkv", vfr_times=[0.0, 3.0, 6.0, 9.0], seconds=9.5, bframes=0, audio_rate=None)
    recipe = ClipRecipe(
        0.5, 8.0, 32, 36, "crop+color", "bilinear", (0.2, 1.0), (0.75, 4 / 3), (0.0,) * 4, augment=False
    )
    sample = VideoClips(VideoList(tmp_path, ["slides.mkv"], [0], ["x"]), recipe, seed=0, num_random=3, num_dense=5)[
        0, 0
    ]
    assert sample["failures"] == [] and sample["frames"].shape == (8, 4, 32, 32, 3)


def test_no_two_draws_share_their_random_numbers(videos, monkeypatch):
    seeds, generator = [], np.random.default_rng

    def note(seed):
        seeds.append(tuple(seed) + (0,) * (4 - len(seed)))  # NumPy fills a seed up with zeros
        return generator(seed)

    monkeypatch.setattr(np.random, "default_rng", note)
    clips = VideoClips(videos, RECIPE, 3, num_random=3)
    for index in range(1, len(videos)):
        clips[0, index]
    assert len(seeds) == 4 * (len(videos) - 1) == len(set(seeds))


def test_a_short_video_repeats_its_last_frame(videos):
    frames = VideoClips(videos, RECIPE, seed=0, num_dense=2)[0, 3]["frames"]
    assert frames.shape == (2, 6, 32, 32, 3) and torch.equal(frames[0, -1], frames[0, -2])


def test_fewer_random_clips_are_the_first_of_more(videos):
    centre = ClipRecipe(0.5, 12.0, 32, 36, "crop+color", "bilinear", (0.2, 1), (0.75, 4 / 3), (0,) * 4, augment=False)
    many = VideoClips(videos, centre, seed=3, num_random=5, num_dense=2)[0, 1]["frames"]
    few = VideoClips(videos, centre, seed=3, num_random=2)[0, 1]["frames"]
    other = VideoClips(videos, centre, seed=4, num_random=2)[0, 1]["frames"]
    assert torch.equal(many[:2], few) and not torch.equal(few, other)


def test_a_sample_hangs_on_seed_epoch_and_position_alone(videos):
    clips = FreshClips(videos, RECIPE, 3, seed=1, shuffle=True)
    first, again = clips[2, 5], FreshClips(videos, RECIPE, 3, seed=1, shuffle=True)[2, 5]
    assert torch.equal(first["frames"], again["frames"]) and (first["video_aug"] == again["video_aug"]).all()
    assert sorted(clips.order(0).tolist()) == sorted([0, 1, 2, 3] * 3)
    assert not torch.equal(first["frames"], clips[3, 5]["frames"])


def test_a_fresh_clip_is_coloured_where_the_recipe_augments(videos):
    plain, first, second = (
        FreshClips(videos, replace(RECIPE, augment=augment), 1, seed=1, shuffle=False)[0, position]["video_aug"]
        for augment, position in ((False, 0), (True, 0), (True, 1))
    )
    assert (plain == no_video_augmentation()).all()
    assert (first[1:] != plain[1:]).all() and (second[1:] != first[1:]).all()


def test_every_fresh_clip_lies_elsewhere(videos):
    clips = FreshClips(videos.subset([0]), replace(RECIPE, augment=False), 6, seed=1, shuffle=False)
    assert len({clips[0, position]["frames"].numpy().tobytes() for position in range(6)}) == 6


def test_every_fresh_clip_is_augmented_in_its_own_way(videos, monkeypatch):
    """Two of one video, too; without augmentation, clips that start together are the same."""
    monkeypatch.setattr(sampling, "anywhere", lambda *_: 1.0)
    clips = FreshClips(videos.subset([0]), RECIPE, 6, seed=1, shuffle=False)
    samples = [clips[0, position] for position in range(6)]
    for name in ("frames", "video_aug"):
        assert len({np.asarray(sample[name]).tobytes() for sample in samples}) == 6, name
    with VideoFile(videos.path(0)) as file:
        plain = read_frames(file, 1.0, RECIPE)
    assert torch.equal(FreshClips(videos, replace(RECIPE, augment=False), 6, 1, shuffle=False)[0, 0]["frames"], plain)


@pytest.mark.parametrize(("length", "batch"), [(8, 3), (7, 7), (1, 2), (10, 4)])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shares_are_the_batches_of_one_process(length, batch, processes):
    whole = [keys for keys in SharedBatches(length, batch, 0, 1)]
    shares = [list(SharedBatches(length, batch, rank, processes)) for rank in range(processes)]
    assert [sum((share[step] for share in shares), []) for step in range(len(whole))] == whole
    assert sum(map(len, whole)) == length
    sizes = [[len(share[step]) for share in shares] for step in range(len(whole))]
    assert all(max(row) - min(row) <= 1 for row in sizes)
    assert sum(map(len, SharedBatches(length, batch, 0, 1, drop_last=True))) == length // batch * batch
    several = SharedBatches(length, batch, 0, 1)
    several.start_at(2, epochs=2)
    assert list(several) == [[(epoch, i) for _, i in keys] for epoch in (2, 3) for keys in whole]
    assert len(several) == 2 * len(whole)
    several.start_at(2, len(whole) - 1, epochs=2)
    assert list(several) == [[(2, i) for _, i in whole[-1]], *([(3, i) for _, i in keys] for keys in whole)]
    assert len(several) == 1 + len(whole)


def test_a_fingerprint_of_the_data_tells_labels_and_classes_apart(videos):
    names, labels, classes = videos.names(), videos.labels.tolist(), videos.classes
    lists = [(names, labels, classes), (names, labels[::-1], classes), (names, labels, ["x", "z"])]
    prints = [data_fingerprint(VideoList(videos.root, *arguments)) for arguments in lists]
    assert prints[0] == data_fingerprint(videos) and len(set(prints)) == 3


def test_missing_videos_are_counted_and_named(videos):
    listed = VideoList(videos.root, ["a.mp4", "gone1.mp4", "gone2.mp4"], [0, 1, 0], ["x", "y"])
    with pytest.raises(UserError, match="2 of the 3 videos of a list are missing: gone1.mp4, gone2.mp4.*allow-missing"):
        present_videos(listed, allow_missing=False)
    present, missing = present_videos(listed, allow_missing=True)
    assert len(present) == 1 and present.labels.tolist() == [0] and missing == ["gone1.mp4", "gone2.mp4"]
    with pytest.raises(UserError, match="get them"):
        present_videos(listed.subset([1, 2]), allow_missing=True)
