"""Run every notebook in notebooks/ from top to bottom: `make test-notebooks`, or `python3 -m tests.notebooks`.

`--store` writes the outputs into the notebooks, as they are kept in the repository. Without it nothing is changed, and
a stored output larger than a screen is a failure, like a cell that raises.
"""

import argparse
import base64
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SCREEN_LINES = 60
SCREEN_PIXELS = (1200, 900)  # width, height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all of notebooks/")
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    args = parser.parse_args()
    files = args.files or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not files:
        sys.exit(f"failed: no notebook in {NOTEBOOKS}")
    failed = [file.name for file in files if not passes(file, args.store)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def passes(file: Path, store: bool) -> bool:
    """Run one notebook, in its own folder as Jupyter does, and print what went wrong."""
    started = time.perf_counter()
    notebook = nbformat.read(file, as_version=4)
    mistakes = [] if store else too_large(notebook)
    client = NotebookClient(
        notebook,
        timeout=600,  # seconds per cell
        kernel_name="python3",
        resources={"metadata": {"path": str(file.parent)}},
        record_timing=False,
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{file.name}: {error}")
        return False
    mistakes += too_large(notebook)
    if store and not mistakes:
        notebook.metadata["language_info"] = {"name": "python"}  # the kernel adds its version
        nbformat.write(notebook, file)
    for mistake in dict.fromkeys(mistakes):
        print(f"{file.name}: {mistake}")
    print(f"{file.name}: {'failed' if mistakes else 'passed'} in {time.perf_counter() - started:.0f} s")
    return not mistakes


def too_large(notebook: nbformat.NotebookNode) -> list[str]:
    """A line for each output that does not fit on a screen."""
    mistakes = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts = [output.get("text", "")] + [data[kind] for kind in data if kind.startswith("text/")]
            lines = max(text.count("\n") for text in texts)
            if lines > SCREEN_LINES:
                mistakes.append(f"cell {number}: an output of {lines} lines; at most {SCREEN_LINES} fit on a screen")
            width, height = png_size(data["image/png"]) if "image/png" in data else (0, 0)
            if width > SCREEN_PIXELS[0] or height > SCREEN_PIXELS[1]:
                mistakes.append(f"cell {number}: a picture of {width} x {height} pixels; at most {SCREEN_PIXELS}")
    return mistakes


def png_size(encoded: str) -> tuple[int, int]:
    """Width and height in pixels, from the header of a base64 PNG."""
    header = base64.b64decode(encoded)[:24]
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


if __name__ == "__main__":
    main()
