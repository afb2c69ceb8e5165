"""``fpn-d2 study``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Train every variant of the pyramid on the same synthetic scenes and compare them: table.md and study.png."
    parser = verbs.add_parser("study", help=text, description=f"{text} A study that was stopped goes on where it was.")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for scenes, runs, table and figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3), metavar="S", help="seeds (1 2 3)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of the configs only (all of them)")
    parser.add_argument(
        "--setting",
        choices=("paper", "small_objects"),
        default="paper",
        help="paper: its claim, on a frozen bottom-up pathway with weights of ImageNet, learning rate chosen for each "
        "variant; small_objects: from scratch (%(default)s)",
    )
    parser.add_argument("--configs", metavar="DIR", help="folder of the variants' configs (configs/study/SETTING)")
    parser.add_argument("--iterations", type=int, metavar="N", help="of each training; as the configs say if not given")
    parser.add_argument(
        "--tuning-iterations", type=int, metavar="N", help="where learning rates are chosen (half of the others)"
    )
    parser.add_argument("--train", type=int, metavar="N", help="number of training scenes (as the setting says)")
    parser.add_argument("--val", type=int, metavar="N", help="number of held-out scenes (as the setting says)")
    parser.add_argument(
        "--time-pairs", type=int, default=20, metavar="N", help="training steps whose times are compared (%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at the same time (%(default)s)")
    parser.add_argument(
        "--known", metavar="RECORDS", help="records.json of another folder, whose trainings are not done again"
    )
    parser.add_argument(
        "--proposals-of",
        metavar="NAME",
        help="train and test all on the proposals of this variant, so that heads alone differ (paper, table 2)",
    )
    parser.add_argument(
        "--opts", nargs="+", default=(), metavar="KEY VALUE", help="keys and values for all configs, as SOLVER.BASE_LR"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    import dataclasses
    from pathlib import Path

    from fpn_d2.analysis.study.run import run_study
    from fpn_d2.analysis.study.settings import SETTINGS

    setting = SETTINGS[args.setting]
    numbers = {key: value for key, value in (("train", args.train), ("val", args.val)) if value is not None}
    table = run_study(
        args.output,
        setting=dataclasses.replace(
            setting,
            configs=Path(args.configs or setting.configs).expanduser(),
            scenes={**setting.scenes, **numbers},
        ),
        seeds=args.seeds,
        variants=args.variants,
        iterations=args.iterations,
        tuning_iterations=args.tuning_iterations,
        time_pairs=args.time_pairs,
        jobs=args.jobs,
        opts=args.opts,
        known=args.known,
        proposals_of=args.proposals_of,
    )
    print(table.read_text())
    print(f"Table: {table}  figure: {table.parent / 'study.png'}")
