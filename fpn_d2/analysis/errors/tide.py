"""The error types of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020).

A detection that is no true positive at IoU ``t_f`` is, the first that applies:

    localisation    right class, IoU from t_b to t_f with the object of that class that it overlaps most
    classification  IoU of t_f or more with an object of another class
    duplicate       IoU of t_f or more with an object of its class that a better detection has matched
    background      IoU of t_b or less with every object
    both            the rest: wrong class and badly placed

and an object that no detection matches, and that no localisation or classification error points at, is missed. What a
type costs is the AP that is gained when all its errors are mended: a classification or localisation error becomes a
true positive (the best one at each object, if nothing has matched it), the other detections go, missed objects do not
count.

All images are worked on at once: everything is an array over the pairs of detection and object that overlap.
"""

from dataclasses import dataclass

import numpy as np

from .detections import Scored

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
TRUE, IGNORED = -1, -2  # no error: a true positive, and what lies in a crowd
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
_RECALLS = np.linspace(0.0, 1.0, 101)
_IMAGES = 4096  # whose pairs are made at a time


@dataclass
class Errors:
    """What is wrong with each detection and object of a data set.

    Attributes:
        kind: (D,) of each detection: one of the six, TRUE or IGNORED (in a crowd; ``ignored`` says so for errors too).
        target: (D,) the object that a detection matches, or that its error points at; -1 for none.
        iou: (D,) with it, or else with the object that it overlaps most.
        ignored: (D,) whether a detection counts for nothing, since it lies in a crowd.
        missed: (G,) whether an object is missed.
        matched: (G,) the detection that matches an object; -1 for none.
        mended: (D,) whether a mended error of this detection makes it a true positive.
    """

    kind: np.ndarray
    target: np.ndarray
    iou: np.ndarray
    ignored: np.ndarray
    missed: np.ndarray
    matched: np.ndarray
    mended: np.ndarray


def find_errors(scored: Scored, t_f: float = 0.5, t_b: float = 0.1) -> Errors:
    """Say of each detection and object what is wrong with it.

    Args:
        scored: the data set; crowds among its ground truth make ignored what lies in them.
        t_f: IoU from which on a detection is right.
        t_b: IoU up to which a detection overlaps nothing.
    """
    found, truth = scored.found, scored.truth
    detection, object_, iou = overlaps(scored, t_b)
    same = found.label[detection] == truth.label[object_]
    matched, target = match(scored, detection[same], object_[same], iou[same], t_f)
    is_true = target >= 0
    ignored = _in_crowd(scored, t_f) & ~is_true

    kind = np.full(len(found), BACKGROUND)
    best_any, any_iou = _best(detection, object_, iou, len(found))
    best_same, same_iou = _best(detection[same], object_[same], iou[same], len(found))
    best_other, other_iou = _best(detection[~same], object_[~same], iou[~same], len(found))
    used = same & (matched[object_] >= 0)
    best_used, used_iou = _best(detection[used], object_[used], iou[used], len(found))
    kind[any_iou > t_b] = BOTH
    points_at = np.full(len(found), -1)
    for one, where, at in (  # the last that applies stays
        (DUPLICATE, used_iou >= t_f, best_used),
        (CLASSIFICATION, other_iou >= t_f, best_other),
        (LOCALISATION, (same_iou >= t_b) & (same_iou <= t_f), best_same),
    ):
        kind[where], points_at[where] = one, at[where]
    kind[is_true] = TRUE
    points_at[is_true] = target[is_true]

    mendable = np.isin(kind, (CLASSIFICATION, LOCALISATION)) & (points_at >= 0)
    mendable[mendable] = matched[points_at[mendable]] < 0
    mended = _first_at_each(points_at, found.score, mendable)
    missed = (matched < 0) & ~truth.crowd
    missed[points_at[mendable]] = False
    kind[(kind != TRUE) & ignored & ~mendable] = IGNORED
    near = np.where(points_at >= 0, points_at, best_any)
    distance = np.where(kind == LOCALISATION, same_iou, np.where(kind == CLASSIFICATION, other_iou, any_iou))
    distance = np.where((kind == TRUE) | (kind == DUPLICATE), same_iou, distance)
    return Errors(kind, near, distance, ignored, missed, matched, mended)


def overlaps(scored: Scored, at_least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of a detection and an object that is no crowd, in one image, with this IoU or more.

    Returns:
        Rows of ``scored.found``, ascending, rows of ``scored.truth``, and the IoU.
    """
    found, truth = scored.found, scored.truth
    rows = np.flatnonzero(~truth.crowd)
    images = truth.image[rows]
    parts: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 2 + (np.empty(0),)]
    bounds = np.searchsorted(found.image, np.arange(0, len(scored.files) + _IMAGES, _IMAGES))
    for start, stop in zip(bounds, bounds[1:], strict=False):
        first = np.searchsorted(images, found.image[start:stop], "left")
        count = np.searchsorted(images, found.image[start:stop], "right") - first
        detection = np.repeat(np.arange(start, stop), count)
        within = np.arange(len(detection)) - np.repeat(np.cumsum(count) - count, count)
        object_ = rows[np.repeat(first, count) + within]
        iou = pair_iou(found.box[detection], truth.box[object_])
        keep = iou >= max(at_least, 1e-12)
        parts.append((detection[keep], object_[keep], iou[keep]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) IoU of (N, 4) boxes with (N, 4) boxes, row by row."""
    sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    common = sides[:, 0] * sides[:, 1]
    areas = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return common / np.maximum(areas - common, 1e-12)


def _best(detection: np.ndarray, object_: np.ndarray, iou: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the object that it overlaps most, the first of equals, and the IoU; -1 and 0 for none."""
    best, most = np.full(count, -1), np.zeros(count)
    order = np.lexsort((object_, -iou, detection))
    rows, first = np.unique(detection[order], return_index=True)
    best[rows], most[rows] = object_[order][first], iou[order][first]
    return best, most


def match(
    scored: Scored, detection: np.ndarray, object_: np.ndarray, iou: np.ndarray, t_f: float
) -> tuple[np.ndarray, np.ndarray]:
    """Detections by descending score take the object of their class that they overlap most, of those not taken.

    One rank after the other: the best detections of all images at once, then the second best.

    Returns:
        The detection of each object and the object of each detection; -1 for none.
    """
    found = scored.found
    matched, target = np.full(len(scored.truth), -1), np.full(len(found), -1)
    near = iou >= t_f
    detection, object_, iou = detection[near], object_[near], iou[near]
    rank = detection - np.searchsorted(found.image, found.image[detection])
    order = np.lexsort((object_, -iou, detection, rank))
    detection, object_, rank = detection[order], object_[order], rank[order]
    bounds = np.searchsorted(rank, np.arange(rank.max(initial=-1) + 2))
    for start, stop in zip(bounds, bounds[1:], strict=False):
        free = matched[object_[start:stop]] < 0
        d, o = detection[start:stop][free], object_[start:stop][free]
        _, first = np.unique(d, return_index=True)
        matched[o[first]], target[d[first]] = d[first], o[first]
    return matched, target


def _in_crowd(scored: Scored, t_f: float) -> np.ndarray:
    """Whether more than a share ``t_f`` of each detection lies in a crowd of its class."""
    found, truth = scored.found, scored.truth
    inside = np.zeros(len(found), bool)
    for row in np.flatnonzero(truth.crowd):
        start, stop = np.searchsorted(found.image, [truth.image[row], truth.image[row] + 1])
        box, crowd = found.box[start:stop], truth.box[row]
        sides = np.clip(np.minimum(box[:, 2:], crowd[2:]) - np.maximum(box[:, :2], crowd[:2]), 0, None)
        share = sides.prod(1) / np.maximum((box[:, 2:] - box[:, :2]).prod(1), 1e-12)
        inside[start:stop] |= (share > t_f) & (found.label[start:stop] == truth.label[row])
    return inside


def _first_at_each(target: np.ndarray, score: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Of the detections ``which``, the one with the best score at each target, the first of equals."""
    rows = np.flatnonzero(which)
    order = np.lexsort((rows, -score[rows], target[rows]))
    _, first = np.unique(target[rows][order], return_index=True)
    result = np.zeros(len(which), bool)
    result[rows[order[first]]] = True
    return result


def average_precision(score: np.ndarray, right: np.ndarray, objects: int) -> float:
    """AP at one IoU: the mean of 101 points of the precision-recall curve, as in COCO, in percent.

    Args:
        score: (D,) of the detections of one class.
        right: (D,) whether each is a true positive.
        objects: number of objects.
    """
    return 100.0 * float(precisions(score, right, objects).mean()) if objects else 0.0


def precisions(score: np.ndarray, right: np.ndarray, objects: int) -> np.ndarray:
    """(101,) best precision at recalls of 0, 0.01, ..., 1 and beyond; 0 where it is not reached."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(right[order])
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(hits / max(objects, 1), _RECALLS)
    return np.append(precision, 0.0)[np.minimum(place, len(precision))]


def mean_ap(scored: Scored, errors: Errors, mend: np.ndarray | None = None, miss: np.ndarray | None = None) -> float:
    """AP at ``t_f``, the mean over classes in percent, after some errors were mended.

    Args:
        scored: the data set.
        errors: of `find_errors`.
        mend: (D,) the detections whose errors are mended; None: none.
        miss: (G,) the missed objects that do not count; None: none.
    """
    found, truth = scored.found, scored.truth
    mend = np.zeros(len(found), bool) if mend is None else mend
    right = errors.kind == TRUE
    gained = mend & errors.mended
    label, renamed = found.label.copy(), gained & (errors.kind == CLASSIFICATION)
    label[renamed] = truth.label[errors.target[renamed]]
    there = (~errors.ignored & ~mend) | right | gained
    counted = ~truth.crowd if miss is None else ~truth.crowd & ~(miss & errors.missed)
    objects = np.bincount(truth.label[counted], minlength=len(scored.class_names))
    values = []
    order = np.argsort(label[there], kind="stable")
    score, good, label = found.score[there][order], (right | gained)[there][order], label[there][order]
    bounds = np.searchsorted(label, np.arange(len(scored.class_names) + 1))
    for one, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if objects[one] or stop > start:
            values.append(average_precision(score[start:stop], good[start:stop], int(objects[one])))
    return float(np.mean(values)) if values else float("nan")


def costs(scored: Scored, errors: Errors, detections: np.ndarray | None = None, objects: np.ndarray | None = None):
    """AP that each type costs: what is gained by mending it alone.

    Args:
        scored: the data set.
        errors: of `find_errors`.
        detections: (D,) mend errors of these detections only, as those of one level.
        objects: (G,) pass over these missed objects only.

    Returns:
        A dictionary from each of KINDS to points of AP.
    """
    base = mean_ap(scored, errors)
    every = np.ones(len(scored.found), bool) if detections is None else detections
    result = {}
    for number, name in enumerate(KINDS[:MISSED]):
        result[name] = max(mean_ap(scored, errors, mend=(errors.kind == number) & every) - base, 0.0)
    every = np.ones(len(scored.truth), bool) if objects is None else objects
    result["missed"] = max(mean_ap(scored, errors, miss=every) - base, 0.0)
    return result
