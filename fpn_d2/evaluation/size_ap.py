"""Average precision by object size, with size ranges of one's own."""

import contextlib
import io
import json
import math
import os
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_d2.errors import UserError


def range_names(edges: Sequence[float]) -> list[str]:
    """Names of the ranges that ``edges`` part, e.g. ["<16", "16-32", ">=32"] for (16, 32)."""
    middle = [f"{low:g}-{high:g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return [f"<{edges[0]:g}", *middle, f">={edges[-1]:g}"]


def ap_by_size(annotation_file: str | os.PathLike, detection_file: str | os.PathLike, edges: Sequence[float]) -> dict:
    """Evaluate box detections as COCO does, but with other size ranges than its 32 and 96 pixels.

    The size of an object is the side of the square with the area of its box, in pixels of the image; COCO takes the
    area of the mask. COCO's rules hold otherwise: a detection outside a range that matches nothing in it is ignored.

    Args:
        annotation_file: COCO-format annotations.
        detection_file: detections as Detectron2's ``COCOEvaluator`` writes them (coco_instances_results.json).
        edges: sizes in pixels at which one range ends and the next begins, ascending.

    Returns:
        {"AP": ..., "AP50": ..., "sizes": {range name: AP}}, in percent; nan for a range without objects.

    Raises:
        UserError: the edges are not positive and ascending.
    """
    edges = [float(edge) for edge in edges]
    if not edges or edges[0] <= 0 or edges != sorted(set(edges)):
        raise UserError(f"edges are {edges}; expected at least one size in pixels, positive and ascending")
    with open(detection_file) as file:
        detections = json.load(file)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        truth = COCO(os.fspath(annotation_file))
        for annotation in truth.dataset["annotations"]:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        evaluation = COCOeval(truth, truth.loadRes(detections) if detections else COCO(), "bbox")
        parameters = evaluation.params
        parameters.imgIds = sorted(truth.getImgIds())
        parameters.catIds = sorted(truth.getCatIds())
        bounds = [0.0, *(edge**2 for edge in edges), 1e10]
        # COCOeval includes both ends of a range; an area on an edge belongs to the upper one.
        parameters.areaRng = [[0.0, 1e10], *([low, high - 1e-6] for low, high in zip(bounds, bounds[1:], strict=False))]
        parameters.areaRngLbl = ["all", *range_names(edges)]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # IoU threshold x recall x class x range, most detections
    sizes = {name: _mean(precision[..., i]) for i, name in enumerate(parameters.areaRngLbl) if i > 0}
    return {"AP": _mean(precision[..., 0]), "AP50": _mean(precision[:1, ..., 0]), "sizes": sizes}


def _mean(precision: np.ndarray) -> float:
    """Mean in percent over what COCO could measure; it marks the rest with -1."""
    measured = precision[precision > -1]
    return 100 * float(measured.mean()) if measured.size else math.nan
