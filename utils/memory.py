"""Handling of freed tensor memory in CPU processes."""

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
_NEVER, _GIB, _MIB = -1, 1 << 30, 1 << 20


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process reuse the memory of freed tensors, or with `keep=False` return it to the system.

    glibc maps each allocation above 32 MB separately, unmaps it when freed, and returns free memory at the end of its
    heap. A training step on a CPU allocates gigabytes this way, and the kernel zeroes every page in every step, which
    can take longer than the convolutions. The memory kept is the peak use, or more with fragmentation. An older glibc
    refuses a threshold above 32 MB: there only smaller allocations are kept. `keep=False` sets the thresholds that
    glibc's own adaptation ends at.

    Returns:
        Whether this process' C library accepts the setting: glibc does, others are left unchanged.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # the trim threshold last: set alone, it would end glibc's adaptation of the other one at 128 kB
    thresholds, trim = ((_GIB, 32 * _MIB), _NEVER) if keep else ((32 * _MIB,), 64 * _MIB)
    return any(mallopt(_MMAP_THRESHOLD, size) for size in thresholds) and bool(mallopt(_TRIM_THRESHOLD, trim))


def give_back_freed_memory() -> None:
    """Return the freed memory that this process keeps to the system now, if its C library is glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def default_device() -> torch.device:
    """The first GPU, or without one the CPU; then this process keeps freed memory from now on."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    keep_freed_memory()
    return torch.device("cpu")
