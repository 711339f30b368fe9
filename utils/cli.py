"""Command-line options of the scripts, and their exit handling."""

import argparse
import io
import sys
from collections.abc import Callable

from utils.errors import STATUS, Preempted, RunFailed, UserError, end_log, in_one_line, lost_worker


def pretraining_parser(description: str) -> argparse.ArgumentParser:
    """The options of main-ssl.py and main-vicreg.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfg", metavar="CFG", help="YAML configuration, such as configs/demo/xid.yaml")
    add_common_options(parser)
    return parser


def evaluation_parser(description: str) -> argparse.ArgumentParser:
    """The options of eval-action-recg-linear.py and eval-action-recg.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfg", metavar="CFG", help="YAML of the benchmark, such as configs/ucf/8at16-linear.yaml")
    parser.add_argument("model_cfg", metavar="MODEL_CFG", help="YAML of the pre-training")
    add_common_options(parser)
    add = _both_spellings(parser.add_argument_group("evaluation"))
    add("--set-model", metavar="KEY=VALUE", action="append", default=[], help="change a key of MODEL_CFG; repeatable")
    add("--checkpoint", metavar="FILE", help="pre-trained weights; default: the checkpoint of MODEL_CFG's run")
    add("--random-weights", action="store_true", help="no pre-trained weights: the baseline")
    add("--few-shot-ratio", type=float, metavar="R", help="train on this fraction of each class's videos, (0, 1]")
    add("--use-rest-classes", action="store_true", help="train separate classifiers for unseen and seen classes")
    add("--allow-missing", action="store_true", help="continue without videos that are missing or cannot be read")
    add("--test-only", action="store_true", help="test the stored classifier without training")
    add("--resume", action="store_true", help="resume from the stored classifier")
    add("--debug", action="store_true", help="one worker, batch size 1")
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options common to all four scripts. Each can be spelt with dashes or underscores."""
    add = _both_spellings(parser)
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of CFG (dotted); repeatable")
    add("--quiet", action="store_true", help="write to the log file only")
    add("--seed", type=_seed, metavar="S", help="seed for weights, clips and negatives; default: the YAML's")
    add("--gpu", type=int, metavar="ID", help="run on this GPU only; default: the first, or the CPU without one")
    group = parser.add_argument_group(
        "several processes", "torchrun and Slurm (srun) need none of these: their environment variables are enough"
    )
    add = _both_spellings(group)
    add(
        "--multiprocessing-distributed",
        "--distributed",
        dest="distributed",
        action="store_true",
        help="start one process per GPU of this node",
    )
    add("--nproc", type=int, metavar="N", help="processes on this node; default: one per GPU, 1 without a GPU")
    add("--world-size", type=int, metavar="N", help="nodes, or without --distributed processes; default: 1")
    add("--rank", type=int, metavar="R", help="number of this node (or process), 0 to N - 1")
    add("--dist-url", metavar="URL", help="rendezvous address: tcp://HOST:PORT of the first node")
    add("--dist-backend", choices=("nccl", "gloo"), metavar="B", help="default: nccl on GPUs, gloo on CPUs")


def _both_spellings(group: argparse._ActionsContainer) -> Callable[..., None]:
    """`group.add_argument`, for options that can be spelt with dashes or underscores."""

    def add(*names: str, **options: object) -> None:
        group.add_argument(*names, *("--" + n[2:].replace("-", "_") for n in names if "-" in n[2:]), **options)

    return add


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `lowest`."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected {lowest} or more, found {text}")
        return int(text)

    return number


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, found {text}")
    return int(text)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. Errors that users can fix or wait out end in one line and a matching exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes; stderr does this by default
    try:
        main()
    except (UserError, RunFailed, Preempted) as error:
        _end(in_one_line(error), STATUS[type(error)])
    except RuntimeError as error:
        if (message := lost_worker(error)) is None:
            raise
        _end(f"failed: {message}", STATUS[RunFailed])
    except KeyboardInterrupt:
        _end("interrupted", 130)


def _end(line: str, status: int) -> None:
    print(line, file=sys.stderr)
    end_log(line)
    sys.exit(status)
