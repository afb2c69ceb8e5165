"""The processes of a study: a training, the proposals of one, or a comparison of times. Each writes one JSON file.

    python -m fpn_d2.analysis.study.worker '{"kind": "train", "config": ..., "opts": [...], "result": ..., ...}'

A process of its own for each gives each its own peak of memory and its own random state.
"""

import argparse
import itertools
import json
import os
import pickle
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.engine import HookBase, default_setup
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage

from fpn_d2.engine import Trainer, load_prepared
from fpn_d2.engine.device import on_this_machine
from fpn_d2.engine.precision import build_inner_trainer
from fpn_d2.evaluation.proposal_recall import average_recall
from fpn_d2.evaluation.size_ap import ap_by_size
from fpn_d2.files import write_atomically

from ..measure.complexity import count_macs, count_parameters
from .kept_maps import KeptMaps

# Images over which multiply-adds are averaged: proposals, and with them the work of the heads, differ by image.
_COUNTED_IMAGES = 8
_WARM_UP_PAIRS = 2


def train(task: dict) -> dict:
    """Train and evaluate one variant with one seed.

    Args:
        task: "config" and "opts" as for `load_prepared`; "annotations": COCO file of the test set; "edges": see
            `ap_by_size`; "recall_at": see `average_recall`; "maps": folder of `KeptMaps`, or None;
            "image_pyramid": whether to test once more on images of the sizes TEST.AUG.MIN_SIZES.

    Returns:
        What was measured: AP in percent, average recall of proposals, AP with the image pyramid, parameters,
        multiply-adds of an image, peak of memory in MB by which the training raised it (of the process, or of the GPU's
        tensors).
    """
    cfg, trainer, own, memory = _trained(task)
    found = ap_by_size(
        task["annotations"], os.path.join(cfg.OUTPUT_DIR, "inference", "coco_instances_results.json"), task["edges"]
    )
    if abs(found["AP50"] - own["AP50"]) > 0.01:
        raise RuntimeError(f"AP50 by size is {found['AP50']}, that of Detectron2's evaluator {own['AP50']}")
    if task["recall_at"]:
        found["recall"] = _recall_of_proposals(cfg, trainer.model, task["recall_at"], task["edges"])
    if task["image_pyramid"]:
        found["AP_image_pyramid"] = Trainer.test_with_TTA(cfg, trainer.model)["bbox_TTA"]["AP"]
    return found | {
        "parameters": count_parameters(trainer.model),
        "macs": _macs_of_an_image(cfg, trainer.model),
        "peak_memory_mb": memory,
        "versions": _versions(cfg),
    }


def propose(task: dict) -> dict:
    """Train one variant with one seed, and write its proposals for both sets, as Detectron2 reads them.

    Args:
        task: as for :func:`train`; "proposals": files by the name of their set.

    Returns:
        AP in percent of the variant itself, and how many proposals an image has on average.
    """
    cfg, trainer, own, _ = _trained(task)
    counts = {}
    for name, file in task["proposals"].items():
        found = list(_proposals(cfg, trainer.model, name))
        content = {
            "ids": [record["image_id"] for record, _, _ in found],
            "boxes": [boxes.numpy() for _, boxes, _ in found],
            "objectness_logits": [logits.numpy() for _, _, logits in found],
            "bbox_mode": BoxMode.XYXY_ABS.value,
        }
        with open(file, "wb") as to:  # whole before the result is there
            pickle.dump(content, to)
        counts[name] = statistics.fmean(len(boxes) for _, boxes, _ in found)
    return {"AP": own["AP"], "proposals": counts, "versions": _versions(cfg)}


def _trained(task: dict) -> tuple[CfgNode, Trainer, dict[str, float], float]:
    """The variant trained: its config, its trainer, the evaluator's figures, and by how many MB memory rose."""
    cfg = on_this_machine(load_prepared(task["config"], task["opts"]))
    cfg.freeze()
    default_setup(cfg, argparse.Namespace(resume=False, eval_only=False))
    before = _memory(cfg, "VmRSS")
    kind = _keeping_maps(task["maps"]) if task["maps"] else Trainer
    trainer = kind(cfg)
    peak = _Peak()
    trainer.register_hooks([peak])
    trainer.resume_or_load(resume=False)
    own = trainer.train()["bbox"]
    if task["maps"]:
        trainer.model.backbone.bottom_up = trainer.model.backbone.bottom_up.bottom_up
    return cfg, trainer, own, peak.value - before


def compare_times(task: dict) -> dict:
    """Time training steps of a variant and of the reference in turn, so that a busy machine slows both alike.

    Args:
        task: "config", "opts" of the variant; "reference_config", "reference_opts"; "pairs": number of pairs of steps.

    Returns:
        Ratio of each pair, variant by reference; their median and quartiles.
    """
    trainers = []
    for prefix in ("", "reference_"):
        cfg = on_this_machine(load_prepared(task[prefix + "config"], task[prefix + "opts"]))
        cfg.freeze()
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        torch.manual_seed(0)
        trainers.append(_with_images_in_memory(Trainer(cfg), task["pairs"] + _WARM_UP_PAIRS))
    ratios = []
    for _ in range(task["pairs"] + _WARM_UP_PAIRS):
        variant, reference = (_seconds_of_a_step(trainer) for trainer in trainers)
        ratios.append(variant / reference)
    ratios = ratios[_WARM_UP_PAIRS:]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratios": ratios, "median": median, "quartiles": [low, high], "versions": _versions(cfg)}


def _with_images_in_memory(trainer: Trainer, steps: int) -> Trainer:
    """Draw the batches of ``steps`` steps now: what reading images takes is the same for every variant."""
    inner = trainer._trainer
    batches = list(itertools.islice(inner.data_loader, steps))
    trainer._trainer = build_inner_trainer(trainer.cfg, inner.model, batches, inner.optimizer)
    return trainer


def _seconds_of_a_step(trainer: Trainer) -> float:
    trainer.iter = trainer.start_iter
    on_gpu = torch.cuda.is_available()
    with EventStorage() as trainer.storage:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.run_step()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _keeping_maps(folder: str) -> type[Trainer]:
    class KeepingTrainer(Trainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
            model = super().build_model(cfg)
            model.backbone.bottom_up = KeptMaps(model.backbone.bottom_up, folder)
            return model

    return KeepingTrainer


def _recall_of_proposals(cfg: CfgNode, model: torch.nn.Module, limits: list[int], edges: list[float]) -> dict:
    """Average recall on the test set of the ``max(limits)`` best proposals of each image."""
    rpn, name = model.proposal_generator, cfg.DATASETS.TEST[0]
    before = rpn.pre_nms_topk, rpn.post_nms_topk
    levels = len(rpn.in_features)
    # As many in all from one level as from five; Detectron2 takes 1000 of each of five.
    rpn.pre_nms_topk = {False: max(before[0][False], 5 * max(limits) // levels), True: before[0][True]}
    rpn.post_nms_topk = {False: max(limits), True: before[1][True]}
    truth = {record["image_id"]: _boxes(record["annotations"]) for record in DatasetCatalog.get(name)}
    proposals, objects = [], []
    try:
        for record, boxes, _ in _proposals(cfg, model, name):
            proposals.append(boxes)
            objects.append(truth[record["image_id"]])
    finally:
        rpn.pre_nms_topk, rpn.post_nms_topk = before
    return average_recall(proposals, objects, limits, edges)


@torch.no_grad()
def _proposals(cfg: CfgNode, model: torch.nn.Module, name: str) -> Iterator[tuple[dict, torch.Tensor, torch.Tensor]]:
    """Each image of a set: its record, the boxes of its proposals in the image's own pixels, and their logits."""
    model.eval()
    for batch in build_detection_test_loader(cfg, name):
        images = model.preprocess_image(batch)
        found, _ = model.proposal_generator(images, model.backbone(images.tensor), None)
        for record, one in zip(batch, found, strict=True):
            scale = record["width"] / one.image_size[1]
            yield record, one.proposal_boxes.tensor.float().cpu() * scale, one.objectness_logits.float().cpu()


def _boxes(annotations: list[dict]) -> torch.Tensor:
    boxes = [BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS) for one in annotations]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


class _Peak(HookBase):
    """The peak of memory in MB up to the last training step; evaluation is left out."""

    value = 0.0

    def after_step(self) -> None:
        self.value = _memory(self.trainer.cfg, "VmHWM")


def _memory(cfg: CfgNode, field: str) -> float:
    """Memory in MB: of the GPU's tensors the peak; of the process what Linux calls ``field``, elsewhere the peak."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory too, which a new process takes over
        return int(re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _macs_of_an_image(cfg: CfgNode, model: torch.nn.Module) -> float:
    model.eval()
    images = list(itertools.islice(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]), _COUNTED_IMAGES))
    with torch.no_grad():
        return count_macs(lambda: [model(image) for image in images]) / len(images)


def _versions(cfg: CfgNode) -> dict[str, str]:
    device = torch.device(cfg.MODEL.DEVICE)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
    }


def main(argv: list[str]) -> None:
    """Do the one task given as JSON and write its result, whole or not at all."""
    task = json.loads(argv[0])
    result = {"train": train, "propose": propose, "time": compare_times}[task["kind"]](task)
    write_atomically(task["result"], json.dumps({"settings": task["settings"], **result}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
