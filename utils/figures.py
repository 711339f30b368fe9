"""Where reports and benchmarks leave what they show."""

from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def output_file(file: str | Path) -> Path:
    """The path of a file that is to be written, its folder made.

    Raises:
        UserError: the folder cannot be made.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: its folder cannot be made: {error}") from None
    return file


def save_figure(figure: "Figure", file: str | Path, dpi: int = 110) -> None:
    """Save a picture, its folder made."""
    figure.savefig(output_file(file), dpi=dpi)
