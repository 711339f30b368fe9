"""Errors that end a script with a one-line message, and suggestions for misspelt names."""

import difflib
import logging
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input of a run: a file, a key, a command line.

    The one-line message names the thing, what was expected, what was found and what to do. Scripts print it and exit
    with status 2; tracebacks are reserved for our own bugs.
    """


class RunFailed(Exception):
    """A run ended early for a reason other than its input, such as a killed process.

    Scripts print the message and exit with status 1.
    """


class Preempted(Exception):
    """A run was asked to stop, has saved, and can be resumed.

    Scripts print the message and exit with status 75 (EX_TEMPFAIL: try again).
    """


def nearest(name: object, known: Iterable) -> str:
    """A hint at the known name most similar to `name`, for a message; empty if none is similar."""
    close = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def allowed(name: object, known: Iterable) -> str:
    """All known names, and a hint at the one that `name` may have meant, for a message."""
    known = [str(key) for key in known]
    hint = nearest(name, known)
    return f"use {', '.join(known)}" + (f" ({hint})" if hint else "")


def message_of(error: Exception) -> str:
    """An error's message, without the traceback that PyTorch prepends to errors of a DataLoader worker."""
    text = str(error)
    if not (text.startswith("Caught ") and " in DataLoader worker process " in text.splitlines()[0]):
        return text
    return text.strip().splitlines()[-1].partition(": ")[2]


def in_one_line(error: Exception) -> str:
    """The line with which one of our three errors ends a script."""
    title = {UserError: "error", RunFailed: "failed", Preempted: "preempted"}[type(error)]
    return f"{title}: {message_of(error)}"


def lost_worker(error: BaseException | None) -> str | None:
    """PyTorch's message on a DataLoader worker that died, if `error` was caused by that; else None.

    PyTorch raises it from a signal handler, wherever the main process happens to be, even in the middle of saving.
    """
    while error is not None:
        if "DataLoader worker (pid" in str(error):  # errors inside a worker say "process", keep their traceback
            return " ".join(str(error).split())
        error = error.__context__
    return None


def end_log(line: str) -> None:
    """Write how the run ended to its log file, if this process has it open: rank 0, and with --quiet each.

    The console gets the same line on stderr.
    """
    for handler in logging.getLogger("avssrl").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logging.LogRecord("avssrl", logging.ERROR, __file__, 0, line, None, None))


STATUS = {UserError: 2, RunFailed: 1, Preempted: 75}
