"""``fpn-d2 models``."""

import argparse

from .arguments import size


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "List every neck, bottom-up pathway and RoI extractor with its parameters, multiply-adds, levels, strides."
    parser = verbs.add_parser("models", help=text, description=text)
    parser.add_argument(
        "--size", type=size, default=(800, 1088), metavar="HxW", help="height and width of the image (800x1088)"
    )
    parser.add_argument(
        "--format", choices=("table", "markdown", "json"), default="table", help="how to print it (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.catalogue import list_components, show

    print(show(list_components(args.size, progress=None), args.size, args.format))
