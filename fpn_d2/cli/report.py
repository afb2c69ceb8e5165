"""``fpn-d2 report``."""

import argparse

EXAMPLE = "fpn-d2 report output/my --output output/my.html"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Write one page about a run: curves, AP, levels, errors, gallery, configuration, environment."
    parser = verbs.add_parser("report", help=text, description=text, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("folder", metavar="RUN_FOLDER", help="OUTPUT_DIR of the run; parts of it may be missing")
    parser.add_argument("--output", metavar="FILE.html", help="the page (report.html in the folder)")
    parser.add_argument("--annotations", metavar="TRUTH.json", help="of the test set, if it is elsewhere by now")
    parser.add_argument("--images", metavar="DIR", help="folder of its images, likewise")
    parser.add_argument("--gallery", type=int, default=6, metavar="N", help="images that are shown (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.report.build import report_run

    path = report_run(
        args.folder, args.output, annotations=args.annotations, images=args.images, gallery=args.gallery
    )
    print(path)
