"""datasets.sampling: starts inside spans, masks of the right share, crops inside frames."""

import numpy as np
import pytest

from datasets import sampling


def assert_uniform(values, low, high):
    counts = np.histogram(values, bins=6, range=(low, high))[0]
    assert counts.sum() == len(values) and (abs(counts - len(values) / 6) < 4 * np.sqrt(len(values) / 6)).all()


def test_a_clip_lies_anywhere_with_the_same_chance():
    rng = np.random.default_rng(0)
    assert_uniform([sampling.anywhere((1.0, 11.0), 4.0, rng) for _ in range(4000)], 1.0, 7.0)


def test_audio_visual_clips_lie_where_the_method_says():
    rng = np.random.default_rng(0)
    video, audio = (0.2, 10.0), (0.0, 9.5)
    draws = np.array([sampling.audio_visual(video, audio, 1.0, 2.0, rng) for _ in range(4000)])
    starts, sounds = draws.T
    assert sounds.min() >= 0.2 and sounds.max() <= 7.5
    assert np.ptp(sounds) > 7.2
    assert starts.min() >= 0.2 and starts.max() <= 9.0
    offset = starts - sounds
    assert offset.min() >= -0.5 and offset.max() <= 1.5
    assert offset.min() < -0.45 and offset.max() > 1.45


@pytest.mark.parametrize("video", [(0.0, 0.4), (3.0, 3.0), (5.0, 6.0)])
def test_short_streams_start_with_their_span(video):
    rng = np.random.default_rng(0)
    start, sound = sampling.audio_visual(video, (0.0, 1.0), 1.0, 2.0, rng)
    assert start == video[0]
    assert 0.0 <= sound <= max(video[0], 1.0)


def test_even_windows_cover_the_whole_span():
    assert sampling.evenly((1.0, 11.0), 2.0, 5) == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert sampling.evenly((1.0, 11.0), 2.0, 1) == [5.0]
    assert sampling.evenly((1.0, 2.0), 2.0, 3) == [1.0, 1.0, 1.0]
    pairs = sampling.audio_visual_evenly((0.0, 3.0), (0.0, 3.0), 1.0, 2.0, 3)
    assert pairs == [(0.5, 0.0), (1.0, 0.5), (1.5, 1.0)]
    assert sampling.audio_visual_evenly((0.0, 10.0), (4.0, 5.0), 0.5, 2.0, 1) == [(4.25, 4.0)]


def test_two_clips_are_2_to_8_seconds_apart_where_they_can_be():
    rng = np.random.default_rng(0)
    draws = np.array([sampling.two_apart((1.0, 11.0), 1.0, rng) for _ in range(3000)])
    distance = np.abs(draws[:, 0] - draws[:, 1])
    assert distance.min() >= 2.0 and distance.max() <= 8.0 and np.ptp(distance) > 5.8
    assert draws.min() >= 1.0 and draws.max() <= 10.0
    assert 0.4 < (draws[:, 0] < draws[:, 1]).mean() < 0.6
    assert draws.min(1).min() < 1.1 and draws.min(1).max() > 7.5 and draws.max() > 9.9
    assert sorted(sampling.two_apart((1.0, 3.5), 1.0, rng)) == [1.0, 2.5]
    assert sampling.two_apart((1.0, 1.5), 1.0, rng) == (1.0, 1.0)


@pytest.mark.parametrize("room", [2.5, 3.5, 5.0])
def test_two_clips_of_a_video_of_few_seconds_are_inside_it(room):
    rng = np.random.default_rng(0)
    draws = np.array([sampling.two_apart((1.0, 2.0 + room), 1.0, rng) for _ in range(500)])
    distance = np.abs(draws[:, 0] - draws[:, 1])
    assert draws.min() >= 1.0 and draws.max() <= 1.0 + room
    assert distance.min() < 2.1 and room - 0.1 < distance.max()


@pytest.mark.parametrize("audio", [(9.5, 15.0), (12.0, 15.0), (-5.0, -2.0), (0.0, 10.0)])
def test_a_video_clip_lies_inside_the_video(audio):
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, _ = sampling.audio_visual((0.0, 10.0), audio, 1.0, 2.0, rng)
        assert 0.0 <= start <= 9.0


def test_aspect_ratios_of_crops_are_log_uniform():
    rng = np.random.default_rng(0)
    boxes = np.array([sampling.random_resized_crop(4000, 4000, (0.1, 0.2), (1 / 2, 4), rng) for _ in range(4000)])
    assert_uniform(np.log2(boxes[:, 3] / boxes[:, 2]), -1, 2)


def test_random_resized_crops_fit_and_reach_both_ends_of_the_area():
    rng = np.random.default_rng(0)
    boxes = np.array([sampling.random_resized_crop(90, 160, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(3000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 90).all() and (left + width <= 160).all()
    assert ((top + height == 90) & (height < 90)).any() and ((left + width == 160) & (width < 160)).any()
    share = height * width / (90 * 160)
    assert share.min() < 0.1 and share.max() > 0.7
    ratio = width / height
    assert ratio.min() > 0.72 and ratio.max() < 1.38
    assert sampling.random_resized_crop(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), rng) == (0, 493, 10, 13)


@pytest.mark.parametrize("variable", [True, False])
def test_masks_cover_a_share_uniform_up_to_the_ratio(variable):
    rng = np.random.default_rng(0)
    covered = np.array([sampling.block_mask(125, 0.2, 5, variable, rng).sum() for _ in range(3000)])
    assert covered.max() <= 25 and covered.min() == 0
    assert abs(covered.mean() - 12) < 0.5  # floor of uniform 0 to 25


@pytest.mark.parametrize(("variable", "share"), [(True, 0.5), (False, 1.0)])
def test_blocks_of_a_mask_reach_their_size(variable, share):
    rng = np.random.default_rng(0)
    masks = [np.flatnonzero(sampling.block_mask(1000, 0.003, 2, variable, rng)) for _ in range(600)]
    in_one_block = [bins[1] - bins[0] == 1 for bins in masks if len(bins) == 2]
    assert np.mean(in_one_block) == pytest.approx(share, abs=0.1)
