"""Early stops of a run: stop signals and non-finite numbers."""

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
    """Records SIGTERM and SIGUSR1 (Slurm's warning), so that the run can save and end at the next step.

    The loader's workers survive both if sent to all processes of a run (`datasets.video_dataset`).

    Args:
        again: how to resume the run, for the message.
    """

    def __init__(self, again: str = "run it again") -> None:
        self.again = again
        self._name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it. Hosts communicate without the devices."""
        return any_rank(self._name is not None)

    def watch(self, batches: Iterable[dict], alone: bool = False) -> Iterator[dict]:
        """Iterate over `batches` until a rank is asked to stop, for work whose progress is not saved.

        Args:
            alone: only this rank iterates now; otherwise all ranks must, over the same number of batches.

        Raises:
            Preempted: a rank (with `alone`, this one) was asked to stop.
        """
        for batch in batches:
            if alone and self._name:
                raise self._error()
            if not alone and self.on_any_rank():
                raise self.preempted()
            yield batch

    def preempted(self, place: str | None = None) -> Preempted:
        """The exception that ends this process once rank 0 has saved the run at `place`. Every rank must call it."""
        barrier()
        return self._error(f", saved at {place}" if place else "")

    def _error(self, saved: str = "") -> Preempted:
        return Preempted(f"stopped by {self._name or 'a signal to another rank'}{saved}; {self.again} to go on")


class NonFiniteGuard:
    """Stops a run if its gradients (with fp16: its losses) are not finite, and reports the clips concerned.

    Only the gradients' norm is looked at: a loss of NaN shows in it. With several ranks the gradients are already
    averaged, so all ranks reach the same verdict (with fp16 they exchange theirs). Reading it would make the host wait
    for the device. Unless steps may be skipped, it is therefore read one step later, from pinned memory to which it was
    copied right after its own step: reading it from the device would also wait for the next step.

    Args:
        folder: the run's folder.
        name_of: maps a video's index to its name.
        skips: number of steps that may be skipped before the run stops (`skip_nonfinite`).
        scaled: with fp16, overflowing gradients are left to the loss scaler, and the losses alone decide.
    """

    def __init__(self, folder: Path, name_of: Callable[[int], str], skips: int, scaled: bool) -> None:
        self.folder, self.name_of, self.skips, self.scaled = folder, name_of, skips, scaled
        self.skipped = 0
        self._model: nn.Module | None = None
        self._kept: dict[str, Tensor] = {}
        self._waiting: tuple[_Verdict, dict] | None = None

    def protect(self, model: nn.Module) -> None:
        """Make skipped steps restore the BN statistics of `model`, which each forward pass changes."""
        self._model = model if self.skips else None
        self._keep()

    def _keep(self) -> None:
        if self._model is not None:
            self._kept = {name: value.clone() for name, value in self._model.named_buffers()}

    def admits(self, place: Mapping[str, int], losses: list[Tensor], norm: Tensor, terms: dict, index: list) -> bool:
        """Whether the optimizer may step.

        Args:
            place: `epoch` and `step`, from 0, for the report.
            losses: this rank's loss of each micro-batch.
            norm: norm of the gradients.
            terms: what the criterion measured on the last micro-batch.
            index: the videos of each micro-batch.

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
            told = f"and {self.skips} steps (skip_nonfinite) were skipped already"
            raise RunFailed(f"{_describe(facts)}, {told}; {where}")
        log.warning("%s; this step is left out (%d of %d); %s", _describe(facts), self.skipped, self.skips, where)
        return False

    def check(self) -> None:
        """Read the pending verdict of the last step; to be called before anything is saved.

        Raises:
            RunFailed: the step was not finite. The diagnosis is saved.
        """
        if self._waiting is None:
            return
        (verdict, facts), self._waiting = self._waiting, None
        if verdict.read():
            raise RunFailed(f"{_describe(facts)}; the last checkpoint is from before; {self._save(facts)}")

    def state_dict(self) -> dict:
        """State for the checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Resume counting from a checkpoint."""
        self.skipped = state["skipped"]

    def _save(self, facts: dict) -> str:
        """Write every rank's losses, terms, clips and files on rank 0; returns where, or why it failed."""
        indices = [i for part in facts["index"] for i in part.tolist()]
        own = {
            "rank": rank(),
            "losses": facts["losses"].tolist(),
            "terms": {name: value.item() for name, value in facts["terms"].items()},
            "index": indices,
            "files": [self.name_of(i) for i in indices],
        }
        place = {name: facts[name] + 1 for name in ("epoch", "step")}  # counted from 1, as in the log
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
    """A flag being copied to the host; reading it waits only for work queued before the copy."""

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
