"""The console script ``fpn-d2``: arguments for the functions of this package, one file a verb, no logic of its own."""

import logging
import multiprocessing
import shlex
import sys
import warnings
from collections.abc import Sequence

from . import (
    benchmark,
    compare,
    configs,
    convert_torchvision,
    convert_weights,
    cost_curves,
    data,
    doctor,
    errors,
    export,
    install_detectron2,
    levels,
    models,
    predict,
    quickstart,
    replay,
    report,
    scenes,
    serve,
    study,
    train,
)
from .parser import Parser

VERBS = (
    install_detectron2,
    quickstart,
    train,
    configs,
    scenes,
    data,
    predict,
    replay,
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

# A process of a training imports this first, and for seconds nothing else that would handle signals.
if multiprocessing.current_process().name.startswith("process "):
    train.end_quietly_during_the_start()
# Of code below us, when it is imported or first run; nothing that a user could change.
for _message in (
    ".*torch.jit.script.* is deprecated",
    "torch.meshgrid: in an upcoming release",
    "The given NumPy array is not writable",
    "TypedStorage is deprecated",
    ".broadcast_buffers. is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in str(record.msg))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fpn-d2 <verb> ...``; alone, it shows its verbs.

    Args:
        argv: The arguments after the program's name; those of the process if None.

    Returns:
        Exit code: what the verb says, 0 if nothing; 2 after a mistake of the user, told in one line.
    """
    from fpn_d2._requirements import RequirementError
    from fpn_d2.errors import UserError, tell
    from fpn_d2.huge_pages import ask_for_huge_pages

    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    ask_for_huge_pages()
    args.command = shlex.join(["fpn-d2", *argv])
    try:
        return args.run(args) or 0
    except RequirementError as error:
        sys.exit(f"error: {error}")
    except UserError as error:
        return tell(error)


def build_parser() -> Parser:
    """The parser with all verbs; each verb sets ``run``, which is called with the parsed arguments."""
    parser = Parser(prog="fpn-d2", description="Feature pyramids for Detectron2.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for verb in VERBS:
        verb.add(verbs)
    return parser
