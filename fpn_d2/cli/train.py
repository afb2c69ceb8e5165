"""``fpn-d2 train``, which is ``python train_net.py``: Detectron2's command line, on GPUs or CPUs."""

import argparse
import dataclasses
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence

from .parser import Parser

EXAMPLE = "fpn-d2 train --config-file quick_schedules/quickstart.yaml OUTPUT_DIR output/quickstart"
TEXT = "Train a detector, or evaluate one with --eval-only: Detectron2's command line, on GPUs or CPUs."


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    parser = verbs.add_parser("train", help=TEXT, description=TEXT, epilog=f"Example: {EXAMPLE}")
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of Detectron2's `default_argument_parser`, without importing it."""
    parser.add_argument(
        "--config-file", default="", metavar="YAML", help="a file, or the name of a config; `fpn-d2 configs` lists ours"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per machine; without any, CPU processes")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (%(default)s)")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="number of this one, from 0")
    parser.add_argument("--dist-url", metavar="URL", help="where several machines meet, tcp://HOST:PORT")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys over the configuration's, at the end"
    )


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    end_quietly_during_the_start()
    from fpn_d2.engine.start import Command, start

    start(Command(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Command)}))


def main(argv: Sequence[str] | None = None) -> None:
    """``train_net.py``: as the verb, but without its name."""
    from fpn_d2._requirements import RequirementError

    parser = Parser(description=TEXT)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        run(args)
    except RequirementError as error:
        sys.exit(f"error: {error}")


def end_quietly_during_the_start() -> None:
    """Have Ctrl-C and SIGTERM end the program in one line while libraries are imported, which takes seconds.

    The training itself handles them afterwards.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_before_the_start)


def _stop_before_the_start(number: int, frame: object) -> None:
    if multiprocessing.current_process().name in ("MainProcess", "process 0") and os.environ.get("RANK", "0") == "0":
        print("Stopped. No checkpoint was saved.", file=sys.stderr, flush=True)
    os._exit(128 + number)
