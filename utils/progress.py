"""Progress of work that takes minutes to days, at a terminal and in a job's log."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

LOG_SECONDS = 60.0  # between two lines in a log


def progress_bar(iterable: Iterable | None = None, **options: object) -> tqdm:
    """Return a tqdm bar; `options` are passed on to it.

    A bar redraws its line ten times a second. In a file, such as Slurm's, that would be megabytes without a line break:
    if stderr is no terminal, there is a line a minute instead.
    """
    if not sys.stderr.isatty():
        form = "{desc}{n_fmt} of {total_fmt} {unit}s, {elapsed} passed, {remaining} left, {rate_fmt}\n"
        options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "bar_format": form} | options
    return tqdm(iterable, **options)
