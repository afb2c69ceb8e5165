"""``fpn-d2 errors``."""

import argparse

EXAMPLE = "fpn-d2 errors my/val.json output/predictions/predictions.json --images my/images --output output/errors"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Show where lost AP goes: classification, localisation, both, duplicates, background, missed (TIDE)."
    parser = verbs.add_parser("errors", help=text, description=text, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("annotations", metavar="TRUTH.json", help="COCO annotation file")
    parser.add_argument(
        "predictions", metavar="PREDICTIONS", help="COCO results, or what fpn-d2 predict --annotations wrote"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for table, figures and gallery")
    parser.add_argument("--images", metavar="DIR", help="folder of the images, for the gallery of the worst")
    parser.add_argument("--checkpoint", metavar="FILE", help="by level too, with the rule of this checkpoint")
    parser.add_argument("--config", metavar="YAML", help="of a checkpoint that holds none")
    parser.add_argument("--iou", type=float, default=0.5, metavar="T", help="of a right detection (%(default)s)")
    parser.add_argument("--gallery", type=int, default=8, metavar="N", help="number of worst images (%(default)s)")
    parser.add_argument(
        "--min-score", type=float, default=0.3, metavar="S", help="lowest score in the confusion matrix (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.errors.report import report_errors, write_report
    from fpn_d2.analysis.level_rule import Rule
    from fpn_d2.inference.load import configuration_of

    rule = None
    if args.checkpoint or args.config:
        rule = Rule.of(configuration_of(args.checkpoint or "", args.config)[0])
    report = report_errors(args.annotations, args.predictions, t_f=args.iou, min_score=args.min_score, rule=rule)
    print(report.table())
    print("\n".join(write_report(report, args.output, args.images, args.gallery)))
