"""Types of arguments that several verbs take."""

import argparse


def size(text: str) -> tuple[int, int]:
    """Height and width of an image, written as 800x1088."""
    height, x, width = text.partition("x")
    if not (x and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; write height x width in pixels, as 800x1088")
    return int(height), int(width)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a checkpoint becomes a predictor; read by `load_predictor`."""
    parser.add_argument("--config", metavar="YAML", help="for weights without one: a file, or a name in the model zoo")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1; the GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="lower precision; never by itself")
    parser.add_argument("--no-optimize", action="store_true", help="run the model as it was trained")
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help="names of the classes, in order")
    parser.add_argument("--opts", nargs="+", default=(), metavar="KEY VALUE", help="keys over the configuration's")


def load_predictor(args: argparse.Namespace, **options):
    """The predictor that the arguments of `add_model_options` describe."""
    from fpn_d2.inference import load

    return load(
        args.weights,
        config=args.config,
        device=args.device,
        optimize=not args.no_optimize,
        dtype=args.dtype,
        class_names=args.classes,
        opts=args.opts,
        **options,
    )
