"""The error that a user can mend."""


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
