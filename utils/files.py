"""Files that are written whole or not at all."""

import os
from pathlib import Path

from utils.errors import UserError


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
