"""Batches on the device: copied beside the computation, on a stream of their own."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def prefetch(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Go through `batches` with their tensors on `device`; on a CPU they pass as they are.

    On a GPU the copies, from pinned memory, run on a side stream. The host has queued the step before by the time it
    asks for the next batch, so they overlap with that step's computation. No batch is taken from the loader before it
    is asked for: what waits for data, and where a run goes on, is as without.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = {name: _copy(value, device) for name, value in batch.items()}
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # its memory was given out on the side stream, and is in use on this one
        yield batch


def _copy(value: object, device: torch.device) -> object:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
