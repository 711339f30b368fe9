"""Metrics of a run: averages without synchronisation, collapse warnings, retrieval and nearest neighbours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from utils.distributed import all_reduce_sum

SPREAD_WARNING = 0.1
COSINE_WARNING = 0.95


class Averages:
    """Means of 0-dim tensors over steps and ranks. Adding does not synchronise with the device; reading does, once."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._values: list[Tensor] = []

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add a step's figures; every step must have the same names."""
        self._names = tuple(figures)
        self._values.append(torch.stack([value.detach().double() for value in figures.values()]))

    def take_back(self, count: int) -> None:
        """Remove the last `count` additions: the micro-batches of a skipped step."""
        del self._values[-count:]

    def read(self) -> dict[str, float]:
        """Return the means since the last call, over all ranks, and reset. Every rank must call it.

        Empty if nothing was added, or all was taken back. A NaN spread (of a single clip) is ignored, and left out if
        there is no other.
        """
        if not self._values:
            return {}
        values, self._values = torch.stack(self._values), []
        spreads = torch.tensor([name.endswith("_spread") for name in self._names], device=values.device)
        silent = values.isnan() & spreads
        sums = all_reduce_sum(torch.stack([values.masked_fill(silent, 0).sum(0), (~silent).double().sum(0)]))
        return {name: total / n for name, total, n in zip(self._names, *sums.tolist(), strict=True) if n}


def collapse_warning(figures: Mapping[str, float]) -> str | None:
    """A warning if the embeddings have collapsed, which a falling loss does not show; else None.

    Also None if the figures that it needs are not there: a custom criterion, or batches of one clip.
    """
    if not figures.keys() >= {"video_spread", "audio_spread", "pos_cos", "neg_cos"}:
        return None
    spread = min(figures["video_spread"], figures["audio_spread"])
    if spread < SPREAD_WARNING:
        return (
            f"the embeddings collapse: their spread is {spread:.2f} (1: uniform on the sphere, 0: a single point, "
            f"warning below {SPREAD_WARNING}). The loss does not show it; see README, When xID collapses"
        )
    cosines = figures["pos_cos"], figures["neg_cos"]
    if min(cosines) > COSINE_WARNING or max(cosines) < -COSINE_WARNING:
        return (
            f"the embeddings collapse: the mean cosines of positives and negatives are {cosines[0]:+.2f} and "
            f"{cosines[1]:+.2f}, so the network distinguishes nothing. See README, When xID collapses"
        )
    return None


def retrieval(queries: Tensor, gallery: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """R@k: percentage of queries whose own item is among the k most similar in the gallery.

    Query i's own item is gallery row i. Both are (items, windows, D). The similarity of two items is the sum of the
    cosines over windows, in float64 regardless of autocast, since rounding would make near items tie. Ties and NaN
    count against the query, so that collapsed embeddings do not look good.
    """
    queries = torch.nn.functional.normalize(queries.double(), dim=2)
    gallery = torch.nn.functional.normalize(gallery.double(), dim=2)
    similarity = torch.einsum("iwd,jwd->ij", queries, gallery)
    own = similarity.diagonal().unsqueeze(1)
    better = (~(similarity < own)).sum(1) - 1
    return {f"R@{k}": 100.0 * (better < k).double().mean().item() for k in ks}


def nearest_neighbour_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ks: tuple[int, ...] = (1, 5, 20)
) -> dict[str, float]:
    """kNN@k: top-1 accuracy in percent of the majority vote of the k training rows with the largest cosine.

    Rows are features (items, D). Votes have equal weight; among classes with equal votes, the one with the larger sum
    of cosines wins.
    """
    return _vote(cosines(test, train), train_labels, test_labels, ks)


def leave_one_out_accuracy(features: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5, 20)) -> dict[str, float]:
    """`nearest_neighbour_accuracy` of each row (items, D) among all others. Items labelled -1 are ignored."""
    known = labels >= 0
    features, labels = features[known], labels[known]
    return _vote(cosines(features, features).fill_diagonal_(-torch.inf), labels, labels, ks, room=1)


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosines (N, M) of rows (N, D) and (M, D), in float64: in float32 near neighbours would tie."""
    queries, gallery = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, gallery))
    return queries @ gallery.T


def _vote(similarity: Tensor, gallery_labels: Tensor, labels: Tensor, ks: tuple[int, ...], room: int = 0) -> dict:
    """kNN@k from cosines (queries, gallery); no more than the gallery size minus `room` neighbours vote."""
    similarity, nearest = similarity.topk(min(max(ks), similarity.shape[1] - room), dim=1)
    votes = torch.nn.functional.one_hot(gallery_labels[nearest], int(gallery_labels.max()) + 1).double()
    accuracy = {}
    for k in ks:
        tally = (votes[:, :k] * (1 + 1e-4 * similarity[:, :k, None])).sum(1)
        accuracy[f"kNN@{k}"] = 100.0 * (tally.argmax(1) == labels).double().mean().item()
    return accuracy
