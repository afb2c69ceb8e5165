"""``fpn-d2 data check``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Look after data sets: check one, and write a repaired copy."
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
