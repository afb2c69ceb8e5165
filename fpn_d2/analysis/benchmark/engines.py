"""Benchmarks beside the engines that people deploy detectors with, on the same weights."""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import parity
from ..engines.processes import time_in_processes
from ..engines.run import ENGINES, deploy, engine_tasks, model_task
from ..subjects import Model, optimized, random_batch
from .detector import CONFIG, Size, build_twins, checks_of, inference_checks
from .line import Timing, line, show_checks

# Ours in each data type, and what it is put beside.
_AGAINST = {
    "float32": ("onnxruntime", "openvino"),
    "bfloat16": ("onnxruntime", "openvino-bfloat16", "openvino-int8"),
}
_NEEDED = {"onnxruntime": ["onnxruntime"], "openvino-int8": ["openvino", "nncf"]}
_SCORED = 100  # proposals that a detector of the benchmark takes for an object


def engines(timing: Timing, *, size: Size, config: str = CONFIG, opts: Sequence[str] = ()) -> list[dict]:
    """One image from pixels to detections, ours optimised for inference, and Detectron2's detector in other engines.

    Each runs in a process of its own, one at a time. The scores are spread so that some hundred boxes go into the
    suppression, as with trained weights; int8 is calibrated on noise.

    Args:
        timing: how often.
        size: (height, width) of the image in pixels.
        config: of the detectors.
        opts: KEY value pairs on top of it.
    """
    stock, own = build_twins(config, opts)
    batch = random_batch(own.cfg, 1, size)
    _spread_scores(stock, batch)
    own.network.load_state_dict(stock.network.state_dict())
    expected = parity.capture(stock.network, batch)
    images = [item["image"] for item in batch]
    missing = _missing()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        there = [name for name in ENGINES if name not in missing]
        deployed = deploy(stock, there, images, folder)
        checks = {
            name: checks_of(found, ENGINES[name][1], deployed.tolerances[name])
            for name, found in deployed.differences.items()
        }
        for dtype in _AGAINST:
            came = parity.capture(optimized(own.network, dtype), batch)
            checks[dtype] = inference_checks(expected, came, dtype)
        for name, found in checks.items():
            if beyond := [check for check in found if not check.within]:
                missing[name] = f"the results of {name} differ: {show_checks(beyond)}"
        tasks = {dtype: model_task(own, [*opts], dtype, size, 1, folder) for dtype in _AGAINST}
        tasks |= engine_tasks(deployed, images, folder)
        tasks = {name: task for name, task in tasks.items() if name not in missing}
        del stock, own
        total, done = (timing.rounds + timing.warmup) * len(tasks), 0

        def after_call() -> None:
            nonlocal done
            done += 1
            timing.progress(done, total)

        samples, detections = time_in_processes(tasks, timing.rounds, timing.warmup, folder, after_call)
    return [
        _line(dtype, name, samples, checks, detections, missing) for dtype, names in _AGAINST.items() for name in names
    ]


def _line(dtype: str, engine: str, samples: dict, checks: dict, detections: dict, missing: dict[str, str]) -> dict:
    name = f"optimised, {dtype}"
    if reasons := [missing[one] for one in (dtype, engine) if one in missing]:
        return {"ours": name, "against": engine, "not_measured": "; ".join(reasons)}
    note = f"{detections[dtype]} and {detections[engine]} detections; differences of {engine}"
    return line(name, samples[engine], samples[dtype], "s", checks[engine], note, engine)


def _missing() -> dict[str, str]:
    """Why an engine cannot be measured here, by its name."""
    found = {}
    for name in ENGINES:
        for package in _NEEDED.get(name, ["openvino"]):
            if importlib.util.find_spec(package) is None:
                found.setdefault(name, f"{package} is not installed (pip install {package})")
    return found


@torch.no_grad()
def _spread_scores(model: Model, batch: list[dict]) -> None:
    """Scale the scores of random weights so that so many proposals get one above the threshold."""
    predictor = model.network.roi_heads.box_predictor
    seen = []
    handle = predictor.cls_score.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model.network(batch)
    finally:
        handle.remove()
    logits = seen[0] - seen[0].mean(dim=0)
    threshold = predictor.test_score_thresh
    for scale in 2.0 ** torch.arange(16):
        highest = (logits * scale).softmax(dim=1)[:, :-1].amax(dim=1)
        if (highest > threshold).sum() >= min(_SCORED, len(highest)):
            break
    predictor.cls_score.weight.mul_(scale)
    predictor.cls_score.bias.copy_(-seen[0].mean(dim=0) * scale + predictor.cls_score.bias * scale)
