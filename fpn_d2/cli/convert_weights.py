"""``fpn-d2 convert-weights``."""

import argparse


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to ``fpn-d2``."""
    text = (
        "Write the weights of a file, .pth, .pkl, .pyth or .safetensors, as .safetensors or .pth: the tensors and how "
        "their names are to be understood, without the optimizer and the rest."
    )
    parser = verbs.add_parser("convert-weights", help=text, description=text)
    parser.add_argument("source", metavar="IN", help="the file to read; nothing that it holds is run")
    parser.add_argument("target", metavar="OUT", help="the file to write; its ending says which kind")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    from fpn_d2.checkpoint.reading import check_weight_file_name, read_checkpoint, write_checkpoint

    check_weight_file_name(args.target)
    checkpoint = read_checkpoint(args.source)
    write_checkpoint(checkpoint, args.target)
    print(f"{args.target}: {len(checkpoint['model'])} tensors")
