"""``fpn-d2 export``."""

import argparse

EXAMPLE = "fpn-d2 export output/my/model_best.pth --to onnx --output output/my/exported"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Write a detector as one file that needs neither Detectron2 nor fpn_d2, run it, and print how far it is off."
    parser = verbs.add_parser(
        "export",
        help=text,
        description=text,
        epilog=f"Example: {EXAMPLE} -- Exit status: 0; 1 after a mistake; 3 if what was written differs by more than "
        "0.01 pixels or 1e-4 in a score.",
    )
    parser.add_argument("weights", metavar="CHECKPOINT", help="checkpoint of train_net.py, or weights with --config")
    parser.add_argument("--to", choices=("onnx", "pt2"), default="onnx", help="format (%(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the file and what runs it")
    parser.add_argument("--config", metavar="YAML", help="for weights without one: a file, or a name in the model zoo")
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help="names of the classes, in order")
    parser.add_argument("--opts", nargs="+", default=(), metavar="KEY VALUE", help="keys over the configuration's")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=("onnxruntime", "openvino", "torch"),
        default=(),
        help="what runs it for the comparison (all that are installed)",
    )
    parser.add_argument(
        "--images", nargs="+", default=(), metavar="FILE", help="images to compare on, beside random ones"
    )
    parser.add_argument("--no-check", action="store_true", help="write only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    from fpn_d2.analysis.exported import all_within, check_exported, random_batches, text
    from fpn_d2.inference import load
    from fpn_d2.inference.export import export_detector

    opts = [*args.opts, "MODEL.NUMERICS", "exact"]  # what is exported is compared with Detectron2's own code
    predictor = load(
        args.weights, config=args.config, device="cpu", optimize=False, class_names=args.classes, opts=opts
    )
    exported = export_detector(predictor, args.output, args.to)
    print(f"{exported.path}: run it with {exported.runner}")
    if args.no_check:
        return 0
    batches = random_batches(predictor.cfg.INPUT.MIN_SIZE_TEST or 800, predictor.cfg.INPUT.MAX_SIZE_TEST)
    batches += [[view.tensor for view in predictor.prepare(image).views] for image in args.images]
    found = check_exported(exported, predictor.model, batches, args.engines)
    print(text(found, batches))
    return 0 if all_within(found) else 3
