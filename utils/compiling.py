"""torch.compile where it works, with a warning where it does not."""

import contextlib
import functools
import logging

import torch
import torch.distributed as dist

log = logging.getLogger("avssrl")

# Inductor recomputes values that depend on up to six reads instead of storing them. With its default of four, the
# gradients behind ReLU would be stored for BN's sums and its gradient (models/fused_norm.py).
OPTIONS = {"realize_reads_threshold": 6}
CUDA_GRAPHS = {"triton.cudagraphs": True}


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile a run: as `asked` (None: on a GPU), if this machine can.

    A GPU must be supported by an installed Triton, without gloo between processes; a CPU needs a C++ compiler.
    Otherwise a warning gives the reason and the run continues uncompiled. With several processes, all of them compile
    or none, and every rank must ask.
    """
    if not (device.type == "cuda" if asked is None else asked):
        return False
    return obstacle(device.type) is None


def for_batch(whole: bool) -> contextlib.AbstractContextManager:
    """The context of a training step's forward pass; to be called for each, since it also tells CUDA graphs of it.

    A smaller last batch (not `whole`) runs eagerly instead of being recompiled. With CUDA graphs the pass may overwrite
    what the network returned in the last one.
    """
    if torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()
    return contextlib.nullcontext() if whole else torch.compiler.set_stance("force_eager")


@functools.cache
def obstacle(device_type: str) -> str | None:
    """Why torch.compile does not work here, or on another rank, or None if it works.

    The result is cached; a reason is logged once. The first call must be made by every rank.
    """
    reason = _on_any_rank(_own_obstacle(device_type))
    if reason is not None:
        log.warning("compile: torch.compile does not work here, going on without: %s", reason)
    return reason


def _own_obstacle(device_type: str) -> str | None:
    if device_type == "cuda" and _has_group() and dist.get_backend() == "gloo":
        return "gloo's gather in a compiled graph mistakes GPU for host memory (pytorch#152645); nccl does not"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device_type))
    except (RuntimeError, ImportError, OSError) as error:  # torch's own errors here are RuntimeErrors
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None


def _on_any_rank(reason: str | None) -> str | None:
    """The first rank's reason, with its rank, if any rank has one: a compiled rank enters other collectives.

    `utils.distributed`, which has the collectives, imports this module.
    """
    if not _has_group() or dist.get_world_size() == 1:
        return reason
    reasons = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(reasons) if found is not None), None)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
