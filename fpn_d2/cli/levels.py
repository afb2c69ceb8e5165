"""``fpn-d2 levels``."""

import argparse

from .arguments import add_model_options, load_predictor

EXAMPLE = "fpn-d2 levels output/my/model_best.pth my/val.json --images my/images --output output/levels"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Show which pyramid level objects, proposals and detections are on, and how well each level does."
    parser = verbs.add_parser("levels", help=text, description=text, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("weights", metavar="CHECKPOINT", help="checkpoint, or a config file for boxes alone")
    parser.add_argument("annotations", metavar="TRUTH.json", help="COCO annotation file")
    parser.add_argument("--images", metavar="DIR", help="folder of the images; without it, only boxes are looked at")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for table and figures")
    parser.add_argument("--canonical-box-size", type=float, metavar="PX", help="compare with a rule of this size")
    parser.add_argument("--canonical-level", type=int, metavar="K", help="compare with a rule of this level")
    parser.add_argument("--other-rule", metavar="NAME", help="compare with a rule of MODEL.ROI_LEVEL_ASSIGN.NAME")
    parser.add_argument("--max-images", type=int, metavar="N", help="run the model on so many, spread evenly")
    parser.add_argument(
        "--picture-score", type=float, default=0.5, metavar="S", help="lowest score that is drawn (%(default)s)"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.levels.run import levels_of_boxes, levels_of_model

    given = {"canonical_box_size": args.canonical_box_size, "canonical_level": args.canonical_level}
    given["other_rule"] = args.other_rule
    if args.images is None:
        report, paths = levels_of_boxes(
            args.weights, args.annotations, args.output, config=args.config, opts=args.opts, **given
        )
    else:
        predictor = load_predictor(args)
        report, paths = levels_of_model(
            predictor,
            args.annotations,
            args.images,
            args.output,
            max_images=args.max_images,
            picture_score=args.picture_score,
            **given,
        )
    print(report.table())
    print("\n".join(paths))
