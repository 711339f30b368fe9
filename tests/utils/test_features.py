"""utils.features: two evaluations that make the same features at once, and share a cache."""

import numpy as np
import torch

from utils.features import stored_clip_outputs

VIDEOS = 6


def mean_of_pictures(frames, augmentation):
    return {"pool": frames.float().mean((1, 2, 3))}


def batches(meanwhile=None, at=3):
    """A video a batch, all its pixels its number + 1; `meanwhile` is called before the batch `at`."""
    for video in range(VIDEOS):
        if video == at and meanwhile is not None:
            meanwhile()
        frames = torch.full((1, 2, 1, 4, 4, 3), video + 1, dtype=torch.uint8)
        yield {"frames": frames, "index": torch.tensor([video]), "failures": []}


def outputs(cache, make_batches):
    return stored_clip_outputs(cache, {"a": 1}, mean_of_pictures, make_batches, VIDEOS, 8, lambda failures: None)


def test_two_that_make_the_same_at_once_do_not_meet(tmp_path):
    """In one process here, as two of one number in different containers are."""
    others = []
    arrays, readable = outputs(tmp_path, lambda: batches(lambda: others.append(outputs(tmp_path, batches))))
    expected = np.arange(1, VIDEOS + 1, dtype=np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
    for found, there in ((arrays, readable), *others, outputs(tmp_path, None)):
        assert there.all() and np.array_equal(found["pool"], expected)
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_complete_cache_is_left_to_its_readers(tmp_path):
    places = []

    def meanwhile():
        outputs(tmp_path, batches)
        places.append(*(tmp_path / "features").glob("[!.]*/pool.npy"))
        places.append(places[0].stat().st_ino)

    outputs(tmp_path, lambda: batches(meanwhile))
    file, number = places
    assert file.stat().st_ino == number
