"""Pictures of reports and benchmarks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, allowed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawable(name: str) -> str:
    """Make a file or class name drawable by matplotlib: replace bytes that are not UTF-8, escape `$`."""
    return name.encode(errors="surrogateescape").decode(errors="replace").replace("$", r"\$")


def picture(name: str) -> Path:
    """An argparse type: a file name with an extension that matplotlib supports, checked before any work."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats, ending = FigureCanvasBase.get_supported_filetypes(), Path(name).suffix[1:].lower()
    if ending not in formats:
        found = f"no format {ending}; {allowed(ending, formats)}" if ending else "a name such as picture.png is needed"
        raise argparse.ArgumentTypeError(f"{name or 'a picture'}: could not be drawn: {found}")
    return Path(name)


def save_picture(figure: "Figure", file: str | Path, dpi: int = 110) -> None:
    """Save a picture, creating its folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=dpi)
    except OSError as error:
        raise UserError(f"{file}: could not be drawn: {error}") from None
