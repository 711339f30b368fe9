"""A trial batch through a compiled network before training: if it fails, the run warns and continues uncompiled.

If only CUDA graphs fail, it continues compiled without them.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.compiling import OPTIONS
from utils.distributed import any_rank, world_size
from utils.errors import lost_worker
from utils.logger import duration, log

try:
    from triton.errors import TritonError
except ImportError:  # no Triton, so none of its errors
    TritonError = RuntimeError

# torch.compile raises RuntimeErrors, and an AssertionError for a gradient whose layout differs from the traced one.
FAILURES = (RuntimeError, AssertionError, TritonError)
Result = TypeVar("Result")


def attempt(call: Callable[[], Result], memory_too: bool = False) -> tuple[Result | None, str | None]:
    """Call something compiled; return its result and None, or None and the reason for its failure in one line.

    Args:
        memory_too: too little memory is a failure like any other, since the caller has a way that takes less.

    Raises:
        torch.OutOfMemoryError: unless `memory_too`, not counted as a failure of the compiler.
        RuntimeError: a DataLoader worker died, which PyTorch raises wherever the main process happens to be.
    """
    try:
        return call(), None
    except torch.OutOfMemoryError as error:
        if not memory_too:
            raise
        return None, _in_one_line(error)
    except FAILURES as error:
        if (message := lost_worker(error)) is not None:
            raise RuntimeError(message) from error
        return None, _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    """Name and message. A compiler's message begins with its command, thousands of characters long; its end matters."""
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE=1")[0]  # advice to PyTorch's developers follows
    line = " ".join(f"{type(error).__name__}: {message}".split())
    return line if len(line) <= 400 else f"{line[:100]} ... {line[-300:]}"


def try_compiled(
    batches: Iterator[dict],
    forward: Callable[[dict], Tensor | tuple[Tensor, ...]],
    net: nn.Module,
    prepare: nn.Module,
    graphs: bool = False,
) -> Iterator[dict]:
    """Compile `net` and `prepare`, which are marked for it, with forward and backward passes of the first batch.

    Only a real step shows whether torch.compile works on a network. If it fails on any rank, both modules run
    uncompiled on all ranks from here on, and a warning gives the reason. Weights, gradients and BN statistics are left
    unchanged. Every rank must call it.

    Args:
        forward: maps a batch to the outputs of `net`, which must require gradients. Must be the function that the
            training loop calls, under the same autocast, to avoid recompilation there.
        net: as returned by `wrap`.
        graphs: as passed to `wrap`. If the passes can be compiled but not recorded, also for want of memory, `net` is
            compiled without.

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
    if graphs and reason is None:  # the second pass records CUDA graphs, the third replays them
        _, unrecorded = attempt(lambda: [_pass(batch, forward, net) for _ in range(2)], memory_too=True)
        if unrecorded is not None:
            log.warning("CUDA graphs: failed, going on without: %s", unrecorded)
            _compile_without_graphs(net)
            graphs = False
            _, reason = attempt(lambda: _pass(batch, forward, net))
    if any_rank(reason is not None):
        log.warning("compile: failed, going on without: %s", reason or "it failed on another rank")
        uncompile(net, prepare)
    else:
        recorded = ", recorded as CUDA graphs" if graphs else ""
        log.info("compiled%s, and one batch tried, in %s", recorded, duration(time.perf_counter() - start))
    for buffer, value in kept:
        buffer.copy_(value)
    net.zero_grad(set_to_none=True)
    return itertools.chain([batch], batches)


def _pass(batch: dict, forward: Callable, net: nn.Module) -> None:
    """Forward and backward pass, without DDP's gradient synchronisation; the gradients are dropped."""
    with nullcontext() if world_size() == 1 else net.no_sync():
        outputs = forward(batch)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    net.zero_grad(set_to_none=True)


def _compile_without_graphs(net: nn.Module) -> None:
    net.zero_grad(set_to_none=True)
    torch.compiler.reset()
    gc.collect()  # what was compiled holds the graphs and their memory
    torch.cuda.empty_cache()
    net.compile(options=OPTIONS)


def uncompile(*modules: nn.Module) -> None:
    """Undo `Module.compile`, for which PyTorch has no function."""
    for module in modules:
        for part in module.modules():
            part._compiled_call_impl = None
