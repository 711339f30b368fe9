"""The errors that end a script with one line, and a hint at what a wrong name may have meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input of a run: a file, a key, a command line.

    Its message is one line that names the thing, what was expected, what was found and what to do. The scripts print
    that line and end with exit status 2; a traceback is kept for mistakes of ours.
    """


class RunFailed(Exception):
    """A run ended early for a reason that lies outside its input, such as a process that was killed.

    The scripts print its message and end with exit status 1.
    """


class Preempted(Exception):
    """A run was asked to stop, has saved, and can go on.

    The scripts print its message and end with exit status 75 (EX_TEMPFAIL: try again).
    """


def nearest(name: object, known: Iterable) -> str:
    """For a message: the known name that is most like `name`; nothing where none is like it."""
    close = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def allowed(name: object, known: Iterable) -> str:
    """For a message: all known names, and which of them `name` may have meant."""
    known = [str(key) for key in known]
    hint = nearest(name, known)
    return f"use {', '.join(known)}" + (f" ({hint})" if hint else "")


def message_of(error: Exception) -> str:
    """An error's message; where a loader's worker raised it, without the traceback that PyTorch puts before it."""
    text = str(error)
    if not (text.startswith("Caught ") and " in DataLoader worker process " in text.splitlines()[0]):
        return text
    return text.strip().splitlines()[-1].partition(": ")[2]


def lost_worker(error: BaseException | None) -> str | None:
    """What PyTorch said of a loader's worker that died, if `error` goes back to that; else None.

    PyTorch raises it from a signal handler, wherever the main process happens to be, also in the middle of saving.
    """
    while error is not None:
        if "DataLoader worker (pid" in str(error):  # an error in a worker names its process, and keeps its traceback
            return " ".join(str(error).split())
        error = error.__context__
    return None


STATUS = {UserError: 2, RunFailed: 1, Preempted: 75}
