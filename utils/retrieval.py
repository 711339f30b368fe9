"""Held-out evaluation of an audio-visual encoder: embeddings of whole videos, cross-modal retrieval."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.metrics import leave_one_out_accuracy, retrieval
from utils.pictures import drawable, save_picture

log = logging.getLogger("avssrl")

NEIGHBOURS = 5


@torch.no_grad()
def embed(
    model: nn.Module,
    batches: Iterable[dict],
    prepare: Callable[[dict], tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """Embed the windows of all readable videos in `batches` (of `EvenClips`), in eval mode.

    Unreadable videos are skipped, with a warning that counts them.

    Args:
        model: `forward(video, audio)` returns embeddings; has a backbone `video_model`.
        prepare: maps frames (M, T, H, W, 3) and waveforms (M, L) of a batch to network input on the model's device.
        autocast: the context of a forward pass, as in training; `prepare` and the metrics run outside it.

    Returns:
        On the CPU: `video` and `audio` embeddings (videos, windows, D), pooled video `features` (videos, windows,
        out_dim), `index` and `label` (videos,).

    Raises:
        UserError: none of the videos could be read.
    """
    features, parts, failures = [], [], []
    hook = model.video_model.register_forward_hook(lambda module, args, pooled: features.append(pooled.flatten(1)))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            failures += batch["failures"]
            if "frames" not in batch:
                continue
            videos, windows = batch["frames"].shape[:2]
            flat = {name: batch[name].flatten(0, 1) for name in ("frames", "waveform")}
            video, audio = prepare(flat)
            with autocast():
                video_emb, audio_emb = model.forward(video, audio)  # not model(), to avoid compiling for these shapes
            outputs = {"video": video_emb, "audio": audio_emb, "features": features.pop()}
            outputs = {name: x.float().view(videos, windows, -1).cpu() for name, x in outputs.items()}
            parts.append(outputs | {"index": batch["index"], "label": batch["label"]})
    finally:
        hook.remove()
        model.train(was_training)
    readable = sum(len(part["index"]) for part in parts)
    if failures:
        bad, first = len(failures), ": ".join(failures[0])
        if not readable:
            raise UserError(f"none of the {bad} held-out videos can be read; the first, {first}")
        total = bad + readable
        log.warning("%d of %d held-out videos cannot be read and are left out; the first, %s", bad, total, first)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cross_modal_retrieval(embeddings: dict[str, Tensor]) -> dict[str, float]:
    """R@1, R@5 and R@10 in percent from video to audio (`v2a`) and back (`a2v`), from the result of `embed`."""
    figures = {}
    for name, query, gallery in (("v2a", "video", "audio"), ("a2v", "audio", "video")):
        for k, share in retrieval(embeddings[query], embeddings[gallery]).items():
            figures[f"{name}_{k}"] = share
    return figures


def held_out_figures(embeddings: dict[str, Tensor]) -> dict[str, float]:
    """The metrics that pre-training monitors, in percent: `cross_modal_retrieval` and, if there are labels, kNN@5.

    kNN@5 is the percentage of videos classified correctly by majority vote of the five others with the nearest video
    features.
    """
    figures = cross_modal_retrieval(embeddings)
    if (embeddings["label"] >= 0).sum() > NEIGHBOURS:
        features = embeddings["features"].mean(1)
        figures |= leave_one_out_accuracy(features, embeddings["label"], (NEIGHBOURS,))
    return figures


def controls(prepare: Callable[[dict], tuple[Tensor, Tensor]]) -> dict[str, Callable[[dict], tuple[Tensor, Tensor]]]:
    """Variants of `prepare` (see `embed`) that remove one cue each: remaining retrieval does not depend on it.

    `motion`: all frames of a clip are replaced by the middle one. `order of sound`: the time steps of each spectrogram
    are shuffled, in a different order for each.
    """
    generator = torch.Generator().manual_seed(0)

    def still(batch: dict) -> tuple[Tensor, Tensor]:
        video, audio = prepare(batch)
        middle = video[:, :, video.shape[2] // 2, None]
        return middle.expand_as(video).contiguous(memory_format=torch.channels_last_3d), audio

    def unordered(batch: dict) -> tuple[Tensor, Tensor]:
        video, audio = prepare(batch)
        order = torch.rand(len(audio), audio.shape[3], generator=generator).argsort(1).to(audio.device)
        return video, audio.gather(3, order[:, None, None].expand_as(audio))

    return {"motion": still, "order of sound": unordered}


# ------------------------------------------------------------------------------------------------------- pictures


def draw_answers(
    figure: object,
    name: str,
    embeddings: dict[str, Tensor],
    show: Callable[[int], tuple[Tensor, Tensor]],
    classes: Sequence[str],
    queries: int = 5,
    answers: int = 4,
) -> None:
    """Draw rows of a video's frames and the spectrograms of its nearest sounds; its own has a green border.

    Args:
        figure: a matplotlib figure or subfigure.
        name: the run's name, for the title.
        embeddings: the result of `embed`. The videos shown range from the best to the median of the better half.
        show: maps a video's `index` to its frames (T, H, W, 3) and its spectrogram (n_mels, frames).
        classes: names of the labels, or empty.
    """
    video, audio = (torch.nn.functional.normalize(embeddings[name], dim=2) for name in ("video", "audio"))
    similarity = torch.einsum("iwd,jwd->ij", video, audio)
    rank_of_own = (similarity > similarity.diagonal().unsqueeze(1)).sum(1)
    queries, answers = min(queries, len(video)), min(answers, len(video))
    last = max(len(video) // 4, queries - 1)
    chosen = rank_of_own.argsort(stable=True)[np.linspace(0, last, queries).astype(int)]
    axes = figure.subplots(queries, 1 + answers, width_ratios=[4] + [2] * answers, squeeze=False)
    figure.suptitle(
        f"{name}: from the better half of the held-out videos, best first, and the sounds nearest to them\n"
        "(green: the video's own sound; a title is the sound's class)",
        fontsize=10,
    )

    def class_of(i: int) -> str:
        return drawable(classes[embeddings["label"][i]]) if len(classes) and embeddings["label"][i] >= 0 else ""

    for row, query in zip(axes, chosen.tolist(), strict=True):
        frames, _ = show(int(embeddings["index"][query]))
        row[0].imshow(torch.cat(list(frames[:: max(1, len(frames) // 4)][:4]), dim=1).numpy())
        row[0].set_ylabel(class_of(query), fontsize=9)
        for axis, answer in zip(row[1:], similarity[query].topk(answers).indices.tolist(), strict=True):
            _, spectrogram = show(int(embeddings["index"][answer]))
            axis.imshow(spectrogram.numpy(), origin="lower", aspect="auto", cmap="magma")
            axis.set_title(class_of(answer), fontsize=8)
            if answer == query:
                axis.patch.set(edgecolor="limegreen", linewidth=6)
                for spine in axis.spines.values():
                    spine.set(edgecolor="limegreen", linewidth=4)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])


def draw_map(embeddings: dict[str, Tensor], classes: Sequence[str], file: str | Path, seed: int = 0) -> None:
    """Plot the embeddings in two dimensions, coloured by label: PCA and t-SNE, for video and for sound.

    A dot is a video or its sound: the mean of its windows' unit embeddings. Only the 20 classes with the most videos
    are coloured; the others are grey.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    labels = embeddings["label"].numpy()
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    coloured = names[np.argsort(-counts, kind="stable")][:20]
    figure = Figure(figsize=(11, 10), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, kind in zip(axes, ("video", "audio"), strict=True):
        points = torch.nn.functional.normalize(embeddings[kind], dim=2).mean(1).numpy()
        pca = PCA(2, random_state=seed).fit(points)
        share = 100 * pca.explained_variance_ratio_.sum()
        perplexity = min(30.0, (len(points) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(points)
        for axis, flat, title in (
            (row[0], pca.transform(points), f"{kind}, PCA ({share:.0f}% of the variance)"),
            (row[1], tsne, f"{kind}, t-SNE (perplexity {perplexity:.0f})"),
        ):
            rest = ~np.isin(labels, coloured)
            axis.scatter(*flat[rest].T, s=14, color="0.75")
            for i, label in enumerate(coloured):
                own = labels == label
                style = {"color": f"C{i % 10}", "marker": "o^"[i // 10], "label": drawable(classes[label])}
                axis.scatter(*flat[own].T, s=14, **style)
            axis.set(title=title, xticks=[], yticks=[])
    if len(coloured):
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_picture(figure, file)
