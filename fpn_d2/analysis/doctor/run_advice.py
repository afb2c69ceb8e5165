"""Why a run has the results that it has, out of its ``metrics.json``."""

import json
import math
import os

import numpy as np

from fpn_d2.errors import UserError, not_found

_LEAST = 20  # records of losses before a trend is read from them


def read_metrics(folder: str) -> list[dict]:
    """The records of ``metrics.json`` in a run's folder.

    Raises:
        UserError: there is no such file.
    """
    path = os.path.join(folder, "metrics.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder} is no folder of a run: {not_found(path)}")
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # the last line of a run that was killed
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("iteration"), int)]


def explain_run(folder: str) -> list[str]:
    """What went wrong in a run, each in a sentence or two; empty if nothing is to be seen.

    Args:
        folder: ``OUTPUT_DIR`` of the run.

    Raises:
        UserError: it holds no ``metrics.json``.
    """
    records = read_metrics(folder)
    losses = [(r["iteration"], r["total_loss"], r.get("lr", math.nan)) for r in records if "total_loss" in r]
    return [*_losses(losses), *_figures(records, bool(losses)), *_ending(folder)]


def _losses(losses: list[tuple[int, float, float]]) -> list[str]:
    if not losses:
        return ["the run has no record of a loss: it ended before the first 20 iterations, or only evaluated"]
    values = np.array([loss for _, loss, _ in losses], float)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        iteration, _, rate = losses[bad[0]]
        return [
            f"the loss became {values[bad[0]]} at iteration {iteration}, with a learning rate of {rate:g}: halve "
            "SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or switch on SOLVER.CLIP_GRADIENTS"
        ]
    if len(values) < _LEAST:
        return []
    part = max(len(values) // 5, 3)
    start, least, end = np.median(values[:part]), _smoothed(values, part).min(), np.median(values[-part:])
    if end > 2 * least and end > start:
        where = losses[int(_smoothed(values, part).argmin())][0]
        return [
            f"the loss grew from {least:.3g} about iteration {where} to {end:.3g} at the end: the learning rate, "
            f"{max(rate for _, _, rate in losses):g} at its highest, is too high"
        ]
    middle = np.median(values[2 * part : 3 * part])
    rates = [rate for _, _, rate in losses]
    if end > 0.98 * middle and rates[-1] >= 0.9 * max(rates):
        return [
            f"the loss stopped falling ({middle:.3g} in the middle, {end:.3g} at the end) with the learning rate at "
            "its highest: let it fall (SOLVER.STEPS within SOLVER.MAX_ITER, or WarmupCosineLR)"
        ]
    if end < 0.93 * np.median(values[-2 * part : -part]):
        return [f"the loss was still falling at the end ({end:.3g}): a longer SOLVER.MAX_ITER should give more"]
    return []


def _smoothed(values: np.ndarray, part: int) -> np.ndarray:
    return np.convolve(values, np.ones(part) / part, "valid")


def _figures(records: list[dict], trained: bool) -> list[str]:
    evaluated = [(r.get("iteration", 0), r) for r in records if "bbox/AP" in r]
    if not evaluated:
        return ["the run was never evaluated: name a data set in DATASETS.TEST"] if trained else []
    found = []
    ap = [r["bbox/AP"] for _, r in evaluated]
    last = evaluated[-1][1]
    if not math.isfinite(ap[-1]) or ap[-1] < 0:
        found.append(
            f"AP is {ap[-1]}: the test set has no annotations, or none of a size or class that is asked for; look at "
            "it with fpn-d2 data check"
        )
    elif ap[-1] < 0.1:
        found.append(
            f"AP is {ap[-1]:.2f}: with a loss that fell, classes in another order, boxes in another format or images "
            "at another size than in training are likely; with one that did not, the model has not learnt yet"
        )
    absent = [key.removeprefix("bbox/AP-") for key, v in last.items() if key.startswith("bbox/AP-") and not v >= 0]
    if absent and math.isfinite(ap[-1]):
        found.append(f"AP of {', '.join(absent[:5])} is nan: the test set has no object of these classes")
    best = int(np.nanargmax(ap)) if np.isfinite(ap).any() else 0
    if len(ap) >= 3 and ap[best] > ap[-1] + 1 and best < len(ap) - 1:
        found.append(
            f"AP was {ap[best]:.1f} at iteration {evaluated[best][0]} and {ap[-1]:.1f} at the end: the model learns "
            "the training set by heart; take model_best.pth, and train shorter or with more augmentation"
        )
    return found


def _ending(folder: str) -> list[str]:
    there = os.path.isfile(os.path.join(folder, "model_final.pth"))
    return [] if there else ["there is no model_final.pth: the run did not reach its end; --resume goes on with it"]
