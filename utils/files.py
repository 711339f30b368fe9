"""Files that are written whole or not at all, and by one process at a time."""

import fcntl
import logging
import os
from pathlib import Path
from typing import TextIO

from utils.errors import UserError

log = logging.getLogger("avssrl")


def write_whole(file: Path, text: str, errors: str = "strict") -> None:
    """Write a text file, its folder made, so that a reader finds the old one or the new one, never half of one.

    Args:
        errors: as `open` takes it: what to do with characters that are none in UTF-8.

    Raises:
        UserError: it cannot be written.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8", errors, newline="")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: could not be written: {error}") from None


def lock(file: TextIO, place: Path) -> None:
    """Hold a lock on an open file until it is closed; where the file system knows none, a warning says so.

    Raises:
        UserError: another process holds it, who writes to `place`.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{place}: another process is writing there; wait for its end, or stop it first") from None
    except OSError as error:
        log.warning("%s: cannot be locked (%s): see to it that no second process writes there", place, error)
