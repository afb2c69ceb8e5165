"""The table of benchmarks, in Markdown."""

from collections.abc import Mapping

from .line import Check, show_checks
from .rows import ROWS, Row

_HEADS = {"s": "times as fast (quartiles; pairs)", "MB": "share of Detectron2's memory (quartiles; pairs)"}


def show_table(results: Mapping[str, dict], rows: Mapping[str, Row] | None = None) -> str:
    """Machine and versions, then a line for each way of ours in each row, with the command that measures it again.

    Args:
        results: what was measured, by name of the row.
        rows: those to show, also where they were not measured; None: those in ``results``.
    """
    if rows is None:
        rows = {name: ROWS[name] for name in results}
    parts = [_environments({name: results[name] for name in rows if name in results})]
    for unit, head in _HEADS.items():
        own = {name: row for name, row in rows.items() if row.unit == unit}
        if own:
            took = {"s": "milliseconds, Detectron2's and ours", "MB": "MB, Detectron2's and ours"}[unit]
            columns = ["what", "ours", head, took]
            columns += ["of the machine's peak"] if unit == "s" else []
            columns += ["difference, and what was worked on", "command"]
            lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
            lines += [_line(*cells) for row in own.values() for cells in _cells(row, results.get(row.name))]
            parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part)


def _environments(results: Mapping[str, dict]) -> str:
    """One line for each machine and set of versions, with the rows that were measured there if it is not all."""
    kinds: dict[str, list[str]] = {}
    for name, result in results.items():
        kinds.setdefault(_environment(result["environment"]), []).append(name)
    if len(kinds) == 1:
        return f"Measured with {next(iter(kinds))}."
    return "\n".join(f"- Measured with {kind}: {', '.join(names)}." for kind, names in kinds.items())


def _environment(about: Mapping[str, object]) -> str:
    packages = about["packages"]
    versions = [f"{name} {about[key]}" for name, key in (("torch", "torch"), ("torchvision", "torchvision"))]
    versions.append(f"Detectron2 {about['detectron2']}")
    versions += [f"{name} {packages[name]}" for name in sorted(packages, key=str.lower)]
    versions += [f"Python {about['python']}", about["compiler"] or "no C++ compiler"]
    versions.append(f"{about['processor']}, {about['cores']} cores, {about['threads']} threads")
    versions += [f"{name}={value}" for name, value in sorted(about["variables"].items())]
    return ", ".join([*versions, f"state {about['code']} of this package's code"])


def _cells(row: Row, result: dict | None) -> list[list[str]]:
    command = f"`fpn-d2 benchmark --rows {row.name}`"
    empty = [""] * (2 if row.unit == "s" else 1)
    if result is None or "failed" in result:
        why = "not run yet" if result is None else f"not measured: {_cell(result['failed'])}"
        what = row.what if result is None else result["what"]
        return [[what, "", why, *empty, "", command]]
    return [[*_result(result["what"], one, empty), command] for one in result["lines"]]


def _result(what: str, one: Mapping[str, object], empty: list[str]) -> list[str]:
    against = one.get("against", "Detectron2")
    if against != "Detectron2":
        what = f"{what}, against {against}"
    if "not_measured" in one:
        return [what, one["ours"], f"not measured: {_cell(one['not_measured'])}", *empty, ""]
    ratio = one["ratio"]
    spread = f"{ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f}; {ratio['n']})"
    factor = 1000 if one["unit"] == "s" else 1
    took = [f"{float(format(one[side]['median'] * factor, '.3g')):g}" for side in ("theirs", "own")]
    cells = [what, one["ours"], spread, ", ".join(took)]
    if one["unit"] == "s":
        peak = one.get("of_peak")
        cells.append(f"{peak['theirs']:.0%}, {peak['own']:.0%}" if peak else "")
    remarks = [show_checks([Check(**check) for check in one["checks"]]), one["note"]]
    return [*cells, "; ".join(filter(None, remarks))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").rstrip(".")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
