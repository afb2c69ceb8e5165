"""The plots of a comparison, as SVG that can be read on light and dark pages."""

import io
import math
from collections.abc import Callable

from ..measure.parts import PARTS
from ..published.zoo import zoo_baselines

# Of the text and axes: as far from black as from white.
_GREY = "#808080"
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
_LEAST = 1e-12  # where a logarithmic axis of differences begins; a difference of 0 has no bar


def figures(result: dict) -> dict[str, str]:
    """SVG documents by title; a figure without data is left out."""
    drawn = {
        "Time of an inference: median and quartiles": (_times, result["inference"]),
        "Time of a training step: median and quartiles": (_times, result["training"]),
        "Multiply-adds by part": (_parts, result["models"]),
        "Largest relative difference by stage": (_parity, result["parity"]),
        "Published by Detectron2: box AP against inference time": (_zoo, result["published"]["zoo"]["rows"]),
    }
    return {title: _svg(draw, data) for title, (draw, data) in drawn.items() if data}


def _svg(draw: Callable, data) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _GREY)
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "fpn_d2", "font.size": 11, "axes.spines.top": False}
    with matplotlib.rc_context(style | fixed | {"axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, data)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _times(figure, rows: list[dict]) -> None:
    """A panel for each size and batch: their times differ by orders of magnitude."""
    columns = min(len(rows), 2)
    lines = math.ceil(len(rows) / columns)
    figure.set_size_inches(6.4, 0.3 + lines * (0.9 + 0.3 * len(rows[0]["seconds"])))
    for number, row in enumerate(rows, start=1):
        axes = figure.add_subplot(lines, columns, number)
        labels = list(row["seconds"])
        medians = [seconds["median"] for seconds in row["seconds"].values()]
        quartiles = [seconds["quartiles"] for seconds in row["seconds"].values()]
        below = [median - low for median, (low, _) in zip(medians, quartiles, strict=True)]
        above = [high - median for median, (_, high) in zip(medians, quartiles, strict=True)]
        axes.barh(labels, medians, 0.7, color=_COLOURS[: len(labels)], xerr=[below, above], ecolor=_GREY, capsize=3)
        for place, (median, (_, high)) in enumerate(zip(medians, quartiles, strict=True)):
            where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{median:.3g}", (high, place), fontsize=9, **where)
        axes.set(xlim=(0, 1.35 * max(high for _, high in quartiles)), xlabel="seconds")
        axes.set_title(f"{row['size'][0]}x{row['size'][1]}, batch {row['batch']}", fontsize=10)
        axes.locator_params(axis="x", nbins=4)
        axes.invert_yaxis()


def _parts(figure, models: list[dict]) -> None:
    axes = figure.subplots()
    from matplotlib import colormaps

    left = [0.0] * len(models)
    for number, part in enumerate(PARTS):
        values = [model["macs"][part] / 1e9 for model in models]
        if any(values):
            axes.barh(range(len(models)), values, 0.6, left=left, label=part, color=colormaps["tab10"](number))
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(models)), [model["label"] for model in models])
    axes.invert_yaxis()
    height, width = models[0]["macs"]["size"]
    axes.set_xlabel(f"10^9 multiply-adds, one image of {height} x {width}")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=9)


def _parity(figure, parity: dict) -> None:
    axes = figure.subplots()
    stages = parity["stages"]
    values = [max(found["max_rel"] or 0.0, _LEAST) for found in stages.values()]
    colours = [_COLOURS[2] if found["within"] else "#d62728" for found in stages.values()]
    axes.barh(range(len(stages)), [value - _LEAST for value in values], 0.6, color=colours, left=_LEAST)
    for place, (found, value) in enumerate(zip(stages.values(), values, strict=True)):
        text = "equal" if found["equal"] else "not comparable" if found["max_rel"] is None else f"{value:.1e}"
        axes.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(parity["tolerance"]["relative"], color=_GREY, linestyle=":")
    axes.set(xscale="log", xlim=(_LEAST, 100), xlabel="largest difference by A's largest value; dotted: of maps")
    axes.set_yticks(range(len(stages)), list(stages))
    axes.invert_yaxis()


def _zoo(figure, rows: dict[str, dict | None]) -> None:
    axes = figure.subplots()
    kinds: dict[str, list[dict]] = {}
    for row in zoo_baselines()["rows"]:
        # Keypoints are trained and evaluated on persons alone: another box AP.
        general = row["config"].startswith("COCO-") and not row["config"].startswith("COCO-Keypoints")
        if general and row.get("box_AP") and row.get("inference_s_per_im"):
            kinds.setdefault(row["config"].split("/")[0].removeprefix("COCO-"), []).append(row)
    for kind, own in kinds.items():
        axes.plot(*_time_and_ap(own), "o", markersize=4, alpha=0.6, label=kind)
    for label in rows:
        if rows[label] and rows[label].get("box_AP"):
            time, ap = _time_and_ap([rows[label]])
            axes.plot(time, ap, "s", markersize=10, markerfacecolor="none", markeredgecolor="#d62728")
            same = [other for other in rows if rows[other] == rows[label]]
            axes.annotate(", ".join(same), (time[0], ap[0]), xytext=(7, 5), textcoords="offset points", color="#d62728")
    axes.set(xlabel="inference, seconds per image on a V100", ylabel="box AP")
    axes.legend(frameon=False, fontsize=9)


def _time_and_ap(rows: list[dict]) -> tuple[list[float], list[float]]:
    return [row["inference_s_per_im"] for row in rows], [row["box_AP"] for row in rows]
