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


STATUS = {UserError: 2, RunFailed: 1, Preempted: 75}
