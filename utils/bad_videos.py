"""Videos that could not be decoded: counted, listed in a file, limited per epoch."""

import csv
import io
import logging
from pathlib import Path

from utils.distributed import gather_objects, is_main
from utils.errors import UserError
from utils.files import write_whole

log = logging.getLogger("avssrl")


class BadVideos:
    """Decoding failures of a run, written to `<folder>/bad-videos.csv` (file, reason, count).

    A sample fails if its own video cannot be decoded, however many are tried in its place.

    Args:
        folder: the run's folder.
        most: fraction of an epoch's samples that may fail.
        samples: samples per epoch, over all processes.
    """

    def __init__(self, folder: Path, most: float, samples: int) -> None:
        self.file = folder / "bad-videos.csv"
        self.most, self.samples = most, samples
        self._counts: dict[str, list] = {}
        self._pending: list[tuple[str, str]] = []
        self._failed = 0  # samples, of this process, since the last `collect`
        self._epoch, self._in_epoch = 0, 0

    def record(self, batch: dict) -> None:
        """Record a batch's failures.

        Raises:
            UserError: none of the videos tried for a sample could be read.
        """
        self._pending += batch["failures"]
        self._failed += batch["failed"]
        if "unreadable" in batch:
            self._flush(self._pending)
            number, (name, reason) = len(batch["unreadable"]), batch["unreadable"][-1]
            raise UserError(
                f"no readable video for a sample: all {number} that were tried failed; last {name}: {reason}"
            )

    def collect(self, epoch: int) -> int:
        """Collect the failures of all ranks and return the epoch's failed samples. Every rank must call it.

        Raises:
            UserError: more than the allowed fraction of the epoch's samples failed.
        """
        gathered = gather_objects((self._pending, self._failed))
        pending = [failure for failures, _ in gathered for failure in failures]
        self._pending, self._failed = [], 0
        if epoch != self._epoch:
            self._epoch, self._in_epoch = epoch, 0
        self._in_epoch += sum(failed for _, failed in gathered)
        self._flush(pending)
        if self._in_epoch > self.most * self.samples:
            raise UserError(
                f"{self._in_epoch} of the {self.samples} samples of epoch {epoch + 1} could not be read (damaged, or "
                f"without sound), more than max_bad_fraction: {self.most:g} allows; see {self.file}. Raise it, or "
                "prepare the folder (python3 -m datasets.prepare), which finds those without sound"
            )
        return self._in_epoch

    def state_dict(self) -> dict:
        """State for the checkpoint."""
        return {"counts": self._counts, "epoch": self._epoch, "in_epoch": self._in_epoch}

    def load_state_dict(self, state: dict) -> None:
        """Resume counting from a checkpoint."""
        self._counts = {name: list(entry) for name, entry in state["counts"].items()}
        self._epoch, self._in_epoch = state["epoch"], state["in_epoch"]

    def _flush(self, failures: list[tuple[str, str]]) -> None:
        if not failures or not is_main():
            return
        for name, reason in failures:
            if name not in self._counts:
                log.warning("bad video, replaced by another: %s: %s", name, reason)
            entry = self._counts.setdefault(name, [reason, 0])
            entry[1] += 1
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["file", "reason", "count"])
        rows.writerows([name, *entry] for name, entry in sorted(self._counts.items()))
        write_whole(self.file, text.getvalue(), errors="surrogateescape")
