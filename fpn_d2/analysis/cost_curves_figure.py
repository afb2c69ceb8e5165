"""The figure of the cost curves: time and memory, ours and Detectron2's, one column per curve."""

import io
import math

_COLOURS = ("#1f77b4", "#ff7f0e")


def draw(curves: dict[str, dict]) -> str:
    """An SVG document: above seconds with quartiles, below MB of peak memory, on logarithmic axes.

    Args:
        curves: as in `cost_curves.measure_curves`.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fpn_d2"}):
        figure = Figure(figsize=(3.4 * max(len(curves), 1), 5.6), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(2, max(len(curves), 1), sharex="col", squeeze=False)
        for column, (name, curve) in enumerate(curves.items()):
            _column(grid[0][column], grid[1][column], name, curve)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _column(time, memory, name: str, curve: dict) -> None:
    points = curve["points"]
    for colour, (label, power) in zip(_COLOURS, curve["growth"].items(), strict=True):
        values = [point["value"] for point in points]
        seconds = [point["seconds"][label] for point in points]
        medians = [s["median"] for s in seconds]
        below = [s["median"] - s["quartiles"][0] for s in seconds]
        above = [s["quartiles"][1] - s["median"] for s in seconds]
        shown = label if power is None else f"{label}, power {power:.2f}"
        time.errorbar(values, medians, yerr=[below, above], fmt="o-", markersize=4, color=colour, label=shown)
        peaks = [point["peak_mb"][label] for point in points]
        # What takes nothing has no place on a logarithmic axis.
        memory.plot(values, [p if p else math.nan for p in peaks], "o-", markersize=4, color=colour, label=label)
    time.set(title=name, xscale="log", yscale="log")
    memory.set(xlabel=curve["variable"], xscale="log")
    if any(peak for point in points for peak in point["peak_mb"].values()):
        memory.set_yscale("log")
    time.set_ylabel("seconds")
    memory.set_ylabel("peak, MB")
    time.legend(frameon=False, fontsize=8)
