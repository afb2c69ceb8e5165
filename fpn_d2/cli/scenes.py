"""``fpn-d2 scenes``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Make synthetic detection scenes in COCO format."
    parser = verbs.add_parser("scenes", help=text, description=text)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; kept if complete")
    parser.add_argument("--train", type=int, default=600, metavar="N", help="number of training scenes (%(default)s)")
    parser.add_argument("--val", type=int, default=150, metavar="N", help="number of validation scenes (%(default)s)")
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="PX", help="height and width of a scene (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same scenes (%(default)s)")
    parser.add_argument(
        "--min-size",
        type=float,
        default=12.0,
        metavar="PX",
        help="smallest object, square root of its box's area (%(default)s)",
    )
    parser.add_argument(
        "--max-size", type=float, metavar="PX", help="largest object, measured likewise; 0.7 of the image if not given"
    )
    parser.add_argument("--max-objects", type=int, default=8, metavar="N", help="most objects in a scene (%(default)s)")
    parser.add_argument(
        "--empty", type=float, default=0.05, metavar="SHARE", help="share of scenes without objects (%(default)s)"
    )
    parser.add_argument(
        "--own-colour",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of objects that have the colour of their class (%(default)s: only the shape tells the class)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace scenes made with other parameters")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.data.scenes import make_scenes

    folder = make_scenes(
        args.output,
        train=args.train,
        val=args.val,
        image_size=args.image_size,
        seed=args.seed,
        min_size=args.min_size,
        max_size=args.max_size,
        max_objects=args.max_objects,
        empty=args.empty,
        own_colour=args.own_colour,
        overwrite=args.overwrite,
    )
    print(f"Scenes: {folder}")
