"""``fpn-d2 convert-torchvision``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = (
        "Convert the weights of a detector of torchvision's for MODEL.WEIGHTS, and say which configuration they need."
    )
    parser = verbs.add_parser("convert-torchvision", help=text, description=text)
    parser.add_argument("source", metavar="IN.pth", help="state dictionary of a Faster R-CNN, Mask R-CNN or RetinaNet")
    parser.add_argument("target", metavar="OUT.pth", help="file to write")
    parser.add_argument(
        "--all-classes", action="store_true", help="keep the 90 classes of a COCO model, not only the 80 that exist"
    )
    parser.add_argument(
        "--batch-norm-eps",
        type=float,
        metavar="EPS",
        help="what the ResNet's norms added to variances; found out if not given: 0 for published weights of the first "
        "versions, 1e-5 for others",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.checkpoint.torchvision import convert_file

    model = convert_file(args.source, args.target, all_classes=args.all_classes, batch_norm_eps=args.batch_norm_eps)
    print(f"{args.target}: {model.name} with {model.classes} classes. Use it with")
    print(" ".join(["--config-file", model.config, "MODEL.WEIGHTS", args.target, *model.options]))
