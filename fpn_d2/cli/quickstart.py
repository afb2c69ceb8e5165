"""``fpn-d2 quickstart``."""

import argparse
import os
import shutil
import sys
from pathlib import Path


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Make synthetic scenes, train a small detector on them, evaluate it, draw its detections; minutes on a CPU."
    parser = verbs.add_parser("quickstart", help=text, description=text)
    parser.add_argument("--output", default="output/quickstart", metavar="DIR", help="folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of scenes and training (%(default)s)")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="scenes to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=150, metavar="N", help="scenes to test on (%(default)s)")
    parser.add_argument(
        "--opts", nargs="+", default=(), metavar="KEY VALUE", help="keys over the configuration's, as SOLVER.MAX_ITER"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from .train import end_quietly_during_the_start

    end_quietly_during_the_start()
    from fpn_d2.engine.quickstart import quickstart

    quickstart(
        args.output, seed=args.seed, train=args.train, val=args.val, opts=args.opts, program=_program()
    )


def _program() -> str:
    """How a person calls this program: by its name where the shell finds it, else by its path."""
    script = Path(sys.executable).with_name("fpn-d2")
    found = shutil.which("fpn-d2")
    if not script.exists() or (found and os.path.samefile(found, script)):
        return "fpn-d2"
    beside = os.path.relpath(script)
    return str(script) if beside.startswith("..") else beside
