"""Losses of the pre-training methods. `build_criterion` makes one from the YAML's `loss` part.

What a script expects of a loss: main-vicreg.py calls it with the two embeddings of a rank's clips, (N, D) each, and
with how many epochs, and parts of one, the run has done; main-ssl.py with the embeddings, the videos' indices (N,) and
the epoch. It answers a scalar whose mean over ranks, and whose gradients' mean, are the whole batch's
(`utils.distributed.gather_with_grad`); whatever the autocast it computes in float32. A call leaves in `stats` 0-dim
tensors on the device for the log, always the same ones; with `pos_cos`, `neg_cos`, `video_spread` and `audio_spread`
(`criterions.stats`) among them the log warns of a collapse. Its buffers are stored and restored with the run; one
that holds a part of them on each rank has a method `assemble`, which all ranks call before rank 0 saves.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from criterions.rince import RINCE
from criterions.vicreg import VICLoss
from criterions.xid import q_schedule, xID
from utils.errors import UserError, allowed

__all__ = ["CRITERIONS", "RINCE", "VICLoss", "build_criterion", "q_schedule", "xID"]

CRITERIONS = {"xID": xID, "VICLoss": VICLoss}


def build_criterion(
    cfg: Mapping[str, Any],
    num_instances: int | None = None,
    embedding_dim: int | None = None,
    device: torch.device | str | None = None,
    num_epochs: int | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build the loss that the `loss` part of a pre-training YAML describes.

    Args:
        cfg: `name` (a key of `CRITERIONS`) and `args`, the keywords of that class. `args.checkpoint` is not read here:
            loading a bank is up to the script.
        num_instances: rows of a memory bank. This and the next, and the last two, are for a loss that takes them, as
            xID does and VICLoss does not, in place of what `args` say.
        embedding_dim: columns of a memory bank, the model's `out_dim`.
        device: where the memory bank lies; None: the CPU.
        num_epochs: for xID's schedule of q; None: q stays as it is, unless a call gives another.
        seed: of a memory bank and its negatives; the same on every rank.

    Raises:
        UserError: an unknown name or key, or a missing one.
    """
    name = cfg.get("name")
    if name not in list(CRITERIONS):
        raise UserError(f"loss.name: unknown {name!r}; {allowed(name, CRITERIONS)}")
    args = {key: value for key, value in (cfg.get("args") or {}).items() if key != "checkpoint"}
    known = inspect.signature(CRITERIONS[name]).parameters
    given = {"num_instances": num_instances, "embedding_dim": embedding_dim, "num_epochs": num_epochs, "seed": seed}
    args |= {key: value for key, value in given.items() if value is not None and key in known}
    for key in args:
        if key not in known:
            raise UserError(f"loss.args.{key}: unknown key for {name}; {allowed(key, known)}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and args.get(key) is None:
            where = "build_criterion's argument of that name" if key == "embedding_dim" else "the YAML, or an argument"
            raise UserError(f"loss.args.{key}: missing, {name} needs a number; give it by {where}")
    return CRITERIONS[name](**args).to(device or "cpu")
