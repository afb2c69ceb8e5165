"""``fpn-d2 predict``."""

import argparse
import sys

from .arguments import add_model_options, load_predictor

EXAMPLE = "fpn-d2 predict output/my/model_best.pth my/images my/clip.mp4 --output output/predictions --pictures"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Detect objects in images, folders, globs, lists, videos and camera:0; what is stopped goes on where it was."
    parser = verbs.add_parser(
        "predict",
        help=text,
        description=text,
        epilog=f"Example: {EXAMPLE} -- Exit status: 0; 2 after a mistake; 3 if some images could not be read; 130 if "
        "stopped.",
    )
    parser.add_argument("weights", metavar="CHECKPOINT", help="checkpoint of train_net.py, or weights with --config")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="images, folders, globs in quotes, .txt files with one of them a line, videos, camera:0",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for what is written")
    add_model_options(parser)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images of one size (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that decode (%(default)s)")
    parser.add_argument(
        "--min-score", type=float, default=0.0, metavar="S", help="leave out detections below (%(default)s)"
    )
    parser.add_argument("--tile", type=int, metavar="PX", help="look at large images in tiles of so many pixels")
    parser.add_argument(
        "--overlap", type=float, default=0.2, metavar="SHARE", help="share that neighbouring tiles see (%(default)s)"
    )
    parser.add_argument("--pictures", action="store_true", help="write annotated images and videos too")
    parser.add_argument(
        "--picture-score", type=float, default=0.5, metavar="S", help="lowest score that is drawn (%(default)s)"
    )
    parser.add_argument("--no-coco", action="store_true", help="write no COCO json at the end")
    parser.add_argument(
        "--annotations", metavar="JSON", help="predict on the images of this COCO file, in the folder SOURCE; show AP"
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="stop after so many, as for a camera")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that has predictions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    from fpn_d2.inference.predict import predict

    predictor = load_predictor(
        args, batch_size=args.batch_size, min_score=args.min_score, tile=args.tile, overlap=args.overlap
    )
    summary = predict(
        predictor,
        args.sources,
        args.output,
        annotations=args.annotations,
        coco=not args.no_coco,
        pictures=args.pictures,
        picture_score=args.picture_score,
        workers=args.workers,
        max_images=args.max_images,
        overwrite=args.overwrite,
    )
    words = [f"{summary.images} images"]
    words += [f"{summary.before} done before"] if summary.before else []
    words += [f"{summary.errors} could not be read"] if summary.errors else []
    print(f"{', '.join(words)}: {summary.coco or summary.lines}")
    if summary.stopped:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    if args.annotations and summary.coco:
        from fpn_d2.evaluation.coco_results import evaluate_predictions

        most = max(100, predictor.cfg.TEST.DETECTIONS_PER_IMAGE)
        figures = evaluate_predictions(args.annotations, summary.coco, most=most)
        print("  ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    return 3 if summary.errors else 0
