"""Outputs of a frozen network for every clip of every video, computed by all processes and kept by rank 0."""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.distributed import broadcast_object, gather_objects, is_main
from utils.errors import UserError

log = logging.getLogger("avssrl")

VERSION = 2  # increase when the same request would give other features
Forward = Callable[[Tensor, Tensor | None], dict[str, Tensor]]
ClipOutputs = tuple[dict[str, np.ndarray], np.ndarray]
"""Outputs (videos, clips, D) by name, and which videos could be read, bool (videos,); on ranks other than 0 empty."""


def clip_outputs(
    forward: Forward,
    batches: Iterable[dict],
    num_videos: int,
    chunk: int,
    failed: Callable[[list[tuple[str, str]]], None],
    create: Callable[[str, tuple[int, int, int]], np.ndarray] | None = None,
) -> ClipOutputs:
    """Run every clip of each video through a network, with the videos divided among ranks.

    Args:
        forward: maps frames (M, T, H, W, 3) and their augmentation (M, 5) or None to a dict of outputs (M, D). Called
            in inference mode, with at most `chunk` clips.
        batches: this rank's batches from `collate_readable`: `index` (N,), `frames` (N, clips, T, H, W, 3), `failures`.
            Every rank must have the same number of them.
        failed: called on every rank with the failures of all ranks.
        create: makes the float32 array for an output's name and shape (videos, clips, D); default: in memory.
    """
    arrays: dict[str, np.ndarray] = {}
    readable = np.zeros(num_videos, dtype=bool)
    create = create or (lambda name, shape: np.zeros(shape, np.float32))
    for batch in batches:
        own = {"failures": batch["failures"], "index": np.zeros(0, np.int64), "outputs": {}}
        if "frames" in batch:
            own |= {"index": batch["index"].numpy(), "outputs": _run(forward, batch, chunk)}
        for part in gather_objects(own):
            failed(part["failures"])
            if not is_main():
                continue
            readable[part["index"]] = True
            for name, values in part["outputs"].items():
                if name not in arrays:
                    arrays[name] = create(name, (num_videos, *values.shape[1:]))
                arrays[name][part["index"]] = values
    return arrays, readable


@torch.inference_mode()
def _run(forward: Forward, batch: dict, chunk: int) -> dict[str, np.ndarray]:
    videos, clips = batch["frames"].shape[:2]
    frames, aug = batch["frames"].flatten(0, 1), batch.get("video_aug")
    aug = None if aug is None else aug.flatten(0, 1)
    parts = []
    for i in range(0, len(frames), chunk):
        outputs = forward(frames[i : i + chunk], None if aug is None else aug[i : i + chunk])
        parts.append({name: value.float().cpu() for name, value in outputs.items()})
    return {name: torch.cat([p[name] for p in parts]).view(videos, clips, -1).numpy() for name in parts[0]}


def stored_clip_outputs(
    cache_dir: str | Path,
    meaning: Mapping,
    forward: Forward,
    make_batches: Callable[[], Iterable[dict]],
    num_videos: int,
    chunk: int,
    failed: Callable[[list[tuple[str, str]]], None],
) -> ClipOutputs:
    """`clip_outputs`, cached in `<cache_dir>/features/<digest of meaning>/`.

    The arrays are memory-mapped. `meaning` must hold everything that the values depend on, as plain data.

    Raises:
        UserError: the cache cannot be written.
    """
    text = json.dumps({"version": VERSION, **meaning}, sort_keys=True, default=str)
    folder = Path(cache_dir) / "features" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if broadcast_object(is_main() and (folder / "meaning.json").is_file()):
        failures = broadcast_object(json.loads((folder / "failures.json").read_text()) if is_main() else None)
        failed([tuple(failure) for failure in failures])
        if not is_main():
            return {}, np.zeros(num_videos, dtype=bool)
        log.info("features: read from %s", folder)
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        return arrays, np.array(arrays.pop("readable"))
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    failures = []

    def note(new: list[tuple[str, str]]) -> None:
        failed(new)
        failures.extend(new)

    def create(name: str, shape: tuple[int, int, int]) -> np.ndarray:
        building.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(building / f"{name}.npy", "w+", np.float32, shape)

    try:
        arrays, readable = clip_outputs(forward, make_batches(), num_videos, chunk, note, create)
        if is_main() and arrays:
            for array in arrays.values():
                array.flush()
            np.save(building / "readable.npy", readable)
            (building / "failures.json").write_text(json.dumps(failures))
            (building / "meaning.json").write_text(text)
            if not (folder / "meaning.json").is_file():  # an incomplete folder, left by older versions
                shutil.rmtree(folder, ignore_errors=True)
            try:
                os.replace(building, folder)
            except OSError:  # another evaluation made it meanwhile, and it may be in use
                if not (folder / "meaning.json").is_file():
                    raise
            log.info("features: %d videos, kept in %s", readable.sum(), folder)
    except OSError as error:
        raise UserError(f"cache_dir: {folder}: could not be written: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return arrays, readable


def rows_of(outputs: ClipOutputs, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs of the readable ones of these videos, and which of the rows are readable, bool.

    Raises:
        UserError: none are readable.
    """
    arrays, readable = outputs
    present = torch.from_numpy(readable)[rows]
    if is_main() and not present.any():
        raise UserError(f"none of {len(rows)} videos can be read; fix them, no video is left to continue with")
    return {name: torch.from_numpy(array[rows[present].numpy()]) for name, array in arrays.items()}, present
