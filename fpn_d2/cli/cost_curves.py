"""``fpn-d2 cost-curves``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Measure how time and memory grow with RoIs, image, batch, levels and classes, with Detectron2 beside it."
    parser = verbs.add_parser("cost-curves", help=text, description=text)
    parser.add_argument("--output", default="output/cost_curves", metavar="DIR", help="folder (%(default)s)")
    parser.add_argument("--curves", nargs="+", metavar="NAME", help='some only, as "pooling by RoIs" (all of them)')
    parser.add_argument("--largest", type=int, metavar="N", help="leave out values above it (none)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds of a point (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.scaling.curves import measure_curves, table

    result = measure_curves(
        args.output, curves=args.curves, rounds=args.rounds, largest=args.largest, device=args.device
    )
    print(table(result))
    print(f"\nFigure: {args.output}/cost_curves.svg  figures as data: {args.output}/cost_curves.json")
