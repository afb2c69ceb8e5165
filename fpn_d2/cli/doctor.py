"""``fpn-d2 doctor``."""

import argparse

EXAMPLE = "fpn-d2 doctor my/config.yaml --run output/my --write my/better.yaml"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "Say what to change in a config for its data set, and what went wrong in a run; changes nothing."
    parser = verbs.add_parser("doctor", help=text, description=text, epilog=f"Example: {EXAMPLE}")
    about = "file, or name of one of ours, whose DATASETS.TRAIN is looked at"
    parser.add_argument("config", metavar="CONFIG.yaml", help=about)
    parser.add_argument("--run", metavar="DIR", dest="folder", help="output folder of a run of it")
    parser.add_argument("--write", metavar="NEW.yaml", help="write a config on top of it with what is proposed")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="keys over the configuration's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.analysis.doctor.examine import examine, write_config
    from fpn_d2.analysis.doctor.run_advice import explain_run
    from fpn_d2.config_names import find_config

    args.config = str(find_config(args.config))
    _, advice = examine(args.config, args.opts)
    print("\n".join(one.words() for one in advice) or "Nothing to propose for this data.")
    if args.folder:
        print("\n".join(f"- {text}" for text in explain_run(args.folder)) or "- nothing wrong is to be seen in the run")
    if args.write:
        write_config(args.config, advice, args.write)
        print(f"Written: {args.write}")
