"""Held-out measurements of an audio-visual encoder: embeddings of whole videos, cross-modal retrieval."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from utils.metrics import retrieval


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[dict], prepare: Callable[[dict], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Embed the windows of every readable video that `batches` (of `EvenClips`) brings, in eval mode, on the CPU.

    Args:
        model: `forward(video, audio)` to embeddings, with a backbone `video_model`.
        prepare: frames (M, T, H, W, 3) and waveforms (M, L) of a batch to network input on the model's device.

    Returns:
        `video` and `audio` embeddings (videos, windows, D), pooled video `features` (videos, windows, 512), `index` and
        `label` (videos,).
    """
    features, parts = [], []
    hook = model.video_model.register_forward_hook(lambda module, args, pooled: features.append(pooled.flatten(1)))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if "frames" not in batch:
                continue
            videos, windows = batch["frames"].shape[:2]
            flat = {name: batch[name].flatten(0, 1) for name in ("frames", "waveform")}
            video_emb, audio_emb = model.forward(*prepare(flat))  # not model(): no compilation for these shapes
            outputs = {"video": video_emb, "audio": audio_emb, "features": features.pop()}
            outputs = {name: x.float().view(videos, windows, -1).cpu() for name, x in outputs.items()}
            parts.append(outputs | {"index": batch["index"], "label": batch["label"]})
    finally:
        hook.remove()
        model.train(was_training)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def cross_modal_retrieval(embeddings: dict[str, Tensor]) -> dict[str, float]:
    """R@1, R@5 and R@10 in percent from video to audio (`v2a`) and back (`a2v`), of what `embed` answered."""
    figures = {}
    for name, query, gallery in (("v2a", "video", "audio"), ("a2v", "audio", "video")):
        for k, share in retrieval(embeddings[query], embeddings[gallery]).items():
            figures[f"{name}_{k}"] = share
    return figures
