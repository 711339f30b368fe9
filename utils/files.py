"""Files that are written whole or not at all, and by one process at a time."""

import fcntl
import logging
import os
import secrets
from pathlib import Path
from typing import TextIO

from utils.errors import UserError

log = logging.getLogger("avssrl")


def write_whole(file: Path, *parts: str | bytes | memoryview, errors: str = "strict") -> None:
    """Write a file, its folder made, so that a reader finds the old one or the new one, never half of one.

    Several processes may write the same file at once: the last one's stays.

    Args:
        parts: texts, written as UTF-8, or bytes, one after the other.
        errors: as `str.encode` takes it: what to do with characters that are none in UTF-8.

    Raises:
        UserError: it cannot be written.
    """
    if not file.name:
        raise UserError(f"{file}: could not be written: it is a folder, and a file's name is needed")
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as out:
                for part in parts:
                    out.write(part.encode("utf-8", errors) if isinstance(part, str) else part)
                out.flush()
                os.fsync(out.fileno())  # else a loss of power may leave the new name without its content
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
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
