"""How a process on a CPU treats the memory that its tensors leave behind."""

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
_NEVER, _GIB, _MIB = -1, 1 << 30, 1 << 20


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory of freed tensors for the next ones, or give it back as it comes.

    glibc maps each allocation above 32 MB anew, unmaps it when it is freed, and gives back what is free at the end of
    its heap. A training step on a CPU allocates gigabytes in such pieces, and the kernel zeroes every page of them in
    every step, which can take longer than the convolutions. What is kept is the most that was ever in use, and more
    where pieces do not fit. `keep=False` sets what glibc's own adaptation ends at.

    Returns:
        Whether this process' C library takes the setting: glibc does, others are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim, mmap = (_NEVER, _GIB) if keep else (64 * _MIB, 32 * _MIB)
    return bool(mallopt(_TRIM_THRESHOLD, trim) and mallopt(_MMAP_THRESHOLD, mmap))


def give_back_freed_memory() -> None:
    """Give back at once what this process keeps of freed memory, where its C library is glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def default_device() -> torch.device:
    """The first GPU; without one the CPU, with freed memory kept."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    keep_freed_memory()
    return torch.device("cpu")
