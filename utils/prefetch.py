"""Copy batches to the device on a side stream, overlapping with computation."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def prefetch(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Iterate over `batches` with their tensors moved to `device`; on a CPU they are passed through.

    On a GPU the copies, from pinned memory, run on a side stream. The host has queued the previous step by the time it
    requests the next batch, so they overlap with that step's computation. No batch is taken from the loader before it
    is requested, so the time spent waiting for data and the place to resume from are the same as without prefetching.
    None is requested before the last one has been copied, and none is left behind while it is: the loader may use its
    memory again (`datasets.staging`).
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = {name: _copy(value, device) for name, value in batch.items()}
            copied = stream.record_event()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(computing)  # memory allocated on the side stream is in use on this one
        try:
            yield batch
        finally:
            copied.synchronize()


def _copy(value: object, device: torch.device) -> object:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
