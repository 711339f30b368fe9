"""torch.compile where it works, said where it does not."""

import contextlib
import functools
import logging

import torch
import torch.distributed as dist

log = logging.getLogger("avssrl")

# Of inductor: what is made of up to six numbers is computed where it is read, not stored. Up to four, as it comes, the
# gradients that pass ReLU would be stored for BN's sums and its gradient to read (models/fused_norm.py).
OPTIONS = {"realize_reads_threshold": 6}


def compiles(asked: bool | None, device: torch.device) -> bool:
    """Whether a run is to be compiled: as asked (None: on a GPU), if this machine can.

    On a GPU that takes Triton, a GPU that it knows and no gloo between processes, on a CPU a C++ compiler. Where they
    fail, a warning gives the reason and the run goes on without.
    """
    if not (device.type == "cuda" if asked is None else asked):
        return False
    return obstacle(device.type) is None


def for_batch(whole: bool) -> contextlib.AbstractContextManager:
    """The context of a forward pass: for an epoch's rest, a batch that is not `whole`, nothing is compiled anew."""
    return contextlib.nullcontext() if whole else torch.compiler.set_stance("force_eager")


@functools.cache
def obstacle(device_type: str) -> str | None:
    """Why nothing is compiled here, None if it is. The first answer is kept, and logged if bad."""
    reason = None
    if device_type == "cuda" and dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        reason = "gloo's gather in a compiled graph takes GPU memory for the host's (pytorch#152645); nccl does not"
    else:
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device_type))
        except (RuntimeError, ImportError, OSError) as error:  # torch's own errors here are RuntimeErrors
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if reason is not None:
        log.warning("compile: torch.compile does not work here, going on without: %s", reason)
    return reason
