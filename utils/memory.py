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
    where pieces do not fit. `keep=False` gives back what is free by now, and sets what glibc's own adaptation ends at.

    Returns:
        Whether this process' C library takes the setting: glibc does, others are left as they are.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    trim, mmap = (_NEVER, _GIB) if keep else (64 * _MIB, 32 * _MIB)
    taken = libc.mallopt(_TRIM_THRESHOLD, trim) and libc.mallopt(_MMAP_THRESHOLD, mmap)
    if not keep:
        libc.malloc_trim(0)
    return bool(taken)


def default_device() -> torch.device:
    """The first GPU; without one the CPU, with freed memory kept."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    keep_freed_memory()
    return torch.device("cpu")
