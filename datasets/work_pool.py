"""Worker processes that may crash or hang without ending the run: only the current file is lost."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from datasets.decoder_run import MediaError
from datasets.decoding import DecodeError
from datasets.transcode import Facts, inspect, transcode
from utils.errors import UserError
from utils.processes import ctrl_c_for_the_parent, end_with_parent

Job = tuple[str, tuple]
CRASHED, TOO_LONG, UNEXPECTED = "the decoder crashed", "not done within", "an unexpected error: "
ERRORS = (*MediaError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
# Not always the file's fault: memory may have run out, or the machine was busy.
TRY_AGAIN = (CRASHED, TOO_LONG, UNEXPECTED)


def run_jobs(
    jobs: Sequence[Job], workers: int, time_limit: float, do: Callable | None = None
) -> Iterator[tuple[str, Facts | str]]:
    """Run jobs, (name, arguments of `do`), and yield (name, facts or error message) as they finish, in any order.

    A worker that dies or exceeds `time_limit` seconds for one job is replaced, and the job's outcome says so, as it
    does if `do` (by default `do_job`) raises one of `ERRORS`.

    Raises:
        UserError: the outputs cannot be written.
    """
    todo = list(reversed(jobs))
    with ctrl_c_for_the_parent():
        pool = [_Worker(do or do_job) for _ in range(min(workers, len(jobs)))]
    try:
        while True:
            for i, worker in enumerate(pool):
                if worker.name is None and todo:
                    if not worker.process.is_alive():  # killed from outside while idle
                        pool[i] = worker = _Worker(do or do_job)
                    worker.give(*todo.pop())
            busy = [worker for worker in pool if worker.name is not None]
            if not busy:
                return
            soonest = min(worker.since for worker in busy) + time_limit
            wait([worker.pipe for worker in busy], timeout=max(0.0, soonest - time.monotonic()))
            for i, worker in enumerate(pool):
                if worker.name is None:
                    continue
                name, outcome = worker.name, worker.outcome(time_limit)
                if isinstance(outcome, UserError):
                    raise outcome
                if outcome is not None:
                    if not worker.alive:
                        pool[i] = _Worker(do or do_job)
                    yield name, outcome
    finally:
        for worker in pool:
            worker.kill()


def do_job(source: object, target: object, short_side: int, fps: float | None) -> Facts | str | UserError:
    """Prepare a video, or only inspect it if `target` is None. Returns the facts or an error message.

    A UserError is returned for what must stop the run, such as a full disk.
    """
    try:
        if target is None:
            return inspect(source)
        return transcode(source, target, short_side=short_side, fps=fps)
    except DecodeError as error:
        return str(error)
    except UserError as error:
        return error


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, do: Callable) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, do), daemon=True)
        self.process.start()
        theirs.close()
        self.name, self.since, self.alive = None, 0.0, True

    def give(self, name: str, arguments: tuple) -> None:
        """Start a job."""
        self.name, self.since = name, time.monotonic()
        self.pipe.send(arguments)

    def outcome(self, time_limit: float) -> Facts | str | UserError | None:
        """Return the outcome of the job; None while it is running."""
        try:
            if self.pipe.poll():
                outcome, reason = self.pipe.recv()
                name, self.name = self.name, None
                return outcome if reason is None else _lost(name, reason)
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            return self._end(f"{CRASHED} (exit status {code})")
        if time.monotonic() - self.since > time_limit:
            return self._end(f"{TOO_LONG} {time_limit:g} s")
        return None

    def _end(self, reason: str) -> str:
        name = self.name
        self.kill()
        return _lost(name, reason)

    def kill(self) -> None:
        """Kill the process and wait for it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.name, self.alive = None, False


def _lost(name: str, reason: str) -> str:
    return f"{name}: asked for: all of it; found: {reason}"


def _serve(pipe: Connection, do: Callable) -> None:
    """Do jobs and send (outcome, None) of each, or (None, reason) of one that failed."""
    end_with_parent()
    while True:
        try:
            arguments = pipe.recv()
        except (EOFError, OSError):  # the run has ended
            return
        try:
            answer = do(*arguments), None
        except ERRORS as error:
            answer = None, f"{UNEXPECTED}{type(error).__name__}: {' '.join(str(error).split())}"
        try:
            pipe.send(answer)
        except OSError:
            return
