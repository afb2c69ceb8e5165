"""Figures of a run as SVG that takes the colours of the page round it."""

import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .run_folder import Run

_POINTS = 400  # of a curve; more are averaged
_SIZE = (5.2, 3.1)  # inches, which an SVG that fills its column does not show


def themed_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element whose black is the text's colour and whose white the ground's.

    Args:
        figure: on a white ground, with lines and text in black.
        name: told to those who do not see it; makes the ids in the page differ too.
    """
    file = io.StringIO()
    # Text stays text, which is smaller, can be searched, and takes the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    width, height = (float(re.search(rf'{side}="([\d.]+)pt"', svg)[1]) for side in ("width", "height"))
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{name}" style="aspect-ratio: {width:g} / {height:g}"', 1)
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--card)")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)


def curves(run: Run) -> dict[str, Figure]:
    """The curves of what was recorded more than once, by title."""
    wanted = {
        "loss": (("total_loss", "val_total_loss"), "loss"),
        "parts of the loss": (run.names(r"loss_.*"), "loss"),
        "average precision": (run.names(r"(.*/)?(bbox|segm|keypoints)/AP(50|75)?"), "percent"),
        "average precision by class": (run.names(r"(.*/)?bbox/AP-.*")[:10], "percent"),
        "learning rate": (("lr",), ""),
        "RoI heads": (run.names(r"fast_rcnn/(cls_accuracy|fg_cls_accuracy|false_negative)"), "share"),
        "seconds per iteration": (("time", "data_time"), "seconds"),
    }
    figures = {}
    for title, (names, unit) in wanted.items():
        series = run.series(*names)
        # Of a single evaluation the table says all.
        if any(len(iterations) > 1 for iterations, _ in series.values()):
            figures[title] = _curve(title, series, unit)
    return figures


def _curve(title: str, series: dict[str, tuple[np.ndarray, np.ndarray]], unit: str) -> Figure:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    for name, (iterations, values) in series.items():
        few = len(iterations) <= 30
        axes.plot(*_fewer(iterations, values), label=name, linewidth=1.4, marker="." if few else None)
    everything = np.concatenate([values for _, values in series.values()])
    everything = everything[np.isfinite(everything)]
    if unit == "percent":
        axes.set_ylim(0, min(100, 1.1 * max(everything.max(initial=0), 5)))
    elif len(everything) and everything.min() > 0 and everything.max() > 8 * np.median(everything):
        axes.set_yscale("log")
    elif len(everything) and everything.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="iteration", ylabel=unit)
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(fontsize=8, framealpha=0.7, ncols=1 + (len(series) > 5))
    return figure


def _fewer(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over parts of a long curve."""
    parts = -(-len(values) // _POINTS)
    if parts < 2:
        return iterations, values
    starts = np.arange(0, len(values), parts)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(iterations, starts) / counts, np.add.reduceat(values, starts) / counts
