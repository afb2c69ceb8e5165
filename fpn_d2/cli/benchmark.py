"""``fpn-d2 benchmark``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Measure how many times as fast as Detectron2's own each part is, on the CPU, results checked first."
    about = f"{text} What the folder holds from the same code, versions and settings is not measured again."
    parser = verbs.add_parser("benchmark", help=text, description=about)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help='some only, as loading "inference-*" (all of them)')
    parser.add_argument("--output", default="output/benchmarks", metavar="DIR", help="folder (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="measured rounds of A B A B (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch (as they are)")
    parser.add_argument("--repeat", action="store_true", help="measure again what the folder holds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.benchmark.run import run_benchmarks
    from fpn_d2.analysis.benchmark.table import show_table

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
