"""Detections in the colour of their level, and the maps of a pyramid as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor

from fpn_d2.analysis.level_rule import Rule
from fpn_d2.inference import Predictor
from fpn_d2.inference.drawing import draw, to_bgr, write
from fpn_d2.inference.predictor import Prepared

# Pixels: longer side of a panel, and the bar for its title.
_SIDE, _HEADER = 360, 24


def draw_levels(predictor: Predictor, rule: Rule, paths: Sequence[str], min_score: float = 0.5) -> np.ndarray:
    """Images side by side, each with its detections in the colour of the level that they were pooled from.

    Args:
        predictor: the model.
        rule: its level rule, applied to the boxes of the detections.
        paths: the images.
        min_score: of the detections that are drawn.

    Returns:
        A picture, (H, W, 3), BGR.
    """
    tiles = []
    for path in paths:
        prepared = predictor.prepare(path)
        (instances,) = predictor.detect([prepared])
        levels = rule.assign_in(instances.pred_boxes.tensor.numpy().astype(float), prepared.size)
        image = to_bgr(prepared.pixels, predictor.cfg.INPUT.FORMAT)
        instances.pred_classes = torch.as_tensor(levels)
        names = {level: f"p{level}" for level in rule.levels}
        drawn = draw(_fitted(image, instances), instances, names, min_score, colours=levels.tolist())
        tiles.append(_square(drawn))
    return np.hstack(tiles)


@dataclass
class Map:
    """One map of a pyramid.

    Attributes:
        name: as "p2".
        size: its rows and columns.
        picture: (h, w, 3), BGR, of the part that shows the image, not its padding: the mean of the absolute values
            over the channels, stretched to its own range; dark is its least value.
    """

    name: str
    size: tuple[int, int]
    picture: np.ndarray


def detect_with_maps(predictor: Predictor, prepared: Prepared) -> tuple[Instances, list[Map]]:
    """Detect objects in an image, and keep the maps of its pyramid, high to low resolution.

    Args:
        predictor: a model with a backbone that gives maps.
        prepared: the image; of one in tiles the maps are those of the last batch's first.
    """
    kept: dict[str, Tensor] = {}
    handle = predictor.model.backbone.register_forward_hook(lambda module, args, output: kept.update(output))
    try:
        (instances,) = predictor.detect([prepared])
    finally:
        handle.remove()
    height, width = prepared.views[0].tensor.shape[1:]
    padded = max(features.shape[2] for features in kept.values())
    finest = 2.0 ** round(np.log2(max(height / padded, 1)))
    maps = []
    for name, features in sorted(kept.items()):
        rows, columns = features.shape[2:]
        values = features[0].float().abs().mean(0).cpu().numpy()
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
        stride = finest * padded / rows
        values = values[: max(1, round(height / stride)), : max(1, round(width / stride))]
        picture = cv2.applyColorMap((255 * values).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
        maps.append(Map(name, (rows, columns), picture))
    return instances, maps


def draw_maps(predictor: Predictor, path: str) -> np.ndarray:
    """An image beside the maps of its pyramid, see `Map`.

    Args:
        predictor: a model with a backbone that gives maps.
        path: the image.

    Returns:
        A picture, (H, W, 3), BGR.
    """
    prepared = predictor.prepare(path)
    _, maps = detect_with_maps(predictor, prepared)
    height, width = prepared.views[0].tensor.shape[1:]
    image = to_bgr(prepared.pixels, predictor.cfg.INPUT.FORMAT)
    panels = [_panel(cv2.resize(np.ascontiguousarray(image), (width, height)), f"image {height} x {width}")]
    for one in maps:
        resized = cv2.resize(one.picture, (width, height), interpolation=cv2.INTER_NEAREST)
        panels.append(_panel(resized, f"{one.name} {one.size[0]} x {one.size[1]}"))
    return np.hstack(panels)


def _panel(image: np.ndarray, title: str) -> np.ndarray:
    scale = _SIDE / max(image.shape[:2])
    how = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)
    panel = np.full((image.shape[0] + _HEADER, image.shape[1] + 4, 3), 255, np.uint8)
    panel[_HEADER:, :-4] = image
    write(panel, title, (0, _HEADER), (255, 255, 255))
    return panel


def _fitted(image: np.ndarray, instances) -> np.ndarray:
    """The image with a longer side of _SIDE pixels, the boxes with it."""
    scale = _SIDE / max(image.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    instances.pred_boxes.scale(scale, scale)
    if instances.has("pred_masks"):
        instances.remove("pred_masks")
    if instances.has("pred_keypoints"):
        instances.remove("pred_keypoints")
    return cv2.resize(np.ascontiguousarray(image), None, fx=scale, fy=scale, interpolation=how)


def _square(image: np.ndarray) -> np.ndarray:
    square = np.full((_SIDE, _SIDE + 4, 3), 255, np.uint8)
    square[: image.shape[0], : image.shape[1]] = image[:_SIDE, :_SIDE]
    return square
