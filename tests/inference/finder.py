"""A detector that makes no mistakes, on black images with rectangles in pure blue, green and red: classes 0, 1, 2."""

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.inference import Predictor


class Finder(nn.Module):
    """Finds each connected rectangle; its score is the share of its box that it fills. Takes BGR."""

    def __init__(self, masks: bool = False):
        super().__init__()
        self.somewhere = nn.Parameter(torch.zeros(1))
        self.masks = masks
        self.batches: list[list[tuple[int, ...]]] = []

    def forward(self, inputs: list[dict]) -> list[dict]:
        self.batches.append([tuple(one["image"].shape) for one in inputs])
        return [{"instances": detector_postprocess(self._find(one), one["height"], one["width"])} for one in inputs]

    def _find(self, one: dict) -> Instances:
        boxes, scores, labels, masks = [], [], [], []
        for label, channel in enumerate(one["image"].numpy()):
            count, regions, stats, _ = cv2.connectedComponentsWithStats((channel > 127).astype(np.uint8))
            for region, (x, y, width, height, area) in enumerate(stats[1:], start=1):
                boxes.append([x, y, x + width, y + height])
                scores.append(area / (width * height))
                labels.append(label)
                masks.append(regions == region)
        size = tuple(one["image"].shape[1:])
        found = Instances(size, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
        found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(labels, dtype=torch.int64)
        if self.masks:
            # As a mask head gives them: 28 x 28 over the box; all that is in a box here is the object.
            found.pred_masks = torch.ones((len(boxes), 1, 28, 28))
        return found


def finder_cfg(size: int = 64) -> CfgNode:
    """A configuration for it, that shows images at this side."""
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = size, 4 * size
    return cfg


def finder(size: int = 64, masks: bool = False, **options) -> Predictor:
    """A predictor with it."""
    return Predictor(Finder(masks), finder_cfg(size), class_names=("blue", "green", "red"), **options)


def picture(height: int, width: int, *rectangles: tuple[int, int, int, int, int]) -> np.ndarray:
    """A black image, BGR, with rectangles (class, x1, y1, x2, y2)."""
    image = np.zeros((height, width, 3), np.uint8)
    for label, x1, y1, x2, y2 in rectangles:
        image[y1:y2, x1:x2, label] = 255
    return image
