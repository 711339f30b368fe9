"""One batch through what is to be compiled, before training: where that fails, the run says so and goes on without."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.distributed import any_rank, world_size
from utils.logger import duration, log

try:
    from triton.errors import TritonError
except ImportError:  # no Triton, and none of its errors
    TritonError = RuntimeError

# torch.compile's own are RuntimeErrors; a gradient that is not laid out as the graph was told is an AssertionError.
FAILURES = (RuntimeError, AssertionError, TritonError)
Result = TypeVar("Result")


def attempt(call: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What `call`, of something compiled, returns, and None; or None, and in one line why it failed.

    Raises:
        torch.OutOfMemoryError: that is not the compiler's doing.
    """
    try:
        return call(), None
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return None, _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    """Name and message. A compiler's begins with its command, thousands of characters, and ends with what it found."""
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE=1")[0]  # advice to PyTorch's developers follows
    line = " ".join(f"{type(error).__name__}: {message}".split())
    return line if len(line) <= 400 else f"{line[:100]} ... {line[-300:]}"


def try_compiled(
    batches: Iterator[dict],
    forward: Callable[[dict], Tensor | tuple[Tensor, ...]],
    net: nn.Module,
    prepare: nn.Module,
) -> Iterator[dict]:
    """Compile `net` and `prepare`, which are marked for it, by the first of `batches`, forward and backward.

    What torch.compile makes of a network is tried out by nothing but a step. If one fails, both run uncompiled on all
    ranks from here on, and a warning gives the reason. Weights, gradients and BN statistics are left as they were.
    Every rank must call it.

    Args:
        forward: a batch to what `net` makes of it, which must have a gradient. The function that a training loop calls,
            under the same autocast, or what is compiled here is compiled anew there.
        net: as `wrap` returns it.

    Returns:
        All of `batches`, the first one included.
    """
    batch = next(batches, None)
    if batch is None:
        return batches
    if any_rank("frames" not in batch):  # a batch of fewer clips than there are ranks
        return itertools.chain([batch], batches)
    kept = [(buffer, buffer.clone()) for buffer in net.buffers()]
    start = time.perf_counter()
    _, reason = attempt(lambda: _pass(batch, forward, net))
    if any_rank(reason is not None):
        log.warning("compile: failed, going on without: %s", reason or "so it was on another rank")
        uncompile(net, prepare)
    else:
        log.info("compiled, and one batch tried, in %s", duration(time.perf_counter() - start))
    for buffer, value in kept:
        buffer.copy_(value)
    net.zero_grad(set_to_none=True)
    return itertools.chain([batch], batches)


def _pass(batch: dict, forward: Callable, net: nn.Module) -> None:
    """Forward and backward; DDP leaves the gradients alone."""
    with nullcontext() if world_size() == 1 else net.no_sync():
        outputs = forward(batch)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def uncompile(*modules: nn.Module) -> None:
    """Undo `Module.compile`, for which PyTorch has no call."""
    for module in modules:
        for part in module.modules():
            part._compiled_call_impl = None
