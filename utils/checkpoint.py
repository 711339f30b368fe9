"""Checkpoints: a crash at any moment leaves a good one on disk, and nothing is ever loaded partially.

Scripts use `RunCheckpoints`; the functions below it are independent of runs.
"""

import logging
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from utils.config import flatten
from utils.distributed import any_rank, gather_objects, is_main, world_size
from utils.errors import UserError, lost_worker

log = logging.getLogger("avssrl")

LATEST, PREVIOUS = "checkpoint.pth.tar", "checkpoint-previous.pth.tar"
WRAPPERS = ("module.", "_orig_mod.")  # name prefixes added by DDP and torch.compile
AVID_PREFIXES = {"spt_": "spatial_", "tmp_": "temporal_"}  # layer names in a block: AVID-CMA's, ours
OF_A_RUN = {"config", "videos", "world_size"}  # keys that distinguish our run checkpoints from bare weights
UNREADABLE = (  # raised by torch.load for bytes not written by torch.save; the older format may raise anything
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    struct.error,
)
State = TypeVar("State")


FREE_TO_CHANGE = {  # keys that may change when a run resumes, as they do not alter its meaning
    "resume",
    "test_only",
    "num_workers",
    "test_freq",
    "print_freq",
    "save_every_minutes",
    "monitor_every",
    "max_bad_fraction",
    "skip_nonfinite",
    "keep_last",
    "cache_dir",
    "cuda_graphs",
    "dataset.root",
    "dataset.decode_once",
    "model.name",
    "model.model_dir",
    "model.args.checkpoint",
    "loss.args.checkpoint",
}


class RunCheckpoints:
    """A run's checkpoints: when to save, what to store, whether a stored one matches the current run.

    Args:
        folder: the run's folder.
        config: the resolved configuration.
        videos: fingerprint of the training list, which indexes the rows of a memory bank.
        steps: steps per epoch.
        precision: the number format in use; `precision: null` in the configuration leaves it to the device.
    """

    def __init__(self, folder: Path, config: dict, videos: str, steps: int, precision: str) -> None:
        self.folder, self.config, self.videos, self.steps, self.precision = folder, config, videos, steps, precision
        self.file = folder / LATEST
        self._last_save = time.monotonic()
        self._latest_damaged = False

    def latest(self) -> dict | None:
        """The state to resume from, or with `test_only` to measure; None for a new run or with `resume: false`.

        Every rank must call it and gets the same state.

        Raises:
            UserError: the checkpoint has another configuration or other videos, is damaged, or is missing with
                `test_only`; or the ranks found different ones.
        """
        return agreed(self.folder, self._latest, lambda state: f"epoch {state['epoch']}, step {state['step']}")

    def _latest(self) -> dict | None:
        if not (self.config["resume"] or self.config["test_only"]):
            return None
        found = load_latest(self.folder)
        if found is None:
            if self.config["test_only"]:
                raise UserError(f"{self.file}: no checkpoint to measure; train without test_only")
            return None
        state, path = found
        if not state.keys() >= OF_A_RUN:
            raise UserError(
                f"{path}: holds weights, not a run that can be resumed; start from them with "
                f"model.args.checkpoint={path} in a run with another model.name"
            )
        self._latest_damaged = path.name == PREVIOUS
        changes = _changes(state.get("config", {}), self.config)
        if changes:
            raise UserError(
                f"{path}: was made with another configuration ({_few(changes)}); restore that one, give the run "
                "another model.name, or start from scratch with --set resume=false"
            )
        if state["videos"] != self.videos:
            raise UserError(
                f"{path}: was trained on video list {state['videos']}, but the list is now {self.videos}: files were "
                "added, removed or renamed, and the memory bank would not match; restore them, or give the run "
                "another model.name"
            )
        if state.get("steps", self.steps) != self.steps:  # older checkpoints lack it
            raise UserError(
                f"{path}: on {state['world_size']} processes its epochs had {state['steps']} steps, on {world_size()} "
                f"they have {self.steps}: the smaller last batch does not divide among them; use another number"
            )
        log.info("going on from %s: epoch %d, step %d", path, state["epoch"], state["step"])
        if state["world_size"] != world_size():
            log.warning("it ran on %d processes, now %d: not bit-exact from here", state["world_size"], world_size())
        if (before := state.get("precision", self.precision)) != self.precision:
            log.warning("it ran in %s, now in %s: not bit-exact from here", before, self.precision)
        return state

    def due(self) -> bool:
        """Whether `save_every_minutes` have passed since the last save."""
        return time.monotonic() - self._last_save > 60 * self.config["save_every_minutes"]

    def due_after(self, epoch: int) -> bool:
        """Whether to save after `epoch` epochs; every rank must call it."""
        optimizer = self.config["optimizer"]
        asked = epoch % self.config["test_freq"] == 0 or epoch == optimizer["num_epochs"]
        return any_rank(self.due()) or asked or epoch in optimizer["lr"]["milestones"]

    def save(self, stateful: Mapping[str, Any], keep_as: str | None = None, **values: object) -> None:
        """Save each `state_dict` under its name, and the `values` (epoch, step, ...) as they are, on rank 0.

        Every rank must call it.
        """
        self._last_save = time.monotonic()
        for part in stateful.values():
            if hasattr(part, "assemble"):
                part.assemble()
        if not is_main():
            return
        state = {name: part.state_dict() for name, part in stateful.items()}
        state |= {"config": self.config, "videos": self.videos, "world_size": world_size(), "steps": self.steps}
        state["precision"] = self.precision
        save(self.folder, state | values, keep_as, self._latest_damaged)
        self._latest_damaged = False
        if self.config["keep_last"]:
            self._drop_old()

    def save_epoch(self, stateful: Mapping[str, Any], epoch: int, **values: object) -> None:
        """Save at the end of an epoch; `epoch` is the number of completed epochs.

        The checkpoint before a learning-rate milestone is kept as `checkpoint-ep<N>.pth.tar`. With `keep_last: N` the
        last N are kept, too.
        """
        keep = epoch in self.config["optimizer"]["lr"]["milestones"] or self.config["keep_last"] > 0
        self.save(stateful, f"checkpoint-ep{epoch}.pth.tar" if keep else None, epoch=epoch, step=0, **values)

    def _drop_old(self) -> None:
        """Delete epoch checkpoints that are neither milestones nor among the last `keep_last`."""
        kept = {f"checkpoint-ep{epoch}.pth.tar" for epoch in self.config["optimizer"]["lr"]["milestones"]}
        others = [path for path in self.folder.glob("checkpoint-ep*.pth.tar") if path.name not in kept]
        others.sort(key=lambda path: path.stat().st_mtime_ns)  # not by epoch: some may be from an earlier run
        for path in others[: max(0, len(others) - self.config["keep_last"])]:
            path.unlink()

    def restore(self, state: Mapping, stateful: Mapping[str, Any]) -> None:
        """Load a state into the objects that it was saved from, checking all names and shapes.

        Raises:
            UserError: a part is missing or does not match.
        """
        for name, part in stateful.items():
            if name not in state:
                raise UserError(f"{self.folder / LATEST}: has no {name}; start from scratch with --set resume=false")
            if isinstance(part, nn.Module):
                load_weights(part, state[name], f"{self.folder / LATEST} ({name})")
            else:
                part.load_state_dict(state[name])


def agreed(folder: Path, find: Callable[[], State], place: Callable[[State], str]) -> State:
    """The result of `find`, if all ranks find a state with the same `place`, or all find none.

    Raises:
        UserError: on every rank, if `find` raised it on any rank or the places differ.
    """
    state, mistake, own = None, None, "none"
    try:
        if state := find():
            own = place(state)
    except UserError as error:
        mistake = str(error)
    found = gather_objects((mistake, own))
    if mistakes := [mistake for mistake, _ in found if mistake]:
        raise UserError(mistakes[0])
    if len({own for _, own in found}) > 1:
        told = _few([f"rank {number}: {own}" for number, (_, own) in enumerate(found)], 8)
        raise UserError(f"{folder}: ranks found different checkpoints ({told}); all nodes must share one folder")
    return state


def start_from_others(cfg: dict, model: nn.Module, criterion: nn.Module, videos: str) -> None:
    """Load the weights of `model.args.checkpoint` and the bank of `loss.args.checkpoint`, if given.

    Raises:
        UserError: they do not match, or the bank belongs to a video list with another fingerprint than `videos`.
    """
    if (file := cfg["model"]["args"].get("checkpoint")) is not None:
        log.info("weights from %s: %s", file, load_pretrained(model, file))
    if (file := cfg["loss"]["args"].get("checkpoint")) is not None:
        other = load(file)
        if not isinstance(other.get("train_criterion"), Mapping):
            raise UserError(f"loss.args.checkpoint: {file}: holds no memory bank (`train_criterion`)")
        if other.get("videos", videos) != videos:
            raise UserError(
                f"loss.args.checkpoint: {file}: its bank is for video list {other['videos']}, this one is {videos}"
            )
        if "videos" not in other:
            log.warning(
                "loss.args.checkpoint: %s: does not say of which list of videos its bank is: make sure that it is this "
                "one, in this order (names sorted)",
                file,
            )
        load_weights(criterion, other["train_criterion"], file, optional=("_extra_state",))
        log.info("memory bank from %s", file)


def _changes(stored: Mapping, now: Mapping) -> list[str]:
    stored, now = flatten(stored), flatten(now)
    new = [key for key in now if key not in stored and not _free(key)]
    if stored and new:  # keys added by a newer version must not prevent resuming
        log.info("the checkpoint was saved before these keys existed: %s", _few([f"{key} {now[key]}" for key in new]))
    return [
        f"{key} was {value!r}, is {now.get(key)!r}"
        for key, value in stored.items()
        if value != now.get(key) and not _free(key)
    ]


def _free(key: str) -> bool:
    return key in FREE_TO_CHANGE or key.startswith("dataset.test.")


def save(folder: str | Path, state: Mapping, keep_as: str | None = None, latest_damaged: bool = False) -> Path:
    """Write `<folder>/checkpoint.pth.tar` to a temporary file, flush it and rename it; the previous one is kept.

    With `keep_as`, a permanent copy with that name is made first: a run killed in between makes both again. If the
    latest one is known to be damaged (`latest_damaged`), it is overwritten and does not replace the good previous one.

    Raises:
        UserError: it could not be written (a full disk, say). The last good checkpoint is untouched.
    """
    folder = Path(folder)
    latest, temporary, copy = folder / LATEST, folder / (LATEST + ".tmp"), folder / (LATEST + ".copy.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)  # left by a killed save
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None:
            shutil.copyfile(temporary, copy)
            with copy.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(copy, folder / keep_as)
        if latest.exists() and not latest_damaged:
            os.replace(latest, folder / PREVIOUS)
        os.replace(temporary, latest)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a failed write
        temporary.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
        if lost_worker(error) is not None:
            raise
        reason = _one_line(_first_cause(error))
        raise UserError(f"{latest}: could not be saved: {reason}; the checkpoint before is untouched") from error
    return latest


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: str | Path) -> dict:
    """Load a checkpoint onto the CPU. Only plain data is read (`weights_only`), after verifying the checksums.

    The wrapper prefixes `module.` and `_orig_mod.` are removed from names in `model` and `train_criterion`.

    Raises:
        UserError: the file is missing, truncated, corrupted, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    _check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else _one_line(error)
        raise UserError(f"{path}: holds more than plain data and is not loaded: {what}") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable checkpoint: {_one_line(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a dict with `model`, found {type(state).__name__}")
    for part in ("model", "train_criterion"):
        if isinstance(state.get(part), Mapping):
            state[part] = unwrap_names(state[part])
    return state


def load_latest(folder: str | Path) -> tuple[dict, Path] | None:
    """The newest good checkpoint of a run and its path; None if the run has no checkpoint.

    If the latest one is damaged, the previous one is used, with a warning.

    Raises:
        UserError: all checkpoints are damaged.
    """
    folder = Path(folder)
    errors = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = load(path)
        except UserError as error:
            errors.append(str(error))
            continue
        for message in errors:
            log.warning("%s. Going on from %s instead.", message, path.name)
        return state, path
    if errors:
        raise UserError(f"no good checkpoint: {'; '.join(errors)}; move the files away to start from scratch")
    return None


def load_weights(module: nn.Module, weights: Mapping[str, torch.Tensor], source: str, optional: tuple = ()) -> None:
    """Load `weights` into `module`, all of them or none.

    Names ending in one of `optional` may be missing from `weights`.

    Raises:
        UserError: names are missing or unexpected, shapes differ, or values are not finite; the message lists them and
            names `source`.
    """
    weights, own = unwrap_names(weights), module.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith(optional or ("\0",))]
    unexpected = [name for name in weights if name not in own]
    wrong = [
        f"{name} is {_shape(weights[name])}, expected {_shape(own[name])}"
        for name in own
        if name in weights and _shape(own[name]) != _shape(weights[name])
    ]
    if missing or unexpected or wrong:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
        text = "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in parts if names)
        raise UserError(f"{source}: does not fit {type(module).__name__}: {text}")
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{source}: {len(broken)} are not finite: {_few(broken)}; use an earlier checkpoint")
    module.load_state_dict(dict(weights), strict=False)


def load_pretrained(module: nn.Module, file: str | Path, part: str | None = None) -> str:
    """Load the weights of a known checkpoint (see `recognise`) into a model and return a description of their origin.

    Args:
        part: the part of a model that `module` is (such as `video_model`); only its weights are loaded.

    Raises:
        UserError: the file cannot be read, or does not match.
    """
    weights, words = recognise(load(file), str(file))
    if part is not None:
        weights = part_of(weights, part)
    load_weights(module, weights, f"{file} ({part})" if part else str(file))
    return words


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping, file: Path) -> None:
    """Load an optimizer's state from `file`.

    Raises:
        UserError: it is of other parameters, such as those that an older version trained.
    """
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise UserError(f"{file}: {error}; start from scratch with --set resume=false") from None


def recognise(state: Mapping, source: str) -> tuple[dict, str]:
    """The weights of a pre-trained model under our names, and a description of their origin.

    Recognised by content: our checkpoints, the thesis' published ones, AVID-CMA's, and bare state dicts of each.

    Raises:
        UserError: it holds another network; the message says which, or what was found.
    """
    weights = state.get("model", state)
    weights = unwrap_names(weights) if isinstance(weights, Mapping) else {}
    weights = {str(name): value for name, value in weights.items()}
    if any(name.startswith("layer1.0.conv1.0") for name in weights):
        raise UserError(
            f"{source}: is a torchvision R(2+1)D (layer1.0.conv1.0 ...), a different network: its temporal "
            "convolutions have other widths and its stem is factorised; use an AV-SSRL or AVID-CMA checkpoint"
        )
    if not any(name.startswith("video_model.") for name in weights):
        found = ", ".join(map(str, [*(weights or state)][:3])) or "nothing"
        raise UserError(f"{source}: expected weights called video_model.*, found {found}; not a pre-trained model")
    if any(f".{prefix}" in name for name in weights for prefix in AVID_PREFIXES):
        for prefix, ours in AVID_PREFIXES.items():
            weights = {name.replace(f".{prefix}", f".{ours}"): value for name, value in weights.items()}
        return weights, "AVID-CMA's checkpoint"
    if state.keys() >= OF_A_RUN:
        return weights, f"our checkpoint of {state['config']['model']['name']} after {state.get('epoch')} epochs"
    epoch = f" after {state['epoch']} epochs" if isinstance(state.get("epoch"), int) else ""
    return weights, f"a checkpoint in the thesis' format{epoch}"


def part_of(weights: Mapping, part: str) -> dict:
    """The weights of one part of a model, such as `video_model`, without that prefix."""
    return {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}


def unwrap_names(state: Mapping) -> dict:
    """The same state, without the name prefixes that DDP and torch.compile add."""
    return {_unwrap(name): value for name, value in state.items()}


def _unwrap(name: str) -> str:
    if not isinstance(name, str):
        return name
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _check_sums(path: Path) -> None:
    """Verify the CRC-32 that torch.save wrote for each record. Old formats, which are not zip files, pass."""
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty")
    try:
        with path.open("rb") as file:
            head = file.read(2)
        if head != b"PK" and not head.startswith(b"\x80"):  # neither a zip file nor a pickle (the old format)
            raise UserError(f"{path}: not a readable checkpoint: torch.save did not write it")
        if head == b"PK":
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():  # fields torch.save leaves 0, not covered by a checksum
                    if entry.compress_type or entry.flag_bits & 1 or entry.external_attr:
                        raise UserError(f"{path}: is damaged: bad zip directory entry for {entry.filename}")
                bad = archive.testzip()
            if bad is not None:
                raise UserError(f"{path}: is damaged: checksum of {bad} does not hold")
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is damaged or cut short: {_one_line(error)}") from None


def _shape(value: object) -> tuple | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _few(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_cause(error: BaseException) -> BaseException:
    """The original error, such as the full disk behind torch.save's own error."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
