"""The console script ``fpn-d2``: arguments for the functions of this package, and no logic of its own."""

import argparse
import shlex
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fpn-d2 <verb> ...``.

    Args:
        argv: The arguments after the program's name; those of the process if None.

    Returns:
        Exit code: 0, or 1 after a mistake in the arguments' values, which is told in one line.
    """
    from .engine import ask_for_huge_pages

    args = build_parser().parse_args(argv)
    ask_for_huge_pages()
    args.command = shlex.join(["fpn-d2", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"fpn-d2 {args.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs; each verb sets ``run``, which is called with the parsed arguments."""
    parser = argparse.ArgumentParser(prog="fpn-d2", description="Feature pyramids for Detectron2.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_scenes(verbs)
    _add_convert_torchvision(verbs)
    _add_models(verbs)
    _add_study(verbs)
    _add_compare(verbs)
    _add_cost_curves(verbs)
    _add_benchmark(verbs)
    return parser


def _add_scenes(verbs: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(run=_run_scenes)


def _run_scenes(args: argparse.Namespace) -> None:
    from .data.scenes import make_scenes

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


def _add_models(verbs: argparse._SubParsersAction) -> None:
    text = "List every neck, bottom-up pathway and RoI extractor with its parameters, multiply-adds, levels, strides."
    parser = verbs.add_parser("models", help=text, description=text)
    parser.add_argument(
        "--size", type=_size, default=(800, 1088), metavar="HxW", help="height and width of the image (800x1088)"
    )
    parser.add_argument(
        "--format", choices=("table", "markdown", "json"), default="table", help="how to print it (%(default)s)"
    )
    parser.set_defaults(run=_run_models)


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.partition("x")
    if not (x and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; write height x width in pixels, as 800x1088")
    return int(height), int(width)


def _run_models(args: argparse.Namespace) -> None:
    from .analysis.components import list_components, show

    print(show(list_components(args.size, progress=None), args.size, args.format))


def _add_study(verbs: argparse._SubParsersAction) -> None:
    text = "Train every variant of the pyramid on the same synthetic scenes and compare them: table.md and study.png."
    parser = verbs.add_parser("study", help=text, description=f"{text} A study that was stopped goes on where it was.")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for scenes, runs, table and figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3), metavar="S", help="seeds (1 2 3)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of the configs only (all of them)")
    parser.add_argument("--configs", metavar="DIR", help="folder of the variants' configs (configs/study)")
    parser.add_argument("--iterations", type=int, metavar="N", help="of each training; as the configs say if not given")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="number of training scenes (%(default)s)")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="number of held-out scenes (%(default)s)")
    parser.add_argument(
        "--time-pairs", type=int, default=20, metavar="N", help="training steps whose times are compared (%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at the same time (%(default)s)")
    parser.add_argument(
        "--opts", nargs="+", default=(), metavar="KEY VALUE", help="keys and values for all configs, as SOLVER.BASE_LR"
    )
    parser.set_defaults(run=_run_study)


def _run_study(args: argparse.Namespace) -> None:
    from .analysis.study import CONFIGS, run_study

    table = run_study(
        args.output,
        seeds=args.seeds,
        variants=args.variants,
        configs=args.configs or CONFIGS,
        iterations=args.iterations,
        train_scenes=args.train,
        val_scenes=args.val,
        time_pairs=args.time_pairs,
        jobs=args.jobs,
        opts=args.opts,
    )
    print(table.read_text())
    print(f"Table: {table}  figure: {table.parent / 'study.png'}")


def _add_convert_torchvision(verbs: argparse._SubParsersAction) -> None:
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
    parser.set_defaults(run=_run_convert_torchvision)


def _run_convert_torchvision(args: argparse.Namespace) -> None:
    from .engine.torchvision_weights import convert_file

    model = convert_file(args.source, args.target, all_classes=args.all_classes, batch_norm_eps=args.batch_norm_eps)
    print(f"{args.target}: {model.name} with {model.classes} classes. Use it with")
    print(" ".join(["--config-file", model.config, "MODEL.WEIGHTS", args.target, *model.options]))


def _add_compare(verbs: argparse._SubParsersAction) -> None:
    text = "Compare two detectors: outputs stage by stage, size, speed, memory, AP, published figures."
    parser = verbs.add_parser(
        "compare", help=text, description=f"{text} A and B get the same weights. Writes compare.json and compare.html."
    )
    parser.add_argument("a", metavar="A.yaml", help="a config, or a name in Detectron2's model zoo")
    parser.add_argument("b", metavar="B.yaml", help="what it is compared with, likewise")
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint for both (random weights)")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=((480, 640), (800, 1067)), metavar="HxW", help="(480x640 800x1067)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=(1,), metavar="N", help="images in a batch (1)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="measured rounds of A B A B (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch on the CPU (as they are)")
    parser.add_argument("--device", default="", help="cpu or cuda (as the configs say, where there is a GPU)")
    parser.add_argument("--train", action="store_true", help="time training steps as well")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak of memory")
    parser.add_argument("--data", action="store_true", help="use DATASETS.TEST: outputs on real images, and AP")
    parser.add_argument("--torchvision", action="store_true", help="time torchvision's fasterrcnn_resnet50_fpn as well")
    parser.add_argument(
        "--optimize",
        choices=("none", "a", "b", "both"),
        default="none",
        help="whose inference goes through optimize_for_inference (%(default)s)",
    )
    parser.add_argument("--dtype", default="float32", help="of optimised models: float32, bfloat16 or float16")
    for name, whose in (("--opts", "both configs"), ("--opts-a", "A"), ("--opts-b", "B")):
        parser.add_argument(name, nargs="+", default=(), metavar="KEY VALUE", help=f"keys and values on top of {whose}")
    parser.add_argument("--output", default="output/compare", metavar="DIR", help="folder for the report (%(default)s)")
    parser.set_defaults(run=_run_compare)


def _run_compare(args: argparse.Namespace) -> None:
    from .analysis.compare import Plan, run_compare
    from .analysis.compare_report import text

    plan = Plan(
        weights=args.weights,
        sizes=args.sizes,
        batches=args.batch,
        rounds=args.rounds,
        warmup=args.warmup,
        threads=args.threads,
        device=args.device,
        train=args.train,
        memory=not args.no_memory,
        data=args.data,
        torchvision=args.torchvision,
        optimize=args.optimize,
        dtype=args.dtype,
        opts=args.opts,
        opts_a=args.opts_a,
        opts_b=args.opts_b,
        output=args.output,
    )
    result = run_compare(args.a, args.b, plan, command=args.command)
    print(text(result))
    print(f"\nReport: {args.output}/compare.html  figures as data: {args.output}/compare.json")


def _add_cost_curves(verbs: argparse._SubParsersAction) -> None:
    text = "Measure how time and memory grow with RoIs, image, batch, levels and classes, with Detectron2 beside it."
    parser = verbs.add_parser("cost-curves", help=text, description=text)
    parser.add_argument("--output", default="output/cost_curves", metavar="DIR", help="folder (%(default)s)")
    parser.add_argument("--curves", nargs="+", metavar="NAME", help='some only, as "pooling by RoIs" (all of them)')
    parser.add_argument("--largest", type=int, metavar="N", help="leave out values above it (none)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds of a point (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.set_defaults(run=_run_cost_curves)


def _run_cost_curves(args: argparse.Namespace) -> None:
    from .analysis.cost_curves import measure_curves, table

    result = measure_curves(
        args.output, curves=args.curves, rounds=args.rounds, largest=args.largest, device=args.device
    )
    print(table(result))
    print(f"\nFigure: {args.output}/cost_curves.svg  figures as data: {args.output}/cost_curves.json")


def _add_benchmark(verbs: argparse._SubParsersAction) -> None:
    text = "Measure how many times as fast as Detectron2's own each part is, on the CPU, results checked first."
    about = f"{text} What the folder holds from the same code, versions and settings is not measured again."
    parser = verbs.add_parser("benchmark", help=text, description=about)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help='some only, as loading "inference-*" (all of them)')
    parser.add_argument("--output", default="output/benchmarks", metavar="DIR", help="folder (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="measured rounds of A B A B (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch (as they are)")
    parser.add_argument("--repeat", action="store_true", help="measure again what the folder holds")
    parser.set_defaults(run=_run_benchmark)


def _run_benchmark(args: argparse.Namespace) -> None:
    from .analysis.benchmark_table import show_table
    from .analysis.benchmarks import run_benchmarks

    results = run_benchmarks(
        args.output,
        rows=args.rows,
        rounds=args.rounds,
        warmup=args.warmup,
        threads=args.threads,
        repeat=args.repeat,
    )
    print(show_table(results))
    print(f"\nFigures as data: {args.output}/NAME.json")


if __name__ == "__main__":
    sys.exit(main())
