"""``fpn-d2 export``."""

import argparse

EXAMPLE = "fpn-d2 export output/my/model_best.pth --to onnx --output output/my/exported"

EXAMPLE_INT8 = (
    "fpn-d2 export output/my/model_best.pth --to openvino-int8 --calibrate my/train.json my/train "
    "--verify my/val.json my/val --output output/my/int8"
)


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Write a detector as one file that needs neither Detectron2 nor fpn_d2, run it, and print how far it is off."
    parser = verbs.add_parser(
        "export",
        help=text,
        description=text,
        epilog=f"Examples: {EXAMPLE} -- {EXAMPLE_INT8} -- Exit status: 0; 2 after a mistake; 3 if what was written "
        "differs by more than 0.01 pixels or 1e-4 in a score, or openvino-int8 costs more AP than --max-drop.",
    )
    parser.add_argument("weights", metavar="CHECKPOINT", help="checkpoint of train_net.py, or weights with --config")
    formats = ("onnx", "pt2", "aoti", "openvino", "openvino-int8")
    parser.add_argument("--to", choices=formats, default="onnx", help="format (%(default)s); aoti: compiled pt2")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the file and what runs it")
    parser.add_argument("--config", metavar="YAML", help="for weights without one: a file, or a name in the model zoo")
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help="names of the classes, in order")
    parser.add_argument("--opts", nargs="+", default=(), metavar="KEY VALUE", help="keys over the configuration's")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=("onnxruntime", "openvino", "torch", "inductor"),
        default=(),
        help="what runs it for the comparison (all that are installed)",
    )
    parser.add_argument(
        "--images", nargs="+", default=(), metavar="FILE", help="images to compare on, beside random ones"
    )
    data_set = {"nargs": 2, "metavar": ("JSON", "IMAGES")}
    parser.add_argument("--calibrate", **data_set, help="for openvino-int8: COCO json and the folder of its images")
    parser.add_argument("--calibration-images", type=int, default=300, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--verify", **data_set, help="for openvino-int8: where its AP is compared with float32's")
    parser.add_argument(
        "--max-drop", type=float, default=0.3, metavar="AP", help="that int8 may cost on --verify (%(default)s points)"
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
    if args.to == "openvino-int8":
        return export_int8(predictor, args)
    exported = export_detector(predictor, args.output, args.to)
    print(f"{exported.path}: run it with {exported.runner}")
    if args.no_check:
        return 0
    batches = random_batches(predictor.cfg.INPUT.MIN_SIZE_TEST or 800, predictor.cfg.INPUT.MAX_SIZE_TEST)
    batches += [[view.tensor for view in predictor.prepare(image).views] for image in args.images]
    found = check_exported(exported, predictor.model, batches, args.engines)
    print(text(found, batches))
    return 0 if all_within(found) else 3


def export_int8(predictor, args: argparse.Namespace) -> int:
    """Quantise, and print what it costs."""
    from fpn_d2.analysis import quantized
    from fpn_d2.errors import UserError

    if not args.calibrate:
        raise UserError("openvino-int8 needs images to find its ranges: --calibrate my/train.json my/train")
    found = quantized.export_int8(
        predictor,
        args.output,
        args.calibrate,
        args.verify,
        images=args.calibration_images,
        max_drop=args.max_drop,
    )
    print(f"{found.exported.path}: run it with {found.exported.runner}")
    print(quantized.text(found))
    return 0 if found.before is None or found.before - found.after <= args.max_drop else 3
