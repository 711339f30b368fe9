"""`manifest.csv` of a prepared folder: one line per video, so that the disk need not be searched.

If `dataset.root` holds a manifest, `vggsound` and `folder` list the videos in it, without those that have an error, and
look at no file, so that 200,000 are listed in seconds on any file system. The videos of `ucf101` and `hmdb51` are those
of the published lists; of these, the manifest says which are there.
"""

import csv
import functools
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import write_whole

log = logging.getLogger("avssrl")

FILE = "manifest.csv"
COLUMNS = (
    "path",  # relative to the folder
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
    "declared",  # duration of the video by the raw file's header or, if that declares none, by its packets, seconds
    "shift",  # time in the raw file at which the prepared file's clock begins, seconds
    "bytes",  # size of the prepared file, which tells whether it is still the one of this line; empty with --check
    "source",  # fingerprint of the raw file and of the preparation options
    "error",  # why there is no file; empty if there is one
)


@dataclass(frozen=True)
class Manifest:
    """The videos of a manifest: `sources` maps paths, in order, to fingerprints, `errors` paths to error messages.

    `without_sound` holds the paths of readable videos that have no track of sound, or of which it could not be decoded.
    """

    sources: Mapping[str, str]
    errors: Mapping[str, str]
    without_sound: Set[str] = frozenset()

    @property
    def paths(self) -> list[str]:
        """Paths of the readable videos relative to the root, in order."""
        return list(self.sources)


def manifest_of(root: str | Path) -> Manifest | None:
    """Return the manifest of a folder, or None if there is none. Cached until the file changes.

    Raises:
        UserError: the file is not a manifest, or cannot be read.
    """
    file = Path(root) / FILE
    try:
        status = file.stat()
        return _load(str(file), status.st_mtime_ns, status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: str | Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read: {error.strerror}; make it readable, or delete it")


@functools.lru_cache(maxsize=4)
def _load(file: str, changed: int, size: int) -> Manifest:
    sources, errors, without_sound = {}, {}, set()
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        rows = _parsed(lines, file)
        header = next(rows, [])
        if not {"path", "source", "error"} <= set(header):
            raise UserError(f"{file}: expected the columns {', '.join(COLUMNS)}; found {', '.join(header[:5])}")
        path, source, error = (header.index(name) for name in ("path", "source", "error"))
        audio = header.index("audio") if "audio" in header else None
        for row in rows:
            if len(row) != len(header):
                raise UserError(f"{file}: expected {len(header)} values a line, found {len(row)}: {','.join(row)[:80]}")
            if row[error]:
                errors[row[path]] = row[error]
            else:
                sources[row[path]] = row[source]
                if audio is not None and row[audio] in ("none", "broken"):
                    without_sound.add(row[path])
    if errors:
        log.info("%s: %d videos; skipped %d that could not be prepared", file, len(sources), len(errors))
    return Manifest(sources, errors, without_sound)


def _parsed(lines: Iterable[str], file: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines)
    except csv.Error as error:
        raise UserError(f"{file}: not a manifest: {error}; prepare the data again") from None


def read_rows(file: str | Path) -> list[dict]:
    """Read the lines of a manifest or of a shard's part as dicts of strings. An incomplete last line is skipped.

    Raises:
        UserError: the file is not a manifest, or cannot be read. If there is none, it has no lines.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            return [row for row in csv.DictReader(lines) if row.get("error") is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(file, error) from None
    except csv.Error as error:
        raise UserError(f"{file}: not a manifest: {error}; delete it") from None


def write_rows(file: str | Path, rows: Iterable[Mapping]) -> None:
    """Write a manifest atomically, sorted by path. Raises UserError if it cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["path"]))
    write_whole(Path(file), text.getvalue(), errors="surrogateescape")


def append_rows(file: str | Path, rows: Iterable[Mapping]) -> Iterator[None]:
    """Append lines to a manifest as they arrive, writing each before requesting the next.

    Raises:
        UserError: a line cannot be written.
    """
    for row in rows:
        try:
            with Path(file).open("a", newline="", encoding="utf-8", errors="surrogateescape") as out:
                csv.DictWriter(out, COLUMNS).writerow(row)
        except OSError as error:
            raise UserError(f"{file}: could not be written: {error}") from None
        yield


def missing_of(manifest: Manifest, names: Sequence[str]) -> list[int]:
    """Return the indices of the names for which the manifest has no file."""
    return [i for i, name in enumerate(names) if name not in manifest.sources]


def size_and_time(file: Path) -> str:
    """Return a file's size in bytes and modification time in ns as a string that identifies its state, or `absent`."""
    try:
        status = file.stat()
    except OSError:  # such as a broken link, which is reported when it is opened
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"
