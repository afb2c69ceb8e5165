"""``fpn-d2 replay``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = (
        "Make a training step once more whose loss or gradient was not finite, on the CPU, and say which layer is the "
        "first with such a value. The training has written it into the folder bad_steps of its output."
    )
    parser = verbs.add_parser("replay", help=text.split(",")[0], description=text)
    parser.add_argument("step", metavar="STEP.pth", help="file of the step, as output/bad_steps/0000012_rank0.pth")
    parser.add_argument("--weights", metavar="FILE", default="", help="take the weights of this checkpoint instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.engine.replay import replay

    print(replay(args.step, args.weights))
