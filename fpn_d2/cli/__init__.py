"""The console script ``fpn-d2``: arguments for the functions of this package, one file a verb, no logic of its own."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from . import (
    benchmark,
    compare,
    convert_torchvision,
    convert_weights,
    cost_curves,
    data,
    doctor,
    errors,
    export,
    levels,
    models,
    predict,
    report,
    scenes,
    serve,
    study,
)

VERBS = (
    scenes,
    data,
    predict,
    export,
    errors,
    levels,
    doctor,
    report,
    serve,
    convert_torchvision,
    convert_weights,
    models,
    study,
    compare,
    cost_curves,
    benchmark,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fpn-d2 <verb> ...``.

    Args:
        argv: The arguments after the program's name; those of the process if None.

    Returns:
        Exit code: what the verb says, 0 if nothing; 1 after a mistake in the arguments' values, told in one line.
    """
    from fpn_d2.engine import ask_for_huge_pages
    from fpn_d2.errors import one_line

    args = build_parser().parse_args(argv)
    ask_for_huge_pages()
    args.command = shlex.join(["fpn-d2", *(sys.argv[1:] if argv is None else argv)])
    try:
        return args.run(args) or 0
    except (ValueError, TypeError, OSError) as error:
        print(f"fpn-d2 {args.verb}: {one_line(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs; each verb sets ``run``, which is called with the parsed arguments."""
    parser = argparse.ArgumentParser(prog="fpn-d2", description="Feature pyramids for Detectron2.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser
