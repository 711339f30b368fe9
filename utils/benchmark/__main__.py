"""Measure this project on this machine.

    python3 -m utils.benchmark step CFG            # a training step, from the plain form to ours
    python3 -m utils.benchmark inference CFG       # the backbone's forward pass, as in linear evaluation
    python3 -m utils.benchmark scaling CFG         # 1 to N processes, and the bytes they exchange
    python3 -m utils.benchmark bank                # the memory bank over the number of instances
    python3 -m utils.benchmark loader CFG --root RAW [--prepared DIR]    # reading raw and prepared files
    python3 -m utils.benchmark training CFG --root DIR                   # the loader and the step, alone and together

All but the last two use synthetic data. All figures of one table are measured in the same run.
"""

import argparse

from utils.benchmark import bank, inference, loader, scaling, step, training
from utils.cli import run_script

COMMANDS = {  # modules with add_arguments(parser) and run(args)
    "step": step,
    "inference": inference,
    "scaling": scaling,
    "bank": bank,
    "loader": loader,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m utils.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__))
    args = parser.parse_args()
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_script(main)
