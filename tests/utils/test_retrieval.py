"""Held-out measurements and their pictures, on embeddings made so that the answer is known."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from utils.metrics import leave_one_out_accuracy, nearest_neighbour_accuracy, retrieval
from utils.retrieval import controls, draw_answers, draw_map, embed, held_out_figures


@pytest.fixture
def embeddings():
    """30 videos of 3 classes, whose features are near their class's axis and whose sounds are near their videos."""
    rng = torch.Generator().manual_seed(0)
    label = torch.arange(30) % 3
    video = torch.randn(30, 2, 16, generator=rng)
    features = torch.eye(3)[label].unsqueeze(1) + 0.1 * torch.randn(30, 2, 3, generator=rng)
    audio = video + 0.1 * torch.randn(30, 2, 16, generator=rng)
    return {"video": video, "audio": audio, "features": features, "label": label, "index": torch.arange(30)}


def test_leave_one_out_is_each_row_against_the_others():
    rng = torch.Generator().manual_seed(1)
    features, labels = torch.randn(12, 4, generator=rng), torch.randint(3, (12,), generator=rng)
    single = []
    for i in range(12):
        others = torch.arange(12) != i
        one = features[i : i + 1], labels[i : i + 1]
        single.append(nearest_neighbour_accuracy(features[others], labels[others], *one, (1, 3)))
    for name, value in leave_one_out_accuracy(features, labels, (1, 3)).items():
        assert value == pytest.approx(np.mean([figures[name] for figures in single]))


def test_votes_of_near_neighbours_go_to_the_nearest_not_to_the_first_class():
    """Features that differ by little beside what they have in common, as a network's do; the rule in plain float64."""
    generator = torch.Generator().manual_seed(0)
    features = 1 + 0.02 * torch.randn(60, 64, generator=generator)
    labels = torch.arange(60) % 10
    exact = features.double().numpy()
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = exact @ exact.T
    np.fill_diagonal(cosines, -np.inf)
    hits = 0
    for i, row in enumerate(cosines):
        nearest = np.argsort(-row)[:5]
        votes = {
            c: (np.sum(labels[nearest].numpy() == c), row[nearest][labels[nearest].numpy() == c].sum())
            for c in range(10)
        }
        hits += max(votes, key=votes.get) == labels[i]
    assert leave_one_out_accuracy(features, labels, (5,))["kNN@5"] == pytest.approx(100 * hits / 60)


def test_of_classes_with_equal_votes_the_nearer_wins():
    degrees = torch.tensor([10.0, 20.0, 60.0, 70.0]).deg2rad()
    gallery, query = torch.stack([degrees.cos(), degrees.sin()], dim=1), torch.tensor([[1.0, 0.0]])
    for labels in ([0, 0, 1, 1], [1, 1, 0, 0]):
        near = nearest_neighbour_accuracy(gallery, torch.tensor(labels), query, torch.tensor(labels[:1]), (4,))
        assert near == {"kNN@4": 100.0}


def test_nan_finds_nothing():
    broken = torch.full((12, 2, 8), torch.nan)
    assert set(retrieval(broken, torch.randn(12, 2, 8)).values()) == {0.0}


def test_leave_one_out_leaves_out_what_has_no_label():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.01]])
    assert leave_one_out_accuracy(features, torch.tensor([0, 0, 1, 1, -1]), (1,)) == {"kNN@1": 100.0}
    assert leave_one_out_accuracy(features, torch.tensor([0, 1, 0, 1, -1]), (1,)) == {"kNN@1": 0.0}


def test_what_pre_training_watches(embeddings):
    figures = held_out_figures(embeddings)
    assert figures["v2a_R@1"] == figures["a2v_R@1"] == figures["kNN@5"] == 100.0
    shuffled = embeddings | {"audio": embeddings["audio"].flip(0), "label": torch.full((30,), -1)}
    figures = held_out_figures(shuffled)
    assert figures["v2a_R@1"] < 20.0
    assert "kNN@5" not in figures  # nothing has a label


def test_sound_to_video_is_not_video_to_sound(embeddings):
    """The first sound lies nearer to the other video than to its own."""
    video, audio = (torch.tensor(degrees).deg2rad() for degrees in ([50.0, 0.0], [20.0, 0.0]))
    angles = {"video": video, "audio": audio}
    two = {name: torch.stack([x.cos(), x.sin()], dim=1)[:, None] for name, x in angles.items()}
    figures = held_out_figures({name: value[:2] for name, value in embeddings.items()} | two)
    assert figures["v2a_R@1"] == 100.0 and figures["a2v_R@1"] == 50.0


def test_neighbours_are_of_all_windows_and_need_five_others(embeddings):
    embeddings["features"][:, 0] = torch.eye(3)[0]  # which tells nothing apart
    assert held_out_figures(embeddings)["kNN@5"] == 100.0
    for labelled, told in ((4, []), (5, []), (6, ["kNN@5"])):
        label = embeddings["label"].where(torch.arange(30) < labelled, torch.tensor(-1))
        figures = held_out_figures(embeddings | {"label": label})
        assert [name for name in figures if name.startswith("kNN")] == told
    assert set(leave_one_out_accuracy(torch.eye(4), torch.arange(4), (5,))) == {"kNN@5"}  # of three


def test_percentages_are_not_rounded_to_float32():
    queries = torch.eye(40)[:, None]
    gallery = torch.roll(torch.eye(40), 1, 0)[:, None]
    gallery[:8] = torch.eye(40)[:8, None]  # 7 of 40 find their own; the eighth has an equal
    assert retrieval(queries, gallery, (1,)) == {"R@1": 17.5}


class Encoder(nn.Module):
    """The video through a BN, the sound as it is."""

    def __init__(self):
        super().__init__()
        self.video_model = nn.BatchNorm1d(3)

    def forward(self, video, audio):
        return self.video_model(video), audio


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was(training):
    model = Encoder().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clips = 5 + torch.randn(4, 2, 3)
    batch = {"frames": clips, "waveform": clips, "index": torch.arange(4), "label": torch.arange(4), "failures": []}
    found = embed(model, [batch], lambda batch: (batch["frames"], batch["waveform"]))
    torch.testing.assert_close(found["video"], clips, rtol=1e-4, atol=1e-4)  # by the stored statistics, 0 and 1
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_controls_take_away_motion_and_the_order_of_sound():
    batch = {"video": torch.randn(2, 3, 5, 4, 4), "audio": torch.randn(2, 1, 6, 50)}
    without = {name: prepare(batch) for name, prepare in controls(lambda x: (x["video"], x["audio"])).items()}
    video, audio = without["motion"]
    assert (video == batch["video"][:, :, 2:3]).all() and torch.equal(audio, batch["audio"])
    assert video.is_contiguous(memory_format=torch.channels_last_3d)
    video, audio = without["order of sound"]
    assert torch.equal(video, batch["video"]) and not torch.equal(audio, batch["audio"])
    orders = [[batch["audio"][i, 0, 0].tolist().index(x) for x in audio[i, 0, 0].tolist()] for i in (0, 1)]
    assert orders[0] != orders[1]
    for i, order in enumerate(orders):  # whole columns, each once
        assert sorted(order) == list(range(50)) and torch.equal(audio[i], batch["audio"][i][..., order])


def draw(embeddings, **options):
    """The figure, and the indices of the videos whose clips it shows: each query, then its answers."""
    asked = []

    def show(index):
        asked.append(index)
        return torch.zeros(8, 6, 6, 3, dtype=torch.uint8), torch.zeros(16, 20)

    figure = plt.figure()
    draw_answers(figure, "xid", embeddings, show, ("a", "b", "c"), **options)
    plt.close(figure)
    return figure, asked


def test_a_picture_of_queries_and_answers(embeddings):
    figure, asked = draw(embeddings, queries=3, answers=2)
    assert len(figure.axes) == 9
    assert len(asked) == 9  # 3 queries, and 2 answers to each
    for row in range(3):  # the sounds lie close to their videos: the first answer is right, and framed in green
        query, first = figure.axes[3 * row : 3 * row + 2]
        assert first.get_title() == query.get_ylabel()
        assert first.patch.get_edgecolor()[:3] == matplotlib.colors.to_rgb("limegreen")


def test_a_picture_of_few_videos_shows_each_once(embeddings):
    _, asked = draw({name: value[:4] for name, value in embeddings.items()}, queries=4, answers=1)
    assert sorted(asked[::2]) == [0, 1, 2, 3]


def test_a_picture_begins_with_the_best_queries(embeddings):
    """Only two of the videos find their sounds."""
    embeddings["audio"][[i for i in range(30) if i not in (11, 23)]] *= -1
    _, asked = draw(embeddings, queries=2, answers=1)
    assert asked[:2] == [11, 11]  # its frames, and its own sound


@pytest.mark.parametrize("labelled", [True, False])
def test_a_map_of_embeddings(embeddings, tmp_path, labelled):
    file = tmp_path / "map.png"
    if not labelled:
        embeddings["label"][:] = -1
    draw_map(embeddings, ("a", "b", "c") if labelled else (), file)
    picture = np.round(255 * plt.imread(file)[..., :3]).astype(int)
    blue = np.round(255 * np.array(matplotlib.colors.to_rgb("C0"))).astype(int)
    assert (picture == blue).all(-1).any() == labelled
