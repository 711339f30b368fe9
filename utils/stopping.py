"""Why a run stops before its end: a signal that asks for it, numbers that are not finite."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import any_rank, barrier, gather_objects, is_main, rank, world_size
from utils.errors import Preempted, RunFailed, UserError
from utils.files import write_whole
from utils.logger import log


class StopSignal:
    """Notes SIGTERM and SIGUSR1 (Slurm's warning), so that the run can save and end at the next step.

    The loader's workers outlive both where they go to all processes of a run (`datasets.video_dataset`).

    Args:
        again: what goes on with the run, for the message.
    """

    def __init__(self, again: str = "run it again") -> None:
        self.again = again
        self._name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it. Talks from host to host, not to the device."""
        return any_rank(self._name is not None)

    def watch(self, batches: Iterable[dict], alone: bool = False) -> Iterator[dict]:
        """These batches, until a rank is asked to stop: for work whose progress is not saved.

        Args:
            alone: no other rank goes through them now; else every rank must, and have as many.

        Raises:
            Preempted: one was, or with `alone` this one.
        """
        for batch in batches:
            if alone and self._name:
                raise self._error()
            if not alone and self.on_any_rank():
                raise self.preempted()
            yield batch

    def preempted(self, place: str | None = None) -> Preempted:
        """What to raise to end this process, once rank 0 has saved the run at `place`. Every rank must call it."""
        barrier()
        return self._error(f", saved at {place}" if place else "")

    def _error(self, saved: str = "") -> Preempted:
        return Preempted(f"stopped by {self._name or 'a signal to another rank'}{saved}; {self.again} to go on")


class NonFiniteGuard:
    """Stops a run whose loss or gradients are no longer finite, and says on which clips that happened.

    With several ranks the gradients are already averages, so that all ranks decide alike. Reading the verdict of a step
    would make the host wait for the device; unless steps may be skipped, it is read one step later, from pinned memory
    to which it was copied behind its own step: reading it from the device would wait for the step queued since, too.

    Args:
        folder: the run's.
        name_of: a video's name by its index.
        skips: how many steps may be left out before the run stops (`skip_nonfinite`).
        scaled: fp16. Gradients that overflow are then the loss scaler's business, and the losses alone decide.
    """

    def __init__(self, folder: Path, name_of: Callable[[int], str], skips: int, scaled: bool) -> None:
        self.folder, self.name_of, self.skips, self.scaled = folder, name_of, skips, scaled
        self.skipped = 0
        self._model: nn.Module | None = None
        self._kept: dict[str, Tensor] = {}
        self._waiting: tuple[_Verdict, dict] | None = None

    def protect(self, model: nn.Module) -> None:
        """Let steps that are left out leave the BN statistics of `model` alone, which each forward pass has changed."""
        self._model = model if self.skips else None
        self._keep()

    def _keep(self) -> None:
        if self._model is not None:
            self._kept = {name: value.clone() for name, value in self._model.named_buffers()}

    def admits(self, place: Mapping[str, int], losses: list[Tensor], norm: Tensor, terms: dict, index: list) -> bool:
        """Whether the optimizer may step.

        Args:
            place: `epoch` and `step`, from 0 on, for the report.
            losses: the rank's, of each part of the batch.
            norm: of the gradients.
            terms: what the criterion measured, of the last part.
            index: the videos of each part.

        Raises:
            RunFailed: this step, or the one before, was not finite and may not be skipped. The diagnosis is saved.
        """
        numbers = torch.stack([loss.detach().float() for loss in losses])
        bad = ~(numbers if self.scaled else norm).isfinite().all()
        if self.scaled and world_size() > 1:
            count = bad.int()
            dist.all_reduce(count)
            bad = count > 0
        facts = {**place, "losses": numbers, "grad_norm": norm.detach(), "terms": dict(terms), "index": index}
        if not self.skips:
            self.check()
            self._waiting = (_Verdict(bad), facts)
            return True
        if not bad.item():
            self._keep()
            return True
        for name, value in self._model.named_buffers():
            value.copy_(self._kept[name])
        self.skipped += 1
        where = self._save(facts)
        if self.skipped > self.skips:
            told = f"and skip_nonfinite: {self.skips} steps were left out already"
            raise RunFailed(f"{_describe(facts)}, {told}; {where}")
        log.warning("%s; this step is left out (%d of %d); %s", _describe(facts), self.skipped, self.skips, where)
        return False

    def check(self) -> None:
        """Read the verdict of the last step, before anything is saved.

        Raises:
            RunFailed: it was not finite. The diagnosis is saved.
        """
        if self._waiting is None:
            return
        (verdict, facts), self._waiting = self._waiting, None
        if verdict.read():
            raise RunFailed(f"{_describe(facts)}; the last checkpoint is from before; {self._save(facts)}")

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting."""
        self.skipped = state["skipped"]

    def _save(self, facts: dict) -> str:
        """Rank 0 writes every rank's losses, terms, clips and files; says where, or why not."""
        indices = [i for part in facts["index"] for i in part.tolist()]
        own = {
            "rank": rank(),
            "losses": facts["losses"].tolist(),
            "terms": {name: value.item() for name, value in facts["terms"].items()},
            "index": indices,
            "files": [self.name_of(i) for i in indices],
        }
        place = {name: facts[name] + 1 for name in ("epoch", "step")}  # counted from 1 on, as in the log
        file = self.folder / f"nonfinite-epoch{place['epoch']}-step{place['step']}.json"
        ranks = gather_objects(own)
        if is_main():
            report = place | {"grad_norm": facts["grad_norm"].item()}
            try:
                write_whole(file, json.dumps(report | {"ranks": ranks}, indent=1))
            except UserError as error:
                return f"the diagnosis is lost: {error}"
        return f"see {file}"


class _Verdict:
    """A flag on its way to the host; reading waits for the work queued before it alone."""

    def __init__(self, flag: Tensor) -> None:
        self._host, self._copied = flag, None
        if flag.is_cuda:
            self._host = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._host)


def _describe(facts: dict) -> str:
    losses = ", ".join(f"{loss:.4g}" for loss in facts["losses"].tolist())
    norm = facts["grad_norm"].item()
    return (
        f"not finite in epoch {facts['epoch'] + 1}, step {facts['step'] + 1}: loss {losses}, gradient norm {norm:.4g}"
    )
