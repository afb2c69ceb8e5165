"""Whether a model fits the boxes of a set: boxes without an anchor, more objects than detections, or than memory."""

import os
import re

import numpy as np
import torch
from detectron2.config import CfgNode

from .coco_check import CocoCheck

_BYTES_OF_A_PAIR = 24  # Detectron2's pairwise_iou has at once, for an object and an anchor (measured on v0.6)
_AT_ONCE = 50_000  # boxes that are compared with all anchors in one go
_WITH_ANCHORS = {
    "GeneralizedRCNN": "RPN",
    "ProposalNetwork": "RPN",
    "PanopticFPN": "RPN",
    "RetinaNet": "RETINANET",
    "FPNRetinaNet": "RETINANET",
}


def misfits(cfg: CfgNode, name: str, found: CocoCheck) -> list[str]:
    """What to warn of for the data set ``name`` that has been checked; empty texts among it."""
    unmatched = unmatched_boxes(cfg, found.extents) if name in cfg.DATASETS.TRAIN else ""
    return [unmatched, crowded_images(cfg, found.objects)]


def most_objects(cfg: CfgNode) -> int:
    """How many objects an image to train on may have (DATASETS.MAX_OBJECTS_PER_IMAGE); 0: any number.

    Objects are matched with the anchors of the largest training image, and in RoI heads with the proposals, which the
    objects themselves are among.
    """
    chosen = cfg.DATASETS.MAX_OBJECTS_PER_IMAGE
    section = _WITH_ANCHORS.get(cfg.MODEL.META_ARCHITECTURE)
    if chosen or section is None:
        return max(0, chosen)
    pairs = _memory(cfg) / 2 / _BYTES_OF_A_PAIR
    return int(min(pairs / max(1, number_of_anchors(cfg, section)), pairs**0.5))


def number_of_anchors(cfg: CfgNode, section: str) -> int:
    """Anchors of a training image of the largest size; ``section`` is RPN or RETINANET. 0: not known."""
    features = cfg.MODEL[section].IN_FEATURES
    levels = [re.fullmatch(r"p(\d)|res(\d)", name) for name in features]
    if not all(levels):
        return 0
    short, long = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    sizes, ratios = (
        lists * len(features) if len(lists) == 1 else lists
        for lists in (cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS)
    )
    cells = [-(-short // 2**k) * -(-long // 2**k) for k in (int(level[1] or level[2]) for level in levels)]
    return sum(n * len(s) * len(r) for n, s, r in zip(cells, sizes, ratios, strict=False))


def _memory(cfg: CfgNode) -> int:
    """Bytes of memory of the device that trains."""
    if torch.cuda.is_available() and torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def unmatched_boxes(cfg: CfgNode, extents: np.ndarray) -> str:
    """What to say of boxes that no anchor overlaps enough, at any size that the images are resized to for training.

    Compared are shapes, as if an anchor lay in the middle of each box: the real overlap is smaller.

    Args:
        cfg: Anchors, their IoU_THRESHOLDS, and the sizes of INPUT are read.
        extents: (N, 4): width and height of each box and of its image, in pixels of the file.

    Returns:
        A sentence; empty if all can be matched, or where the model has other anchors or none.
    """
    section = _WITH_ANCHORS.get(cfg.MODEL.META_ARCHITECTURE)
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    precomputed = section == "RPN" and cfg.MODEL.PROPOSAL_GENERATOR.NAME not in ("RPN", "FPNRPN")
    if section is None or precomputed or anchors.NAME != "DefaultAnchorGenerator" or not len(extents):
        return ""
    threshold = cfg.MODEL[section].IOU_THRESHOLDS[0]
    shapes = _anchor_shapes(anchors.SIZES, anchors.ASPECT_RATIOS)
    parts = [extents[i : i + _AT_ONCE] for i in range(0, len(extents), _AT_ONCE)]
    bad = np.concatenate([_best_overlap(cfg, part, shapes) < threshold for part in parts])
    if not bad.any():
        return ""
    sides = np.sqrt(extents[bad, 0] * extents[bad, 1])
    smallest, largest = np.min(anchors.SIZES[0]), np.max(anchors.SIZES[-1])
    return (
        f"{bad.sum()} of {len(bad)} boxes ({100 * bad.mean():.1f} %) overlap no anchor by {threshold} or more after "
        f"resizing (square roots of their areas from {sides.min():.3g} to {sides.max():.3g} pixels of the file); the "
        f"anchors of MODEL.ANCHOR_GENERATOR.SIZES go from {smallest:g} to {largest:g} pixels of the resized image"
    )


def _anchor_shapes(sizes: list, ratios: list) -> np.ndarray:
    """(A, 2): width and height of each anchor."""
    ratios = ratios * len(sizes) if len(ratios) == 1 else ratios
    pairs = [(size, ratio) for s, r in zip(sizes, ratios, strict=False) for size in s for ratio in r]
    return np.array([(size / ratio**0.5, size * ratio**0.5) for size, ratio in pairs])


def _best_overlap(cfg: CfgNode, extents: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """(N,): the largest IoU of each box with an anchor, over the sizes of INPUT."""
    boxes, images = extents[:, :2].astype(float), extents[:, 2:]
    best = np.zeros(len(boxes))
    for size in cfg.INPUT.MIN_SIZE_TRAIN:
        scale = size / images.min(axis=1) if size else np.ones(len(boxes))
        scale = np.minimum(scale, cfg.INPUT.MAX_SIZE_TRAIN / images.max(axis=1)) if size else scale
        scaled = boxes * scale[:, None]
        shared = np.minimum(scaled[:, None], shapes[None]).prod(axis=2)
        union = scaled.prod(axis=1)[:, None] + shapes.prod(axis=1)[None] - shared
        best = np.maximum(best, (shared / union).max(axis=1))
    return best


def crowded_images(cfg: CfgNode, objects: list[int]) -> str:
    """What to say of images with more objects than a model may detect; ``objects`` are the numbers of them."""
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    many = sum(number > limit for number in objects) if limit >= 0 else 0
    if not many:
        return ""
    return (
        f"{many} of {len(objects)} images have more than TEST.DETECTIONS_PER_IMAGE {limit} objects, up to "
        f"{max(objects)}: what is beyond cannot be found"
    )
