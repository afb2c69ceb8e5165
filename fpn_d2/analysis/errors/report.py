"""What `fpn-d2 errors` shows: the costs of the error types, by level and size too, curves, confusions, worst images."""

import dataclasses
import json
import os
from collections.abc import Iterator

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure

from fpn_d2.analysis.level_rule import Rule
from fpn_d2.data.image_loading import read_image
from fpn_d2.errors import UserError
from fpn_d2.files import writable_folder, write_atomically
from fpn_d2.inference.drawing import draw, write

from .detections import Scored, read
from .tide import CLASSIFICATION, IGNORED, KINDS, MISSED, TRUE, Errors, costs, find_errors, mean_ap, precisions

SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))  # COCO's
_MOST_CLASSES = 12  # that a figure names


@dataclasses.dataclass
class Report:
    """All figures, and what they are about.

    Attributes:
        scored: the data set.
        errors: what is wrong with each detection and object.
        ap: AP at the IoU of a right detection, in percent.
        costs: points of AP that each error type costs.
        counts: how many errors of each type there are.
        groups: for each size, and each level if a rule is known, objects, recall in percent, counts and costs.
        confusion: (C + 1, C + 1) objects by their class, the last row for none, and the class found, the last column
            for none; of detections with ``min_score``.
        min_score: see above.
    """

    scored: Scored
    errors: Errors
    ap: float
    costs: dict[str, float]
    counts: dict[str, int]
    groups: dict[str, dict]
    confusion: np.ndarray
    min_score: float

    def figures(self) -> dict:
        """What `errors.json` holds."""
        return {
            "ap": self.ap,
            "costs": self.costs,
            "counts": self.counts,
            "groups": self.groups,
            "classes": self.scored.class_names,
            "confusion": self.confusion.tolist(),
            "confusion_min_score": self.min_score,
        }

    def table(self) -> str:
        """The costs in Markdown."""
        lines = [f"AP at the IoU of a right detection: {self.ap:.1f}", ""]
        lines += ["| | objects | recall | " + " | ".join(KINDS) + " |", "| --- |" + " ---: |" * (len(KINDS) + 2)]
        groups = ((name, group, group["costs"]) for name, group in self.groups.items())
        for name, group, cost in [("points of AP", None, self.costs), *groups]:
            count = "" if group is None else group["objects"]
            recall = "" if group is None or np.isnan(group["recall"]) else f"{group['recall']:.1f}"
            lines.append(f"| {name} | {count} | {recall} | " + " | ".join(f"{cost[kind]:.1f}" for kind in KINDS) + " |")
        lines.append("| errors | | | " + " | ".join(str(self.counts[kind]) for kind in KINDS) + " |")
        return "\n".join(lines)


def report_errors(
    annotations: str,
    predictions: str,
    *,
    t_f: float = 0.5,
    t_b: float = 0.1,
    min_score: float = 0.3,
    rule: Rule | None = None,
) -> Report:
    """Find where the lost AP goes.

    Args:
        annotations: COCO json.
        predictions: see `fpn_d2.analysis.errors.detections.read`.
        t_f: IoU from which on a detection is right.
        t_b: IoU up to which a detection overlaps nothing.
        min_score: detections with a lower score are left out of the confusion matrix.
        rule: for figures by level.

    Raises:
        UserError: a file cannot be read, there are no objects, or an IoU is none.
    """
    if not 0 < t_b < t_f <= 1:
        raise UserError(f"the IoU of a right detection is {t_f}; expected more than {t_b} and at most 1")
    scored = read(annotations, predictions)
    if not len(scored.truth):
        raise UserError(f"{annotations} has no objects, so that no AP can be lost")
    return report_scored(scored, t_f=t_f, t_b=t_b, min_score=min_score, rule=rule)


def report_scored(
    scored: Scored, *, t_f: float = 0.5, t_b: float = 0.1, min_score: float = 0.3, rule: Rule | None = None
) -> Report:
    """As `report_errors`, of what has been read already."""
    errors = find_errors(scored, t_f, t_b)
    counts = {name: int((errors.kind == number).sum()) for number, name in enumerate(KINDS[:MISSED])}
    counts["missed"] = int(errors.missed.sum())
    groups = {
        name: _group(scored, errors, *(((o.area >= low) & (o.area < high)) for o in (scored.found, scored.truth)))
        for name, low, high in SIZES
    }
    if rule is not None:
        scales = rule.scales(scored.sizes)
        found, truth = (rule.assign(o.box, scales[o.image]) for o in (scored.found, scored.truth))
        for level in rule.levels:
            groups[f"p{level}"] = _group(scored, errors, found == level, truth == level)
    return Report(
        scored,
        errors,
        mean_ap(scored, errors),
        costs(scored, errors),
        counts,
        groups,
        confusion(scored, errors, min_score),
        min_score,
    )


def _group(scored: Scored, errors: Errors, found: np.ndarray, truth: np.ndarray) -> dict:
    """Of an error that points at an object, the object says which group it is in, and else the detection."""
    points = (errors.target >= 0) & np.isin(errors.kind, (0, 1, 3))
    found = found.copy()
    found[points] = truth[errors.target[points]]
    objects = truth & ~scored.truth.crowd
    counts = {name: int(((errors.kind == number) & found).sum()) for number, name in enumerate(KINDS[:MISSED])}
    return {
        "objects": int(objects.sum()),
        "recall": 100.0 * float((errors.matched[objects] >= 0).mean()) if objects.any() else float("nan"),
        "counts": {**counts, "missed": int((errors.missed & truth).sum())},
        "costs": costs(scored, errors, found, truth),
    }


def confusion(scored: Scored, errors: Errors, min_score: float) -> np.ndarray:
    """The confusion matrix, see `Report`; an object is found as the class of the best detection at its place."""
    count = len(scored.class_names)
    matrix = np.zeros((count + 1, count + 1), np.int64)
    found, truth = scored.found, scored.truth
    shown = found.score >= min_score
    right = shown & (errors.kind == TRUE)
    wrong = np.flatnonzero(shown & (errors.kind == CLASSIFICATION))
    taken = np.zeros(len(truth), bool)
    taken[errors.target[right]] = True
    np.add.at(matrix, (truth.label[errors.target[right]], found.label[right]), 1)
    wrong = wrong[~taken[errors.target[wrong]]]
    order = np.lexsort((-found.score[wrong], errors.target[wrong]))
    at, first = np.unique(errors.target[wrong][order], return_index=True)
    best = wrong[order[first]]
    np.add.at(matrix, (truth.label[at], found.label[best]), 1)
    taken[at] = True
    rest = shown & ~right & (errors.kind != IGNORED)
    rest[best] = False
    np.add.at(matrix, (count, found.label[rest]), 1)
    np.add.at(matrix, (truth.label[~taken & ~truth.crowd], count), 1)
    return matrix


def write_report(report: Report, folder: str, images: str | None = None, gallery: int = 8) -> list[str]:
    """Write ``errors.json``, ``errors.md``, ``errors.png``, and with ``images`` ``worst.jpg``.

    Args:
        report: the figures.
        folder: for the files; made if it is not there.
        images: folder of the images.
        gallery: how many of the worst images to show.

    Returns:
        The files.
    """
    writable_folder(folder)
    paths = [os.path.join(folder, name) for name in ("errors.json", "errors.md", "errors.png")]
    write_atomically(paths[0], json.dumps(report.figures(), indent=1) + "\n")
    write_atomically(paths[1], report.table() + "\n")
    figure(report).savefig(paths[2], dpi=110)
    if images is not None:
        paths.append(os.path.join(folder, "worst.jpg"))
        cv2.imwrite(paths[-1], worst(report, images, gallery), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return paths


def figure(report: Report) -> Figure:
    """Costs, precision-recall curves of the classes, and the confusion matrix."""
    fig = Figure(figsize=(15, 4.6), layout="constrained")
    bars, curves, matrix = fig.subplots(1, 3)
    values = [report.costs[kind] for kind in KINDS]
    bars.barh(KINDS, values, color=matplotlib.colormaps["tab10"](range(len(KINDS))))
    texts = [f"{value:.1f} ({report.counts[kind]})" for kind, value in zip(KINDS, values, strict=True)]
    bars.bar_label(bars.containers[0], texts, padding=3)
    bars.set(title=f"AP {report.ap:.1f}: points lost (number of errors)", xlim=(0, 1.35 * max(*values, 1.0)))
    bars.invert_yaxis()
    recalls = np.linspace(0, 1, 101)
    scored, errors = report.scored, report.errors
    counted = (errors.kind != IGNORED) & ~(errors.ignored & (errors.kind != TRUE))
    for label, name in list(enumerate(scored.class_names))[:_MOST_CLASSES]:
        rows = counted & (scored.found.label == label)
        objects = int(((scored.truth.label == label) & ~scored.truth.crowd).sum())
        if objects:
            values = precisions(scored.found.score[rows], errors.kind[rows] == TRUE, objects)
            curves.plot(recalls, values, label=f"{name} {100 * values.mean():.0f}")
    curves.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="precision and recall")
    curves.legend(fontsize=8)
    _draw_confusion(matrix, report)
    return fig


def _draw_confusion(axes, report: Report) -> None:
    names = [*report.scored.class_names, "none"]
    share = report.confusion / np.maximum(report.confusion.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="found", ylabel="is", title=f"classes, score >= {report.min_score:g}")
    if len(names) <= _MOST_CLASSES + 1:
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), value in np.ndenumerate(report.confusion):
            if value:
                # On cells that stay as they are: pages that turn black and white round leave these two alone.
                colour = "#fefefe" if share[row, column] > 0.5 else "#010101"
                axes.text(column, row, str(value), ha="center", va="center", color=colour, fontsize=8)


def worst(report: Report, images: str, count: int, side: int = 420) -> np.ndarray:
    """The images of `worst_images` in one picture, up to four in a row."""
    tiles = [_square(one, side) for _, one in worst_images(report, images, count, side)]
    if not tiles:
        tiles = [np.full((side, side, 3), 255, np.uint8)]
    columns = min(4, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def worst_images(report: Report, images: str, count: int, side: int = 420) -> Iterator[tuple[str, np.ndarray]]:
    """The images with the heaviest errors: wrong detections by their score, missed objects as one each.

    Args:
        report: the figures.
        images: folder of the images.
        count: how many, at most.
        side: pixels of the longer side of a picture.

    Yields:
        The name of the file, and a picture in BGR: missed objects in white, wrong detections in the colour of their
        error type with its name.
    """
    scored, errors = report.scored, report.errors
    wrong = errors.kind >= 0
    weight = np.bincount(scored.found.image[wrong], scored.found.score[wrong], len(scored.files))
    weight += np.bincount(scored.truth.image[errors.missed], minlength=len(scored.files))
    for image in np.argsort(-weight, kind="stable")[:count]:
        if weight[image] > 0:
            yield scored.files[image], _wrong_picture(report, int(image), images, side)


def _wrong_picture(report: Report, image: int, folder: str, side: int) -> np.ndarray:
    scored, errors = report.scored, report.errors
    pixels = np.ascontiguousarray(read_image(os.path.join(folder, scored.files[image]), "BGR"))
    scale = side / max(pixels.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=how)
    rows = np.flatnonzero((scored.found.image == image) & (errors.kind >= 0) & (scored.found.score >= report.min_score))
    found = Instances(pixels.shape[:2])
    found.pred_boxes = Boxes(torch.tensor(scored.found.box[rows] * scale))
    found.scores = torch.tensor(scored.found.score[rows])
    found.pred_classes = torch.tensor(errors.kind[rows])
    canvas = draw(pixels, found, KINDS, min_score=0.0)
    for row in np.flatnonzero(errors.missed & (scored.truth.image == image)):
        x1, y1, x2, y2 = (int(round(v)) for v in scored.truth.box[row] * scale)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), (255, 255, 255), 2)
        write(canvas, f"missed {scored.class_names[scored.truth.label[row]]}", (x1, y1), (255, 255, 255))
    return canvas


def _square(picture: np.ndarray, side: int) -> np.ndarray:
    square = np.full((side, side, 3), 255, np.uint8)
    square[: picture.shape[0], : picture.shape[1]] = picture[:side, :side]
    return square
