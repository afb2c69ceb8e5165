"""``fpn-d2 install-detectron2``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Install Detectron2, and torch and OpenCV where they are missing, into this environment; replaces nothing."
    parser = verbs.add_parser("install-detectron2", help=text, description=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    from fpn_d2.set_up import install_missing

    return install_missing()
