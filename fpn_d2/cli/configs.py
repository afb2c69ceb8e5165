"""``fpn-d2 configs``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = "List the configs that come with fpn_d2, whose names every command takes in the place of a file."
    parser = verbs.add_parser("configs", help=text, description=text)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the path of this one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.config_names import config_file, list_own

    if args.name:
        print(config_file(args.name))
        return
    rows = list_own()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {title}" for name, title in rows))
