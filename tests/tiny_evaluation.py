"""A small UCF-101 and evaluations of it that run in seconds, for tests that start the scripts as a user does."""

import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import yaml

from tests import tiny
from utils.errors import UserError
from utils.logger import log

TRAIN, TEST = 4, 3  # videos a class; 6 test videos in 2 classes, 8 training videos
CLASSES = ("HandstandPushups", "Pour (it) & go!")


def make_ucf(root: Path, make_video, classes=CLASSES, train=TRAIN, test=TEST) -> Path:
    """Videos `<root>/videos/<Class>/v_<Class>_g<NN>_c01.mp4` and the lists of the first split."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = {"train": [], "test": []}
    for label, name in enumerate(classes, start=1):
        (root / "videos" / name).mkdir(parents=True)
        for i in range(train + test):
            path = f"{name}/v_{name}_g{i + 1:02d}_c01.mp4"
            size = (64, 48) if label == 1 else (48, 64)
            audio = None if i % 2 else 16000
            make_video(root / "videos" / path, seconds=0.6 + 0.2 * i, fps=16, size=size, audio_rate=audio)
            names["train" if i < train else "test"].append(f"{path} {label}" if i < train else path)
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, start=1)))
    for split, lines in names.items():
        (lists / f"{split}list01.txt").write_text("\r\n".join(lines) + "\r\n")
    return root


def write_evaluation(folder: Path, root: Path, classifier: str = "MOSTWrapper", name: str = "tiny", **changes) -> Path:
    """Write `<folder>/<name>-eval.yaml`; `changes` are keys, their dots written as __."""
    linear = classifier == "MOSTWrapper"
    cfg = {
        "num_workers": 0,
        "print_freq": 1,
        "cache_dir": str(folder / "cache"),
        "benchmark": {"name": name},
        "dataset": {
            "name": "ucf101",
            "root": str(root),
            "batch_size": 3,
            "video_clip_duration": 0.25,
            "video_fps": 16,
            "crop_size": 32,
            "transforms": "crop+color" if linear else "msc+color",
            "train": {"split": "trainlist{fold:02d}", "use_augmentation": True, "use_shuffle": True},
            "test": {"split": "testlist{fold:02d}", "final_clips_per_video": 4},
            "test_dense": {"split": "testlist{fold:02d}", "clips_per_video": 3},
        },
        "optimizer": {"num_epochs": 2, "lr": {"base_lr": 0.01, "milestones": [1], "gamma": 0.5}},
        "model": {"name": classifier, "args": {"feat_names": ["pool"], "feat_dims": [512]} if linear else {}},
    }
    for key, value in changes.items():
        section = cfg
        *parents, last = key.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    file = folder / f"{name}-eval.yaml"
    file.write_text(yaml.safe_dump(cfg))
    return file


def module_of(script: str) -> ModuleType:
    """A script as a module, anew."""
    spec = importlib.util.spec_from_file_location(script.replace("-", "_").removesuffix(".py"), tiny.REPO / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(script: str, *arguments: object) -> None:
    """Run a script in this process, on the CPU: as a user does, but without the seconds that starting Python takes."""
    module = module_of(script)
    torch.set_num_threads(1)
    no_gpu = mock.patch("torch.cuda.device_count", return_value=0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    level, propagate = log.level, log.propagate
    try:
        with no_gpu, mock.patch.object(sys, "argv", [script, *map(str, arguments)]):
            module.main()
    finally:  # as at the end of a process: signals end it, its log is closed, and the lock on its folder is gone
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate  # or caplog would see nothing in later tests


def results(folder: Path, script: str, *arguments: object, ranks: int = 1) -> dict:
    """Run an evaluation in `folder`, where its MODEL_CFG says that runs go, and read the results it wrote last."""
    if ranks > 1 or "--distributed" in arguments:
        tiny.run(*arguments, script=script, ranks=ranks)
    else:
        run_here(script, *arguments)
    files = sorted(folder.rglob("results.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(files[-1].read_text())


def mistake(script: str, *arguments: object) -> str:
    """Run an evaluation that must end in a user's mistake; its one line."""
    with pytest.raises(UserError) as error:
        run_here(script, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def comparable(found: dict) -> dict:
    """Results without what differs from run to run: time, command, machine."""
    return {key: value for key, value in found.items() if key not in ("made", "recipe")}
