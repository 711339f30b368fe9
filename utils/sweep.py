"""Concept generalization in one command: methods x few-shot ratios x subsets, then the plots.

    python3 -m utils.sweep configs/ucf/8at16-linear.yaml configs/VGGSound-N1024.yaml configs/VGGSound-VICReg.yaml \\
        --random-weights --ratios 0.05 0.1 0.2 0.5 1 --seeds 42 43 44 --set dataset.root=DIR --out concepts.png

Runs eval-action-recg-linear.py --use-rest-classes for every combination. Each encoder processes the videos once: its
features are cached below `cache_dir`, and all ratios and subsets train on them. `--seeds` are the seeds of the few-shot
subsets (`few_shot_seed`); ratio 1 has only one subset. The same command resumes the sweep: stored classifiers are only
tested. Options after `--` are passed to the script (`-- --distributed --allow-missing`).
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from utils import evaluation
from utils.cli import evaluation_parser, run_script
from utils.concepts import report_concepts
from utils.config import load_config
from utils.errors import STATUS, Preempted, RunFailed, UserError
from utils.evaluation import RANDOM, benchmark_folder, ratio_text
from utils.logger import duration
from utils.pictures import picture

SCRIPT = Path(__file__).resolve().parents[1] / "eval-action-recg-linear.py"
VIEWS = 5  # views per training video if CFG asks for fresh crops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfg", metavar="CFG", help="YAML of the linear evaluation")
    parser.add_argument("model_cfgs", metavar="MODEL_CFG", nargs="+", help="YAML of a pre-training, one per method")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 1.0], metavar="R")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], metavar="S", help="seeds of the subsets")
    parser.add_argument("--random-weights", action="store_true", help="add random weights as a method")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of CFG")
    parser.add_argument("--set-model", metavar="KEY=VALUE", action="append", default=[], help="change every MODEL_CFG")
    parser.add_argument("--anew", action="store_true", help="train every classifier again")
    parser.add_argument("--out", type=picture, default="concepts.png", help="picture; figures go next to it as CSV")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    sweep(args, arguments[cut + 1 :])


def sweep(args: argparse.Namespace, script_options: list[str]) -> None:
    """Run the missing evaluations, then report.

    Raises:
        UserError: a bad key or ratio.
        RunFailed: an evaluation failed; its message is on the console.
        Preempted: the sweep, and with it the evaluation, was asked to stop.
    """
    for ratio in args.ratios:
        if not 0 < ratio <= 1:
            raise UserError(f"--ratios {ratio:g}: expected above 0 and at most 1")
    cfg = load_config(args.cfg, args.set, "evaluation")
    model_cfgs = [
        load_config(model_cfg, args.set_model, "pre-training", "--set-model") for model_cfg in args.model_cfgs
    ]
    folders = [benchmark_folder(cfg, model_cfg) for model_cfg in model_cfgs]
    if not cfg["feature_views"]:
        print(f"{args.cfg}: feature_views is 0 (fresh crops every epoch); using {VIEWS}, to compute features only once")
        args.set = [*args.set, f"feature_views={VIEWS}"]
    runs, started, child = list(combinations(args)), time.monotonic(), Child()
    for done, (model_cfg, random, ratio, seed) in enumerate(runs):
        left = duration((time.monotonic() - started) / done * (len(runs) - done)) if done else "?"
        method = RANDOM if random else Path(model_cfg).stem
        print(f"{done + 1}/{len(runs)} | {left} left | {method}, ratio {ratio:g}, few_shot_seed {seed}", flush=True)
        status = child.run(command(args, model_cfg, random, ratio, seed, script_options))
        if child.asked or status == STATUS[Preempted]:
            again = "run it again without --anew" if args.anew and done else "run it again"
            raise Preempted(f"stopped by a signal; {again} to go on")
        if status:
            raise RunFailed(f"{SCRIPT.name} ended with status {status} (see above); fix it and run this again")
        if args.anew and not done:
            for run in runs[1:]:
                clear(command(args, *run, script_options))
    report_concepts(folders, args.out)


def clear(command: list[str]) -> None:
    """Delete the results and classifiers of an evaluation: stopped half-way, the sweep goes on without `--anew`."""
    args = evaluation_parser(None).parse_args(command[2:])
    cfg, model_cfg = evaluation.load_evaluation(args, "MOSTWrapper", "eval-action-recg.py")
    evaluation.clear(args, cfg, model_cfg, evaluation.folds(cfg))


class Child:
    """Runs commands in child processes, one at a time, forwarding SIGTERM and SIGUSR1.

    `asked` is the signal received, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run a command and return its exit status."""
        with subprocess.Popen(command) as self._process:
            if self.asked is not None:  # received before the process existed
                self._process.send_signal(self.asked)
            return self._process.wait()


def combinations(args: argparse.Namespace) -> Iterator[tuple[str, bool, float, int]]:
    """Yield MODEL_CFG, whether with random weights, ratio, seed. Ratio 1, the whole training set, has one subset."""
    methods = [(model_cfg, False) for model_cfg in args.model_cfgs]
    if args.random_weights:
        methods.append((args.model_cfgs[0], True))
    for model_cfg, random in methods:
        for ratio in args.ratios:
            for seed in args.seeds if ratio < 1 else args.seeds[:1]:
                yield model_cfg, random, ratio, seed


def command(
    args: argparse.Namespace, model_cfg: str, random: bool, ratio: float, seed: int, script_options: list[str]
) -> list[str]:
    """The command line of one evaluation."""
    full = [sys.executable, str(SCRIPT), args.cfg, model_cfg, "--quiet", "--use-rest-classes"]
    full += ["--few-shot-ratio", ratio_text(ratio), "--set", f"few_shot_seed={seed}"]
    full += ["--set", "resume=false"] if args.anew else ["--resume"]
    if random:
        full.append("--random-weights")
    for change in args.set:
        full += ["--set", change]
    for change in args.set_model:
        full += ["--set-model", change]
    return full + script_options


if __name__ == "__main__":
    run_script(main)
