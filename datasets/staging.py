"""Batches on their way to a GPU: workers stack them into memory that is kept, and the GPU copies from there.

PyTorch's workers put each batch into new shared memory, and a thread of the main process copies it into pinned memory.
New memory has to be cleared and mapped page by page, in both processes, and the thread takes turns with the training
loop. Here the memory is shared before the workers are forked, and pinned once. Measured: datasets/README.md.
"""

import contextlib
import logging
import math
import mmap
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from utils.errors import UserError

log = logging.getLogger("avssrl")

ALIGNMENT = 64  # bytes, a cache line; of the tensors in a slot
PREFETCH_FACTOR = 2  # batches that a worker has been given to load and that were not handed out
SLOTS = PREFETCH_FACTOR + 1  # per worker


class Staged(NamedTuple):
    """Where a tensor of a batch lies: what a worker sends in its place."""

    slot: int
    offset: int  # bytes
    shape: torch.Size
    dtype: torch.dtype


class Staging:
    """Memory for the batches of forked workers. Each worker has slots of its own and fills them in turn.

    A worker gets a task when its batch of `PREFETCH_FACTOR` tasks ago is handed out. It has one slot more than that, so
    the batch that it overwrites was handed out before that, and another was asked for since, or a new pass begun.

    Args:
        batch_bytes: the most that a batch takes; see `ClipRecipe.num_bytes`.
        pin: register each slot with CUDA when it first arrives, so that copies from it need not wait.

    Raises:
        UserError: there is not enough memory.
    """

    def __init__(self, workers: int, batch_bytes: int, pin: bool) -> None:
        self.slot_bytes = -(-batch_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size = workers * SLOTS * self.slot_bytes
        try:
            memory = mmap.mmap(-1, size)  # shared, but no file in /dev/shm, which may be small
        except OSError as error:
            raise UserError(
                f"num_workers: {SLOTS} batches for each of {workers} workers take {size / 1e9:.1f} GB, and memory does "
                f"not suffice ({error.strerror}); lower num_workers or dataset.batch_size"
            ) from None
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(-1, self.slot_bytes)
        self._turn = 0  # a worker's own, since it is forked
        self._pin, self._pinned = pin, set()
        weakref.finalize(self, _unpin, self._slots, self._pinned).atexit = False  # the process' end unpins everything

    def stack(self, columns: dict[str, list[Tensor]]) -> dict[str, Staged]:
        """In a worker: stack each list of tensors in the worker's next slot. Raises ValueError if they do not fit."""
        slot = get_worker_info().id * SLOTS + self._turn
        staged, end = {}, 0
        for name, values in columns.items():
            shape, dtype = torch.Size((len(values), *values[0].shape)), values[0].dtype
            staged[name] = Staged(slot, end, shape, dtype)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if end > self.slot_bytes:
            raise ValueError(f"a batch takes {end} bytes, and its slot has {self.slot_bytes}: see ClipRecipe.num_bytes")
        for name, values in columns.items():
            torch.stack(values, out=self._view(staged[name]))
        self._turn = (self._turn + 1) % SLOTS
        return staged

    def unstage(self, batch: dict) -> dict:
        """In the main process: return a batch with its tensors, which are views of the slot."""
        return {name: self._arrived(value) if isinstance(value, Staged) else value for name, value in batch.items()}

    def _arrived(self, staged: Staged) -> Tensor:
        if self._pin and staged.slot not in self._pinned:
            self._register(staged.slot)
        return self._view(staged)

    def _view(self, staged: Staged) -> Tensor:
        size = math.prod(staged.shape) * staged.dtype.itemsize
        return self._slots[staged.slot, staged.offset : staged.offset + size].view(staged.dtype).view(staged.shape)

    def _register(self, slot: int) -> None:
        error = torch.cuda.cudart().cudaHostRegister(self._slots[slot].data_ptr(), self.slot_bytes, 0)
        if not int(error):
            self._pinned.add(slot)
            return
        reason = torch.cuda.cudart().cudaGetErrorString(error)
        log.warning("batches cannot be pinned, and are copied more slowly: cudaHostRegister: %s", reason)
        self._pin = False
        _take_cuda_error()


def _take_cuda_error() -> None:
    """Take back the last call's error, which would be raised with the next kernel, whatever that does."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unpin(slots: Tensor, pinned: set[int]) -> None:
    for slot in pinned:
        torch.cuda.cudart().cudaHostUnregister(slots[slot].data_ptr())


class StagedLoader(DataLoader):
    """A DataLoader whose workers stack batches with `staging.stack`.

    A batch is valid until the next one is asked for, or another pass is begun.
    """

    def __init__(self, *args: object, staging: Staging, **options: object) -> None:
        super().__init__(*args, prefetch_factor=PREFETCH_FACTOR, **options)
        self.staging = staging

    def __iter__(self) -> Iterator[dict]:
        return map(self.staging.unstage, super().__iter__())
