"""The figure of the cost curves: time and memory, ours and Detectron2's, above each other for each curve."""

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
        columns = min(len(curves), 3)
        rows = math.ceil(len(curves) / columns)
        figure = Figure(figsize=(3.8 * columns, 5.0 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        for number, (name, curve) in enumerate(curves.items()):
            row, column = divmod(number, columns)
            time = figure.add_subplot(2 * rows, columns, 2 * row * columns + column + 1)
            memory = figure.add_subplot(2 * rows, columns, (2 * row + 1) * columns + column + 1, sharex=time)
            _column(time, memory, name, curve)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _column(time, memory, name: str, curve: dict) -> None:
    points = curve["points"]
    values = [point["value"] for point in points]
    for colour, (label, power) in zip(_COLOURS, curve["growth"].items(), strict=True):
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
    memory.set_xticks(values, [str(value) for value in values])  # what was measured, no powers of ten
    memory.set_xticks([], minor=True)
    time.tick_params(labelbottom=False)
    time.set_ylabel("seconds")
    memory.set_ylabel("peak, MB")
    time.legend(frameon=False, fontsize=8)
