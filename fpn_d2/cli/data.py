"""``fpn-d2 data check`` and ``fpn-d2 data show``."""

import argparse

SHOW_EXAMPLE = "fpn-d2 data show my/train.json --images my/images --config my/config.yaml --output output/train.jpg"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Look after data sets: check one, write a repaired copy, show what it holds."
    parser = verbs.add_parser("data", help=text, description=text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "Report every defect of a data set with the ids of its image and annotation."
    about = f"{text} Exit status: 0 without defects, 1 with some."
    check = actions.add_parser("check", help=text, description=about)
    check.add_argument("source", metavar="SET", help="a COCO json, a Pascal VOC folder, or a registered set")
    check.add_argument("--images", metavar="DIR", help="folder of the json's images (they are not looked at)")
    check.add_argument("--split", metavar="NAME", help="of a VOC folder, as train (all of its XML files)")
    check.add_argument("--full", action="store_true", help="decode every pixel, not only the headers")
    check.add_argument("--masks", action="store_true", help="name objects without masks")
    check.add_argument("--test", action="store_true", help="a set to evaluate on, which may do without annotations")
    check.add_argument("--outside", action="store_true", help="let image files lie outside the image folder")
    check.add_argument("--report", metavar="OUT.json", help="write every finding, for machines")
    check.add_argument("--fix", metavar="OUT.json", help="write a repaired copy, and say what it changed")
    check.add_argument("--jobs", type=int, default=0, metavar="N", help="images that are read at once (chosen)")
    check.set_defaults(run=run)
    text = "Write a picture of a data set: images with their boxes, and histograms of its objects."
    show = actions.add_parser("show", help=text, description=text, epilog=f"Example: {SHOW_EXAMPLE}")
    show.add_argument("source", metavar="SET", help="a COCO json, a Pascal VOC folder, or a registered set")
    show.add_argument("--images", metavar="DIR", help="folder of the json's images; without it, histograms alone")
    show.add_argument("--split", metavar="NAME", help="of a VOC folder, as train (all of its XML files)")
    show.add_argument("--output", required=True, metavar="FILE", help="the picture, .jpg or .png")
    show.add_argument("--config", metavar="FILE", help="levels by the rule and sizes of this config or checkpoint")
    show.add_argument("--count", type=int, default=12, metavar="N", help="images that are shown (%(default)s)")
    show.add_argument("--seed", type=int, metavar="S", help="choose them at random (spread evenly over the set)")
    show.set_defaults(run=run_show)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    from fpn_d2.data.check import check_set, fix_set
    from fpn_d2.data.coco_annotations import CheckOptions
    from fpn_d2.data.defects import MEND, SKIP, STOP

    options = CheckOptions(
        training=not args.test, masks=args.masks, outside=args.outside, full=args.full, jobs=args.jobs
    )
    found = check_set(args.source, options, images=args.images, split=args.split)
    print(found.report.table())
    if args.report:
        found.report.write(args.report)
        print(f"Report: {args.report}")
    if args.fix:
        print(fix_set(args.source, options, found, args.fix, images=args.images, split=args.split))
    return int(found.report.count(STOP, SKIP, MEND) > 0)


def run_show(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.data_show import read_set, show_set
    from fpn_d2.analysis.level_rule import Rule, rule_of_file

    rule = rule_of_file(args.config) if args.config else Rule((2, 3, 4, 5))
    data = read_set(args.source, images=args.images, split=args.split)
    print(show_set(data, rule, args.output, count=args.count, seed=args.seed))
    print(args.output)
