"""The result of a comparison for people and programs: tables for a terminal, compare.json, compare.html."""

import json
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from fpn_d2.files import write_atomically

from ..measure.parts import PARTS
from ..published.zoo import zoo_baselines
from .figures import figures
from .page import page

_ZOO_COLUMNS = {
    "box_AP": "box AP",
    "mask_AP": "mask AP",
    "keypoint_AP": "keypoint AP",
    "PQ": "PQ",
    "train_s_per_iter": "train s/iter",
    "inference_s_per_im": "inference s/im",
    "train_memory_gb": "train GB",
}
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass
class Table:
    """A titled table of text, with a sentence on how to read it."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""


def write_report(result: dict, folder: Path) -> None:
    """Write compare.json and compare.html into ``folder``, each whole or not at all."""
    write_atomically(str(folder / "compare.json"), json.dumps(result, indent=1, allow_nan=False) + "\n")
    appendices = [all_of_the_zoo()] if any(result["published"]["zoo"]["rows"].values()) else []
    html = page(result, headline(result), tables(result), figures(result), appendices)
    write_atomically(str(folder / "compare.html"), html)


def text(result: dict) -> str:
    """The tables for a terminal, and what was not measured."""
    parts = [headline(result)]
    for table in tables(result):
        lines = tabulate(table.rows, headers=table.headers, tablefmt="simple", disable_numparse=True)
        parts.append("\n".join(filter(None, [table.title, lines, table.note])))
    if result["not_measured"]:
        parts.append("\n".join(["Not measured", *(f"- {line}" for line in result["not_measured"])]))
    return "\n\n".join(parts)


def headline(result: dict) -> str:
    """What the two are, where they were measured, and the verdict on their outputs."""
    lines = []
    for model in result["models"]:
        opts = f" {' '.join(model['opts'])}" if model["opts"] else ""
        optimized = f", optimised for inference in {result['settings']['dtype']}" if model["optimized"] else ""
        lines.append(f"{model['label']}: {model['config']}{opts} ({model['architecture']}{optimized})")
    environment = result["environment"]
    where = environment["processor"] if environment["device"] == "cpu" else environment["device"]
    lines.append(
        f"On {where}, {environment['threads']} threads; torch {environment['torch']}, "
        f"Detectron2 {environment['detectron2']}"
    )
    lines.append(f"Weights: {result['weights']['source']}")
    for label, names in result["weights"]["unmatched"].items():
        for kind, words in (("not_loaded", "without weights from there"), ("not_used", "there, but not in the model")):
            if names[kind]:
                more = f" and {len(names[kind]) - 3} more" if len(names[kind]) > 3 else ""
                lines.append(f"  {label}: {words}: {', '.join(names[kind][:3])}{more}")
    for key, (a, b) in result["parity"]["input_settings"].items():
        lines.append(f"Input: {key} is {a} in A, {b} in B")
    lines.append(verdict(result["parity"]))
    return "\n".join(lines)


def verdict(parity: dict) -> str:
    """The outcome of the comparison of outputs, in a sentence."""
    if not parity["same_model"]:
        part = parity["first_beyond"]
        where = f", from the stage {part} on" if part else ""
        return f"Outputs: not compared, since A and B are two models with tensors of their own{where}"
    if parity["first_unequal"] is None:
        return "Outputs: equal, bit for bit, in every stage"
    if parity["first_beyond"] is None:
        return f"Outputs: the same within the tolerance; the first bits differ in: {parity['first_unequal']}"
    return f"Outputs: they differ; the first stage beyond the tolerance: {parity['first_beyond']}"


def tables(result: dict) -> list[Table]:
    """Every table of the report; those without a row are left out."""
    made = [_parts(result), _parity(result), _engines(result), _times(result, "inference"), _times(result, "training")]
    made += [_memory(result), _ap(result), _zoo(result), _mmdetection(result)]
    return [table for table in made if table.rows]


def _parts(result: dict) -> Table:
    models = result["models"]
    height, width = models[0]["macs"]["size"]
    rows = []
    for part in (*PARTS, "total"):
        parameters = [model["parameters"][part] for model in models]
        macs = [model["macs"][part] for model in models]
        if any(parameters) or any(macs):
            rows.append([part, *(f"{n / 1e6:.4g}" for n in parameters), *(f"{n / 1e9:.4g}" for n in macs)])
    labels = [model["label"] for model in models]
    headers = ["part", *(f"M parameters, {label}" for label in labels), *(f"GMAC, {label}" for label in labels)]
    note = (
        f"GMAC: 10^9 multiply-adds (half of what is called FLOPs by those who count both) of one image of "
        f"{height} x {width}: convolutions, matrix products, attention, and RoIAlign by its definition."
    )
    return Table("Parameters and multiply-adds by part", headers, rows, note)


def _parity(result: dict) -> Table:
    parity = result["parity"]
    rows: list[list[str]] = []
    for stage, found in parity["stages"].items() if parity["same_model"] else ():
        rows.append([stage, "all", _small(found["max_abs"]), _small(found["max_rel"]), _judged(found), ""])
        for row in parity["rows"]:
            if row["stage"] == stage:
                values = [_small(row["max_abs"]), _small(row["max_rel"]), _judged(row), row["note"]]
                rows.append(["", row["item"], *values])
    tolerance = parity["tolerance"]
    note = (
        f"Images: {parity['images']}; every score counts. Relative: by A's largest absolute value. Proposals and "
        f"detections are paired by box, score and class. Tolerance: maps {tolerance['relative']:g} relative, boxes "
        f"{tolerance['pixels']:g} px, scores {tolerance['score']:g}."
    )
    headers = ["stage", "", "largest difference", "relative", "", "pairs"]
    return Table("Outputs, stage by stage", headers, rows, note)


def _engines(result: dict) -> Table:
    rows = []
    for engine, parity in result["engines"].items():
        for stage, found in parity["stages"].items():
            rows.append([engine, stage, _small(found["max_abs"]), _small(found["max_rel"]), _judged(found)])
    headers = ["A in", "stage", "largest difference", "relative", ""]
    note = (
        "A, exported, against A itself, on images of noise. In lower precision the pyramid alone is compared: there "
        "other scores are the highest."
    )
    return Table("Outputs of other engines", headers, rows, note)


def _judged(found: dict) -> str:
    return "equal" if found["equal"] else "within" if found["within"] else "DIFFERS"


def _small(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.2g}"


def _times(result: dict, kind: str) -> Table:
    rows, others = [], [label for measured in result[kind][:1] for label in measured["times_as_fast"]]
    for measured in result[kind]:
        height, width = measured["size"]
        for label, seconds in measured["seconds"].items():
            low, high = seconds["quartiles"]
            row = [f"{height}x{width}", str(measured["batch"]), label]
            row += [f"{seconds['median'] * 1e3:.1f}", f"{low * 1e3:.1f} to {high * 1e3:.1f}"]
            if kind == "inference":
                row += [f"{measured['images_per_second'][label]:.2f}", f"{measured['detections_per_image'][label]:g}"]
            ratios = {} if label in others else measured["times_as_fast"]
            rows.append(row + [_ratio(ratios[other]) if other in ratios else "" for other in others])
    title = {"inference": "Inference", "training": "Training step: forward, backward, optimizer"}[kind]
    more = ["images/s", "detections/image"] if kind == "inference" else []
    headers = ["image", "batch", "", "median ms", "quartiles", *more, *(f"times as fast as {x}" for x in others)]
    note = (
        f"{result['settings']['rounds']} rounds in turn after {result['settings']['warmup']} to warm up"
        f"{', each column in a process of its own' if result['engines'] and kind == 'inference' else ''}. Times as "
        "fast: median and quartiles of the ratios of the pairs, the other's time by A's."
    )
    return Table(title, headers, rows, note)


def _ratio(ratio: dict) -> str:
    return f"{ratio['median']:.2f}x ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})"


def _memory(result: dict) -> Table:
    rows = []
    for measured in result["memory"]:
        for mode in ("inference", "training"):
            for label, peak in measured.get(mode, {}).items():
                first = next(iter(measured[mode].values()))
                by_a = f"{peak / first:.2f}" if peak is not None and first else "-"
                size = f"{measured['size'][0]}x{measured['size'][1]}"
                shown = "-" if peak is None else f"{peak:.0f}"
                rows.append([size, str(measured["batch"]), mode, label, shown, by_a])
    headers = ["image", "batch", "", "", "MB", "by A's"]
    note = (
        "By how much the model's work raises the peak above what its weights take: on a GPU that of PyTorch's tensors, "
        "on a CPU that of a fresh process' resident memory."
    )
    return Table("Peak of memory", headers, rows, note)


def _ap(result: dict) -> Table:
    rows = []
    for label, datasets in result["ap"].items():
        for dataset, tasks in datasets.items():
            for task, metrics in tasks.items():
                values = [metrics.get(metric) for metric in _METRICS]
                rows.append([label, dataset, task, *("-" if v is None else f"{v:.2f}" for v in values)])
    return Table("AP in percent, measured here", ["", "data set", "task", *_METRICS], rows)


def _zoo(result: dict) -> Table:
    zoo = result["published"]["zoo"]
    rows = [[label, row["config"], *_published(row)] for label, row in zoo["rows"].items() if row]
    note = f"Not measured here. Source: {zoo['source']}. {zoo['measured_on']}."
    return Table("Published by Detectron2", ["", "config", *_ZOO_COLUMNS.values()], rows, note)


def _published(row: dict) -> list[str]:
    return ["" if row.get(column) is None else f"{row[column]:g}" for column in _ZOO_COLUMNS]


def _mmdetection(result: dict) -> Table:
    mmdetection = result["published"]["mmdetection"]
    columns = ("box_AP", "mask_AP", "inference_s_per_im", "train_memory_gb")
    rows = [
        [row["config"], *("" if row[column] is None else f"{row[column]:g}" for column in columns)]
        for row in mmdetection["rows"].values()
    ]
    families = {row["family"] for row in mmdetection["rows"].values()}
    sources = ", ".join(mmdetection["source"][family] for family in sorted(families))
    note = f"Not measured here. Source: {sources}. {mmdetection['measured_on']}."
    return Table("Published by mmdetection", ["config", *(_ZOO_COLUMNS[c] for c in columns)], rows, note)


def all_of_the_zoo() -> Table:
    """Every row of Detectron2's tables."""
    zoo = zoo_baselines()
    rows = [[row["config"], *_published(row)] for row in zoo["rows"]]
    note = f"Source: {zoo['source']}. {zoo['measured_on']}."
    return Table("Detectron2's model zoo, as published", ["config", *_ZOO_COLUMNS.values()], rows, note)
