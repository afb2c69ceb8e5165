"""``fpn-d2 compare``."""

import argparse

from .arguments import size


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Compare two detectors: outputs stage by stage, size, speed, memory, AP, published figures."
    parser = verbs.add_parser(
        "compare", help=text, description=f"{text} A and B get the same weights. Writes compare.json and compare.html."
    )
    parser.add_argument("a", metavar="A.yaml", help="a config, or a name in Detectron2's model zoo")
    parser.add_argument("b", metavar="B.yaml", help="what it is compared with, likewise")
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint for both (random weights)")
    parser.add_argument(
        "--sizes", type=size, nargs="+", default=((480, 640), (800, 1067)), metavar="HxW", help="(480x640 800x1067)"
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
        "--engines",
        nargs="+",
        choices=("onnxruntime", "openvino", "openvino-bfloat16", "openvino-int8"),
        default=(),
        help="time A, exported, in these as well; each column has a process of its own then",
    )
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.compare.report import text
    from fpn_d2.analysis.compare.run import Plan, run_compare

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
        engines=args.engines,
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
