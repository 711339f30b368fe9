"""`manifest.csv` of a prepared folder: a line a video, so that nothing has to be looked for on the disk.

Where `dataset.root` holds a manifest, the data sets take the names of their videos from it and look for no file, so
that 200,000 of them are listed in seconds on any file system. Videos with an error are left out.
"""

import csv
import functools
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import write_whole

log = logging.getLogger("avssrl")

FILE = "manifest.csv"
COLUMNS = (
    "path",  # below the folder
    "label",
    "split",
    "duration",  # seconds
    "frames",
    "fps",
    "width",
    "height",
    "audio",  # sound, silent, none, broken
    "loudness",  # dBFS
    "motion",  # mean change of a pixel from frame to frame, of 255
    "still",  # 1: a still picture
    "declared",  # seconds of video by the raw file's header; 0: it does not say
    "shift",  # seconds: the raw file's time at which this one's clock begins
    "source",  # fingerprint of the raw file and of how it was prepared
    "error",  # why there is no file; empty where there is one
)


@dataclass(frozen=True)
class Manifest:
    """The videos of a manifest: paths in order, each with its source's fingerprint; and those with an error."""

    sources: Mapping[str, str]
    errors: Mapping[str, str]

    @property
    def paths(self) -> list[str]:
        """Paths of the readable videos below the root, in order."""
        return list(self.sources)


def manifest_of(root: str | Path) -> Manifest | None:
    """The manifest of a folder, None where there is none. Read once as long as the file does not change.

    Raises:
        UserError: the file is no manifest.
    """
    file = Path(root) / FILE
    try:
        status = file.stat()
    except OSError:
        return None
    return _load(str(file), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _load(file: str, changed: int, size: int) -> Manifest:
    sources, errors = {}, {}
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        rows = _parsed(lines, file)
        header = next(rows, [])
        if not {"path", "source", "error"} <= set(header):
            raise UserError(f"{file}: expected the columns {', '.join(COLUMNS)}; found {', '.join(header[:5])}")
        path, source, error = (header.index(name) for name in ("path", "source", "error"))
        for row in rows:
            if len(row) != len(header):
                raise UserError(f"{file}: expected {len(header)} values a line, found {len(row)}: {','.join(row)[:80]}")
            if row[error]:
                errors[row[path]] = row[error]
            else:
                sources[row[path]] = row[source]
    if errors:
        log.info("%s: %d videos, and %d without a file, left out", file, len(sources), len(errors))
    return Manifest(sources, errors)


def _parsed(lines: Iterable[str], file: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines)
    except csv.Error as error:
        raise UserError(f"{file}: is no manifest: {error}; prepare the data again") from None


def read_rows(file: str | Path) -> list[dict]:
    """The lines of a manifest, or of a shard's part of one, as dicts of texts. Half a last line is left out."""
    try:
        with Path(file).open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            return [row for row in csv.DictReader(lines) if row.get("error") is not None]
    except FileNotFoundError:
        return []
    except csv.Error as error:
        raise UserError(f"{file}: is no manifest: {error}; delete it") from None


def write_rows(file: str | Path, rows: Iterable[Mapping]) -> None:
    """Write a manifest whole or not at all, its lines sorted by path. UserError where it cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["path"]))
    write_whole(Path(file), text.getvalue(), errors="surrogateescape")


def append_rows(file: str | Path, rows: Iterable[Mapping]) -> Iterator[None]:
    """Add lines to a manifest as they come, each on the disk before the next one is asked for.

    Raises:
        UserError: one cannot be written.
    """
    for row in rows:
        try:
            with Path(file).open("a", newline="", encoding="utf-8", errors="surrogateescape") as out:
                csv.DictWriter(out, COLUMNS).writerow(row)
        except OSError as error:
            raise UserError(f"{file}: could not be written: {error}") from None
        yield


def missing_of(manifest: Manifest, names: Sequence[str]) -> list[int]:
    """The places of the names that a manifest has no file for."""
    return [i for i, name in enumerate(names) if name not in manifest.sources]


def size_and_time(file: Path) -> str:
    """A file's size in bytes and its last change in ns: what tells one state of it from another; `absent` if it is."""
    try:
        status = file.stat()
    except OSError:  # a broken link, say: whoever opens it says so
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"
