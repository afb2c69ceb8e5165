"""COCO's figures of predictions in a file, against an annotation file; no registered data set is needed."""

import contextlib
import io
import json

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_d2.errors import UserError

from .coco import COCOS_LIMIT, fast_evaluation_is_there

_FIGURES = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
}


def evaluate_predictions(
    annotations: str, predictions: str, task: str = "bbox", most: int = COCOS_LIMIT
) -> dict[str, float]:
    """Evaluate COCO json with scores as COCO does.

    Args:
        annotations: COCO annotation file, the truth.
        predictions: list of results, or a data set whose "annotations" have "score"; ids are those of the truth.
        task: "bbox" or "segm".
        most: detections per image that count, the best ones.

    Returns:
        AP, AP50, AP75, APs, APm, APl in percent; nan where there is no object. "AR" is the recall, averaged over
        IoU, of ``most`` detections per image.

    Raises:
        UserError: there are no annotations to evaluate against.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        if not truth.dataset.get("annotations"):
            raise UserError(f"{annotations} has no annotations to evaluate against")
        with open(predictions, encoding="utf-8") as file:
            found = json.load(file)
        found = found["annotations"] if isinstance(found, dict) else found
        if not found:
            return {**dict.fromkeys(_FIGURES[task], 0.0), "AR": 0.0}
        if task == "segm":  # with a box in it the area of a result would be the box's, and so its size class
            found = [{key: value for key, value in one.items() if key != "bbox"} for one in found]
        evaluation = _evaluation(truth, found, task)
        evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
    # precision: IoU, recall, class, area, detections; -1 where there is no object
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]
    ious = np.round(evaluation.params.iouThrs, 2).tolist()
    at50, at75 = ious.index(0.5), ious.index(0.75)
    parts = [precision[..., 0], precision[at50, ..., 0], precision[at75, ..., 0]]
    parts += [precision[..., area] for area in (1, 2, 3)]
    figures = {name: _mean(part) for name, part in zip(_FIGURES[task], parts, strict=True)}
    return {**figures, "AR": _mean(recall[..., 0])}


def _evaluation(truth: COCO, found: list[dict], task: str):
    if not fast_evaluation_is_there():
        return COCOeval(truth, truth.loadRes(found), task)
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    fast = FastCOCO(truth.dataset, use_deepcopy=True)
    return COCOeval_faster(fast, fast.loadRes(found), task, print_function=lambda *_: None)


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return 100.0 * float(there.mean()) if len(there) else float("nan")
