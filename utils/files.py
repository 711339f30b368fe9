"""Atomic file writes, and locks for files written by one process at a time."""

import fcntl
import logging
import os
import secrets
from pathlib import Path
from typing import TextIO

from utils.errors import UserError

log = logging.getLogger("avssrl")


def write_whole(file: Path, *parts: str | bytes | memoryview, errors: str = "strict") -> None:
    """Write a file atomically, creating its folder: readers find the old or the new one, never a partial one.

    Several processes may write the same file at once; the last one wins.

    Args:
        parts: texts, written as UTF-8, or bytes, which are concatenated.
        errors: how to handle characters that UTF-8 cannot encode, as in `str.encode`.

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
                os.fsync(out.fileno())  # else a power loss may leave the new name without its content
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file}: could not be written: {error}") from None


def make_folder(folder: Path, key: str) -> None:
    """Create a folder unless it is there. Raises UserError, which names the configuration's `key`, if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {folder}: cannot be created: {error.strerror}; set another folder") from None


def lock(file: TextIO, place: Path) -> None:
    """Lock an open file until it is closed; warn if the file system does not support locks.

    Raises:
        UserError: another process holds the lock and writes to `place`.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{place}: another process is writing there; wait for it to end, or stop it first") from None
    except OSError as error:
        log.warning("%s: cannot be locked (%s): make sure that no other process writes there", place, error)
