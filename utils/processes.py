"""Helpers for processes: available CPU cores, and exiting with the parent process."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def ctrl_c_for_the_parent() -> Iterator[None]:
    """A context in which the main thread starts processes (or their fork server) that ignore Ctrl-C.

    It reaches all processes of a terminal, and each would print a traceback. The parent must end them.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; a process could set it only after its imports
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """End this worker process with its parent, even if the parent is killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
