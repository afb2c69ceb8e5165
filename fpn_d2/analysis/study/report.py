"""Table, figure and machine-readable results of a study, from the result files of its runs alone."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import get_cfg

from fpn_d2.errors import UserError
from fpn_d2.files import write_atomically

# The variant to which others are compared seed by seed: the seeds' scenes are the same for both.
COMPARED_WITH = "fpn"


def write_report(
    folder: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    reference: str | None,
    settings: Mapping[str, dict],
    place: str = "runs",
) -> Path:
    """Write ``results.json``, ``table.md`` and ``study.png`` into ``folder``; runs without a result are left out.

    Args:
        folder: as in :func:`fpn_d2.analysis.study.run_study`.
        variants: in the order of the table's rows.
        seeds: those whose runs count.
        reference: the variant that memory and training time are divided by; None: neither was measured.
        settings: by variant those of its runs; results with others are left out.
        place: folder of the runs within ``folder``; of others than "runs" everything is written into that one.

    Returns:
        The path of the table.

    Raises:
        UserError: not one run has a result.
    """
    rows = summarise(folder, variants, seeds, reference, settings, place)
    if not rows:
        raise UserError(f"no run in {folder / place} has a result; see the console.txt of each")
    folder = folder if place == "runs" else folder / place
    text = json.dumps({"seeds": list(seeds), "reference": reference, "variants": _without_nan(rows)}, indent=1)
    write_atomically(str(folder / "results.json"), text + "\n")
    table = folder / "table.md"
    write_atomically(str(table), markdown(rows, reference) + "\n")
    draw(rows, reference, folder / "study.png")
    return table


def summarise(
    folder: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    reference: str | None,
    settings: Mapping[str, dict],
    place: str = "runs",
) -> list[dict]:
    """Mean and spread over the seeds, variant by variant; see :func:`write_report`.

    Returns:
        A dictionary per variant that has results, in the order of ``variants``: "variant", "seeds", and each
        measured quantity as {"mean", "spread", "values"}, the spread being the sample standard deviation: nan for
        one seed.
    """
    runs = {}
    for variant in {*variants, COMPARED_WITH, *([reference] if reference else [])}:
        for seed in seeds:
            path = folder / place / variant / f"seed_{seed}" / "result.json"
            if found := _result(path, settings.get(variant)):
                runs[variant, seed] = found
    rows = []
    for variant in variants:
        own = {seed: runs[variant, seed] for seed in seeds if (variant, seed) in runs}
        if not own:
            continue
        row = {"variant": variant, "seeds": list(own), "parameters": next(iter(own.values()))["parameters"]}
        for key in ("AP", "AP50", "macs", "peak_memory_mb"):
            row[key] = _summary([run[key] for run in own.values()])
        first = next(iter(own.values()))
        row["sizes"] = {size: _summary([run["sizes"][size] for run in own.values()]) for size in first["sizes"]}
        row["recall"] = {
            limit: {size: _summary([run["recall"][limit][size] for run in own.values()]) for size in found}
            for limit, found in first.get("recall", {}).items()
        }
        row["AP_image_pyramid"] = _summary([run.get("AP_image_pyramid", math.nan) for run in own.values()])
        row["rate"] = settings[variant].get("SOLVER.BASE_LR", get_cfg().SOLVER.BASE_LR)
        row["AP_difference"] = _summary(
            [run["AP"] - runs[COMPARED_WITH, s]["AP"] for s, run in own.items() if (COMPARED_WITH, s) in runs]
        )
        row["memory_ratio"] = _summary(
            [
                r["peak_memory_mb"] / runs[reference, s]["peak_memory_mb"]
                for s, r in own.items()
                if (reference, s) in runs
            ]
        )
        both = {"variant": settings[variant], "reference": settings.get(reference)}
        compared = _result(folder / "times" / f"{variant}.json", both)
        row["time_ratio"] = {"median": compared.get("median"), "quartiles": compared.get("quartiles")}
        rows.append(row)
    return rows


def _result(path: Path, settings: dict | None) -> dict:
    """What is in the file if it is there and of these settings, else nothing; the number of timed pairs may differ."""
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in found.get("settings", {}).items() if key != "pairs"}
    return found if kept == settings else {}


def _summary(values: list[float]) -> dict:
    measured = [value for value in values if not math.isnan(value)]
    return {
        "mean": statistics.fmean(measured) if measured else math.nan,
        "spread": statistics.stdev(measured) if len(measured) > 1 else math.nan,
        "values": values,
    }


def _without_nan(value: object) -> object:
    """The same with None for nan, which is not JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def markdown(rows: list[dict], reference: str | None) -> str:
    """The tables: AP in percent as mean ± sample standard deviation over the seeds with the cost, and recall."""
    tables = [_table(_columns_of_ap(rows, reference))]
    if rows[0]["recall"]:
        tables.append(_table(_columns_of_recall(rows)))
    return "\n\n".join(tables)


def _columns_of_ap(rows: list[dict], reference: str | None) -> dict[str, list[str]]:
    columns = {
        "variant": [row["variant"] for row in rows],
        "seeds": [str(len(row["seeds"])) for row in rows],
        "AP": [_ap(row["AP"]) for row in rows],
        "AP50": [_ap(row["AP50"]) for row in rows],
    }
    columns |= {f"AP {size} px": [_ap(row["sizes"][size]) for row in rows] for size in rows[0]["sizes"]}
    columns[f"AP less that of {COMPARED_WITH}"] = [
        "" if row["variant"] == COMPARED_WITH else _ap(row["AP_difference"], sign="+") for row in rows
    ]
    if any(not math.isnan(row["AP_image_pyramid"]["mean"]) for row in rows):
        columns["AP, image pyramid at test"] = [_ap(row["AP_image_pyramid"]) for row in rows]
    if len({row["rate"] for row in rows}) > 1:
        columns["learning rate"] = [f"{row['rate']:g}" for row in rows]
    columns["GMAC"] = [f"{row['macs']['mean'] / 1e9:.2f}" for row in rows]
    columns["M parameters"] = [f"{row['parameters'] / 1e6:.1f}" for row in rows]
    if reference:
        columns[f"memory / {reference}"] = [_number(row["memory_ratio"]["mean"]) for row in rows]
        columns[f"time / {reference} (quartiles)"] = [_time(row["time_ratio"]) for row in rows]
    return columns


def _columns_of_recall(rows: list[dict]) -> dict[str, list[str]]:
    columns = {"variant": [row["variant"] for row in rows]}
    for limit, sizes in rows[0]["recall"].items():
        for size in sizes:
            columns[f"{limit} {'' if size == 'all' else f'{size} px'}".strip()] = [
                _ap(row["recall"][limit][size]) for row in rows
            ]
    return columns


def _table(columns: dict[str, list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


def _ap(summary: dict, sign: str = "") -> str:
    if math.isnan(summary["mean"]):
        return "-"
    spread = "" if math.isnan(summary["spread"]) else f" ± {summary['spread']:.1f}"
    return f"{summary['mean']:{sign}.1f}{spread}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _time(ratio: dict) -> str:
    if ratio["median"] is None:
        return "-"
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


def draw(rows: list[dict], reference: str | None, path: Path) -> None:
    """Draw AP by variant with each seed, AP by size, and AP against cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(16, 2.6 + 0.3 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    by_variant, by_size, by_cost = figure.subplots(1, 3, width_ratios=[1.1, 1, 1.2])
    names = [f"{row['variant']}  {number}" for number, row in enumerate(rows, start=1)]
    places = range(len(rows))

    means = [row["AP"]["mean"] for row in rows]
    spreads = [0.0 if math.isnan(row["AP"]["spread"]) else row["AP"]["spread"] for row in rows]
    by_variant.barh(places, means, xerr=spreads, color="tab:blue", alpha=0.5, capsize=3)
    for place, row in zip(places, rows, strict=True):
        by_variant.plot(row["AP"]["values"], [place] * len(row["AP"]["values"]), "k.", markersize=4)
    by_variant.set(yticks=list(places), yticklabels=names, xlabel="AP: mean, standard deviation, each seed")
    by_variant.invert_yaxis()

    sizes = list(rows[0]["sizes"])
    values = [[row["sizes"][size]["mean"] for size in sizes] for row in rows]
    by_size.imshow(values, aspect="auto", cmap="viridis")
    highest = max((v for line in values for v in line if not math.isnan(v)), default=0.0)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "black" if value > 0.6 * highest else "white"
                by_size.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    by_size.set(xticks=range(len(sizes)), xticklabels=sizes, yticks=list(places), yticklabels=names)
    by_size.set_xlabel("AP by object size in pixels")

    timed = all(row["time_ratio"]["median"] is not None for row in rows)
    costs = [row["time_ratio"]["median"] if timed else row["macs"]["mean"] / 1e9 for row in rows]
    by_cost.errorbar(costs, means, yerr=spreads, fmt="none", ecolor="tab:blue", elinewidth=0.7, alpha=0.4)
    by_cost.plot(costs, means, "o", markersize=4)
    by_cost.set(ylabel="AP", title="numbers: the variants on the left", xmargin=0.15, ymargin=0.15)
    by_cost.set_xlabel(f"training time as a ratio to {reference}" if timed else "GMAC of an image")
    if max(costs) > 5 * min(costs):
        by_cost.set_xscale("log")
        by_cost.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=ScalarFormatter())
        by_cost.xaxis.set_minor_formatter(NullFormatter())
    figure.draw_without_rendering()  # now it is settled where the points are
    _number_points(by_cost, costs, means)
    figure.savefig(path)


def _number_points(axes, xs: list[float], ys: list[float]) -> None:
    """Write 1, 2, ... beside the points, each where it hides no point and no other number, with a line to its point."""
    points = [tuple(point) for point in axes.transData.transform(list(zip(xs, ys, strict=True)))]
    taken = list(points)
    scale = axes.figure.dpi / 72  # pixels of a typographic point
    for number, (x, y) in enumerate(points, start=1):
        around = [
            (radius * math.cos(angle * math.pi / 8), radius * math.sin(angle * math.pi / 8))
            for radius in range(12, 120, 6)
            for angle in range(16)
        ]
        places = [(x + dx * scale, y + dy * scale) for dx, dy in around]
        inside = [place for place in places if axes.bbox.padded(-8 * scale).contains(*place)] or places
        place = next((p for p in inside if all(math.dist(p, t) > 12 * scale for t in taken)), inside[0])
        taken.append(place)
        axes.annotate(
            str(number),
            (x, y),
            place,
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 1, "shrinkB": 2},
        )
