"""Real images and AP, where the data sets of a configuration are on this machine; else the reason why not."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader

from fpn_d2.engine import Trainer, UserError
from fpn_d2.engine.checks import check_data_files
from fpn_d2.evaluation.results import by_dataset

from ..subjects import Model, add_proposals


def missing_data(cfg: CfgNode) -> str:
    """Why DATASETS.TEST cannot be read here, in one sentence; "" where it can."""
    try:
        check_data_files(cfg, train=False)
    except UserError as error:
        return str(error)
    return ""


def real_images(cfg: CfgNode, number: int) -> list[dict]:
    """The first images of the first of DATASETS.TEST, as the model of ``cfg`` gets them."""
    generator = torch.Generator().manual_seed(0)
    with_one_image = itertools.islice(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]), number)
    images = [item for batch in with_one_image for item in batch]
    for item in images:
        if "proposals" not in item:
            add_proposals(item, generator)
    return images


def measure_ap(model: Model, folder: Path) -> dict:
    """AP of a model on each of its DATASETS.TEST.

    Args:
        model: its ``runner`` is evaluated.
        folder: for what the evaluators write.

    Returns:
        {data set: {task: {metric: percent}}}, None for a metric without anything to measure.
    """
    cfg = model.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder / f"evaluation_{model.label}")
    model.runner.eval()
    results = by_dataset(cfg, Trainer.test(cfg, model.runner))
    return {
        name: {
            task: {metric: None if math.isnan(value) else float(value) for metric, value in metrics.items()}
            for task, metrics in tasks.items()
            if isinstance(metrics, Mapping)
        }
        for name, tasks in results.items()
    }
