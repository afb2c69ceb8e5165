"""The boxes of an image's annotations as one array; Detectron2's own functions take them one by one."""

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from fvcore.transforms.transform import TransformList

_SMALLEST_SIDE = 1e-5  # pixels; what Detectron2's filter_empty_instances takes for empty


def instances_of_boxes(annotations: list[dict], transforms: TransformList, size: tuple[int, int]) -> Instances | None:
    """Transform boxes and classes; the same bits as ``DatasetMapper`` makes of them without masks and keypoints.

    Args:
        annotations: In Detectron2's format; they stay as they are. Crowds are left out.
        transforms: What was done to the image.
        size: (height, width) after it, to which boxes are clipped. Boxes that are empty then are left out.

    Returns:
        ``Instances`` with ``gt_boxes`` and ``gt_classes``; None if the boxes are of several kinds, or of a rare one.
    """
    objects = [annotation for annotation in annotations if annotation.get("iscrowd", 0) == 0]
    corners = _corners([annotation["bbox"] for annotation in objects], {o["bbox_mode"] for o in objects})
    if corners is None:
        return None
    if objects:
        corners = np.minimum(transforms.apply_box(corners).clip(min=0), [size[1], size[0], size[1], size[0]])
    corners = corners.astype(np.float32)
    kept = (corners[:, 2:] - corners[:, :2] > _SMALLEST_SIDE).all(axis=1)
    classes = np.array([int(annotation["category_id"]) for annotation in objects], np.int64)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.from_numpy(corners[kept]))
    instances.gt_classes = torch.from_numpy(classes[kept])
    return instances


def _corners(boxes: list, modes: set[BoxMode]) -> np.ndarray | None:
    """(N, 4) corners x1 y1 x2 y2 of boxes; None if they do not make one array.

    Detectron2 gives each box a type of its own: of whole numbers it makes integers, which later transforms truncate,
    and what it converts from x, y, width, height passes through torch's default type. So boxes have to be alike here.
    """
    if not boxes:
        return np.zeros((0, 4))
    if not all(type(box) in (list, tuple) and len(box) == 4 for box in boxes) or len(modes) > 1:
        return None
    types = {type(number) for box in boxes for number in box}
    if types not in ({int}, {float}):
        return None
    corners = np.array(boxes)
    if modes == {BoxMode.XYWH_ABS} and torch.get_default_dtype() == torch.float32:
        values = corners.astype(np.float32) if types == {float} else corners
        values[:, 2:] += values[:, :2]
        return values.astype(corners.dtype)
    return corners if modes == {BoxMode.XYXY_ABS} else None
