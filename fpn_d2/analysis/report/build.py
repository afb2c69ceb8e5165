"""What ``fpn-d2 report`` does: a page out of what the folder of a run holds; no model is run."""

import math
import os
import re
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances

from fpn_d2.analysis.errors.detections import Objects, take
from fpn_d2.analysis.errors.report import KINDS, worst_images
from fpn_d2.analysis.errors.report import figure as errors_figure
from fpn_d2.analysis.errors.report import report_scored as report_errors
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.analysis.levels.report import figure as levels_figure
from fpn_d2.analysis.levels.report import report_levels
from fpn_d2.config import add_fpn_d2_config
from fpn_d2.data.image_loading import read_image
from fpn_d2.errors import UserError, one_line
from fpn_d2.files import writable_folder, write_atomically
from fpn_d2.inference.drawing import draw

from .figures import curves, themed_svg
from .page import escape, missing, page, paragraph, picture, table, tiles
from .run_folder import Run, read_run

_SIDE = 420  # pixels of an image in the gallery
_SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def report_run(
    folder: str,
    output: str | None = None,
    *,
    annotations: str | None = None,
    images: str | None = None,
    gallery: int = 6,
) -> str:
    """Write the page of a run.

    Args:
        folder: the output folder of the run; parts of it may be missing, which the page says.
        output: the file; None: ``report.html`` in the folder.
        annotations: of the test set, where it is not at the place that the configuration names.
        images: folder of its images, likewise.
        gallery: images to show.

    Returns:
        The file.

    Raises:
        UserError: there is no such folder, or it is not one of a run.
    """
    run = read_run(folder, annotations, images)
    output = output or os.path.join(folder, "report.html")
    sections = {
        "Remarks": _remarks(run),
        "Curves": _curves(run),
        "Average precision": _precision(run),
        "Levels": _levels(run),
        "Errors": _errors(run, gallery),
        "Gallery": _gallery(run, gallery),
        "Configuration": _configuration(run),
        "Environment": _environment(run),
    }
    writable_folder(os.path.dirname(os.path.abspath(output)))
    name = os.path.basename(os.path.abspath(folder))
    write_atomically(output, page(f"Run {name}", tiles(_figures(run)), sections))
    return output


def _figures(run: Run) -> dict[str, str]:
    """The most important figures."""
    found = {}
    for key, (iterations, values) in run.series(*run.names(r"(.*/)?(bbox|segm|keypoints)/AP(50)?")).items():
        place = int(np.nanargmax(values)) if np.isfinite(values).any() else len(values) - 1
        found[f"{key} at the end"] = f"{values[-1]:.1f}"
        if len(values) > 1 and key.endswith("/AP"):
            found[f"best {key}, iteration {iterations[place]}"] = f"{values[place]:.1f}"
    trained = run.series("total_loss", "time")
    if "total_loss" in trained:
        found["last iteration"] = str(int(trained["total_loss"][0][-1]) + 1)
        found["loss at the end"] = f"{trained['total_loss'][1][-1]:.3g}"
    if "time" in trained:
        found["seconds per iteration"] = f"{np.median(trained['time'][1]):.3g}"
    if run.scored is not None:
        found["images tested"] = str(len(run.scored.files))
    return found


def _remarks(run: Run) -> str:
    if "metrics" in run.missing:
        return missing(run.missing["metrics"])
    if not run.remarks:
        return paragraph("Nothing wrong is to be seen in the records of the run.")
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in run.remarks) + "</ul>"


def _curves(run: Run) -> str:
    if "metrics" in run.missing:
        return missing(run.missing["metrics"])
    found = curves(run)
    if not found:
        return missing("metrics.json has no records")
    return '<div class="curves">' + "".join(themed_svg(figure, title) for title, figure in found.items()) + "</div>"


def _precision(run: Run) -> str:
    parts = []
    for name in run.names(r"(.*/)?(bbox|segm|keypoints)/AP"):
        prefix = name.removesuffix("AP")
        last = {key: values[-1] for key, (_, values) in run.series(*run.names(re.escape(prefix) + ".*")).items()}
        row = {key: float(last[prefix + key]) for key in _SUMMARY if prefix + key in last}
        parts += [f"<h3>{escape(prefix.rstrip('/'))}, in percent</h3>", table(list(row), [list(row.values())])]
        classes = {key.removeprefix(f"{prefix}AP-"): v for key, v in last.items() if key.startswith(f"{prefix}AP-")}
        if classes:
            best_first = sorted(classes.items(), key=lambda one: -np.nan_to_num(one[1], nan=-1))
            parts.append(table(("class", "AP"), best_first))
    return "\n".join(parts) or missing(run.missing.get("metrics", "the run was never evaluated"))


def _rule(run: Run) -> Rule | None:
    try:
        return None if run.cfg is None else Rule.of(run.cfg)
    except UserError:
        return None


def _levels(run: Run) -> str:
    rule = _rule(run)
    if run.scored is None:
        return missing(run.missing["detections"])
    if rule is None:
        return missing(run.missing.get("config", "the model has no pyramid"))
    report = report_levels(run.scored, rule)
    keys = list(next(iter(report.rows.values())))
    rows = [(name, *(row[key] for key in keys)) for name, row in report.rows.items()]
    words = (
        f"Test set {run.dataset}, by the level that a box is pooled from (canonical box size and level, or rule: "
        f"{rule.words()}) and by COCO's sizes. cells: median side of an object in cells of its level. "
        "recall at IoU 0.5."
    )
    return (
        paragraph(words, "quiet")
        + table(("", *keys), rows)
        + f'<div class="scroll">{themed_svg(levels_figure(report), "levels")}</div>'
    )


def _errors(run: Run, gallery: int) -> str:
    if run.scored is None:
        return missing(run.missing["detections"])
    report = report_errors(run.scored, rule=_rule(run))
    rows = [("points of AP", "", "", *(report.costs[kind] for kind in KINDS))]
    rows += [
        (name, group["objects"], group["recall"], *(group["costs"][kind] for kind in KINDS))
        for name, group in report.groups.items()
    ]
    rows.append(("errors", "", "", *(report.counts[kind] for kind in KINDS)))
    words = "Points of AP at IoU 0.5 that mending all errors of one type would gain (TIDE, Bolya et al., ECCV 2020)."
    parts = [
        paragraph(words, "quiet"),
        table(("", "objects", "recall", *KINDS), rows),
        f'<div class="scroll">{themed_svg(errors_figure(report), "errors")}</div>',
    ]
    try:
        if gallery:
            if not run.images:
                raise UserError(run.missing["images"])
            words = f"The images with the heaviest errors, of detections with {report.min_score:g} or more:"
            pictures = [picture(pixels, name) for name, pixels in worst_images(report, run.images, gallery)]
            parts += [paragraph(words), f'<div class="small">{"".join(pictures)}</div>']
    except (ValueError, OSError) as error:
        parts.append(missing(one_line(error)))
    return "\n".join(parts)


def _gallery(run: Run, count: int) -> str:
    if run.scored is None:
        return missing(run.missing["detections"])
    if not run.images:
        return missing(run.missing["images"])
    least = 0.5 if run.cfg is None else run.cfg.TEST.PICTURE_SCORE
    number = min(count, len(run.scored.files))
    chosen = np.linspace(0, len(run.scored.files) - 1, number).round().astype(int)
    pairs = "\n".join(_pairs(run, chosen.tolist(), least))
    if not pairs:
        return missing("no image was asked for")
    return paragraph(f"Truth, and detections with {least:g} or more.", "quiet") + f'<div class="large">{pairs}</div>'


def _pairs(run: Run, chosen: list[int], least: float) -> Iterator[str]:
    for image in chosen:
        name = run.scored.files[image]
        try:
            pixels = np.ascontiguousarray(read_image(os.path.join(run.images, name), "BGR"))
        except Exception as error:  # on a broken file the decoders raise almost anything
            yield missing(one_line(error))
            continue
        scale = _SIDE / max(pixels.shape[:2])
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=how)
        panels = []
        for objects, scores in ((run.scored.truth, False), (run.scored.found, True)):
            rows = (objects.image == image) & ~objects.crowd & (objects.score >= least)
            shown = _instances(take(objects, rows), scale, pixels.shape[:2])
            panels.append(draw(pixels, shown, run.scored.class_names, min_score=0.0, scores=scores))
        gap = np.full((pixels.shape[0], 6, 3), 128, np.uint8)
        yield picture(np.hstack([panels[0], gap, panels[1]]), name)


def _instances(objects: Objects, scale: float, size: tuple[int, int]) -> Instances:
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(objects.box * scale)),
        scores=torch.tensor(objects.score),
        pred_classes=torch.tensor(objects.label),
    )


def _configuration(run: Run) -> str:
    if run.cfg is None:
        return missing(run.missing["config"])
    defaults = get_cfg()
    add_fpn_d2_config(defaults)
    rows = [(key, str(now), str(before)) for key, now, before in _differences(run.cfg, defaults) if key != "OUTPUT_DIR"]
    with open(os.path.join(run.folder, "config.yaml"), encoding="utf-8", errors="replace") as file:
        whole = file.read()
    return (
        paragraph("Keys that differ from the defaults.", "quiet")
        + table(("key", "value", "default"), rows, "text")
        + f"<details><summary>All of config.yaml</summary><pre>{escape(whole)}</pre></details>"
    )


def _differences(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for key, value in cfg.items():
        before = defaults.get(key)
        if isinstance(value, CfgNode):
            yield from _differences(value, before if isinstance(before, CfgNode) else CfgNode(), f"{prefix}{key}.")
        elif _plain(value) != _plain(before):
            yield f"{prefix}{key}", value, before


def _plain(value: object) -> object:
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _environment(run: Run) -> str:
    parts = []
    if "log" in run.missing:
        parts.append(missing(run.missing["log"]))
    elif not run.environment:
        parts.append(missing("log.txt has no report on the environment"))
    else:
        parts.append(table(("", ""), run.environment, "text"))
    if run.command:
        parts.append(f"<h3>Command line</h3><pre>{escape(run.command)}</pre>")
    if run.checkpoints:
        sizes = [(name, f"{math.ceil(size / 2**20)} MB") for name, size in run.checkpoints]
        parts += ["<h3>Checkpoints</h3>", table(("file", "size"), sizes)]
    return "\n".join(parts)
