"""Losses of the pre-training methods. `build_criterion` builds one from the YAML's `loss` part.

Interface of a loss: main-vicreg.py calls it with the two embeddings of a rank's clips, (N, D) each; main-ssl.py with
the embeddings, the videos' indices (N,) and the epoch. It returns a scalar. The mean over ranks of this scalar, and of
its gradients, are those of the whole batch (`utils.distributed.gather_with_grad`). It computes in float32 regardless of
autocast. It keeps no reference to its inputs, only copies: with CUDA graphs the next step writes to the same memory.
Each call sets `stats`, a dict of 0-dim tensors on the device for the log, always with the same keys; if these
include `pos_cos`, `neg_cos`, `video_spread` and `audio_spread` (`criterions.stats`), the log warns of a collapse. Its
buffers are saved and restored with the run. A loss that holds only a part of them on each rank has a method `assemble`,
which all ranks call before rank 0 saves.
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
    """Build the loss described by the `loss` part of a pre-training YAML.

    Args:
        cfg: `name` (a key of `CRITERIONS`) and `args`, the keywords of that class. `args.checkpoint` is ignored: the
            script loads a bank.
        num_instances: rows of a memory bank. Like `embedding_dim`, `num_epochs` and `seed` it overrides `args`, if the
            loss takes it (xID does, VICLoss does not).
        embedding_dim: columns of a memory bank, the model's `out_dim`.
        device: device of the memory bank; None: the CPU.
        num_epochs: for xID's schedule of q; None: q is constant, unless a call passes another.
        seed: seed of a memory bank and its negatives; the same on every rank.

    Raises:
        UserError: a name or key is unknown or missing.
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
