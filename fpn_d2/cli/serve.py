"""``fpn-d2 serve``."""

import argparse

from .arguments import add_model_options, load_predictor

EXAMPLE = "fpn-d2 serve output/my/model_best.pth --port 8000"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Serve a detector on this machine: a page to drop images on, and a JSON API."
    parser = verbs.add_parser("serve", help=text, description=text, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("weights", metavar="CHECKPOINT", help="checkpoint of train_net.py, or weights with --config")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (%(default)s)")
    parser.add_argument(
        "--queue", type=int, default=16, metavar="N", help="requests at once; more get a 429 (%(default)s)"
    )
    parser.add_argument("--max-upload", type=float, default=20, metavar="MB", help="of a file (%(default)s)")
    parser.add_argument("--max-pixels", type=float, default=40, metavar="M", help="of an image, millions (%(default)s)")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="for an answer (%(default)s)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.serve.server import serve

    serve(
        load_predictor(args),
        args.host,
        args.port,
        queue=args.queue,
        max_upload=args.max_upload,
        max_pixels=args.max_pixels,
        timeout=args.timeout,
    )
