"""Types of arguments that several verbs take."""

import argparse


def size(text: str) -> tuple[int, int]:
    """Height and width of an image, written as 800x1088."""
    height, x, width = text.partition("x")
    if not (x and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; write height x width in pixels, as 800x1088")
    return int(height), int(width)
