"""Training images made of several: mosaic, and objects pasted with the rectangle of their box.

Both come before all other augmentation, in pixels of the files. A picture is an image (height, width, channels) and
its annotations in Detectron2's format, whose boxes are corners x1, y1, x2, y2. Boxes alone are mixed: masks and
keypoints would not fit any more. Random numbers are NumPy's, which the loader seeds for each place in its order.
"""

from collections.abc import Callable

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from fpn_d2.errors import UserError

Picture = tuple[np.ndarray, list[dict]]

_GREY = 128  # where there is no image, as Detectron2 pads
_LEAST_VISIBLE = 0.25  # share of a box's area: with less, nobody would call it an object
_PASTED = 0.5  # share of the objects of an image that are pasted
_SCALES = (0.5, 1.0)  # of a mosaic's images
_PASTED_SCALES = (0.75, 1.25)


class Mosaic:
    """Four images round a point, one in each corner, with a probability (Bochkovskiy et al., 2020, section 3.3).

    The canvas has the size of the first image. All four are brought to it and then to a common share of it, from half
    to the whole; each touches the point with one corner and is cut where its quarter ends. What they leave is grey.
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, picture: Picture, draw: Callable[[], Picture]) -> Picture:
        """``draw`` gives another picture."""
        if np.random.uniform() >= self.probability:
            return picture
        pictures = [picture, draw(), draw(), draw()]
        height, width = picture[0].shape[:2]
        centre = round(np.random.uniform(0.25, 0.75) * height), round(np.random.uniform(0.25, 0.75) * width)
        order = np.random.permutation(4)
        return mosaic([pictures[k] for k in order], (height, width), centre, np.random.uniform(*_SCALES))


def mosaic(pictures: list[Picture], size: tuple[int, int], centre: tuple[int, int], scale: float) -> Picture:
    """The four ``pictures`` in reading order on a canvas of ``size`` (height, width), round ``centre`` (y, x).

    Args:
        pictures: top left, top right, bottom left, bottom right.
        size: of the canvas, in pixels.
        centre: the point where they meet.
        scale: of each, as a share of what would just fit into the canvas.
    """
    canvas = np.full((*size, *pictures[0][0].shape[2:]), _GREY, pictures[0][0].dtype)
    found = []
    for k, (image, annotations) in enumerate(pictures):
        below, right = divmod(k, 2)
        height, width = image.shape[:2]
        factor = scale * min(size[0] / height, size[1] / width)
        image = _resized(image, max(1, round(height * factor)), max(1, round(width * factor)))
        top = centre[0] - (0 if below else image.shape[0])
        left = centre[1] - (0 if right else image.shape[1])
        y1, y2 = (centre[0], min(size[0], top + image.shape[0])) if below else (max(0, top), centre[0])
        x1, x2 = (centre[1], min(size[1], left + image.shape[1])) if right else (max(0, left), centre[1])
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        ratios = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
        for annotation in annotations:
            box = np.array(annotation["bbox"], float) * ratios + [left, top, left, top]
            cut = np.clip(box, [x1, y1, x1, y1], [x2, y2, x2, y2])
            if _area(cut) >= _LEAST_VISIBLE * _area(box) > 0:
                found.append({**annotation, "bbox": cut.tolist()})
    return canvas, found


class CopyPaste:
    """Objects of another image, pasted with the rectangle of their box, with a probability.

    As Dwibedi et al. (ICCV 2017) and Ghiasi et al. (CVPR 2021) paste objects by their masks. About half of the objects
    of the other image come, each at a random place and at 0.75 to 1.25 times its size. An object whose box is hidden
    for more than three quarters by one of them is none any more.
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, picture: Picture, draw: Callable[[], Picture]) -> Picture:
        """``draw`` gives another picture."""
        if np.random.uniform() >= self.probability:
            return picture
        image, annotations = draw()
        pasted = []
        height, width = picture[0].shape[:2]
        for annotation in annotations:
            taken, scale, *where = np.random.uniform([0, _PASTED_SCALES[0], 0, 0], [1, _PASTED_SCALES[1], 1, 1])
            x1, y1, x2, y2 = np.clip(np.round(annotation["bbox"]).astype(int), 0, [*image.shape[1::-1]] * 2)
            if taken >= _PASTED or annotation.get("iscrowd", 0) or x2 <= x1 or y2 <= y1:
                continue
            scale = min(scale, height / (y2 - y1), width / (x2 - x1))
            patch = _resized(image[y1:y2, x1:x2], max(1, int((y2 - y1) * scale)), max(1, int((x2 - x1) * scale)))
            top, left = (int(w * (a - b + 1)) for w, a, b in zip(where, (height, width), patch.shape, strict=False))
            pasted.append((patch, top, left, annotation))
        return paste(picture, pasted)


def paste(picture: Picture, pasted: list[tuple[np.ndarray, int, int, dict]]) -> Picture:
    """Put each patch with its annotation on a copy of ``picture``, one over the other.

    Args:
        picture: stays as it is.
        pasted: (patch, row of its top, column of its left, annotation, whose box is replaced).
    """
    image, annotations = picture[0].copy(), list(picture[1])
    for patch, top, left, annotation in pasted:
        x1, y1, x2, y2 = box = left, top, left + patch.shape[1], top + patch.shape[0]
        image[y1:y2, x1:x2] = patch
        annotations = [a for a in annotations if _visible(a["bbox"], box) >= _LEAST_VISIBLE]
        annotations.append({**annotation, "bbox": [float(x) for x in box]})
    return image, annotations


def _visible(box: list, over: tuple[int, int, int, int]) -> float:
    """Share of ``box`` that is not under ``over``; of a box without area all."""
    box = np.array(box, float)
    hidden = np.clip(box, np.tile(over[:2], 2), np.tile(over[2:], 2))
    return 1 - _area(hidden) / _area(box) if _area(box) > 0 else 1.0


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0]
    # A copy: OpenCV takes a view of BGR for RGB.
    resized = cv2.resize(
        np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized.reshape(height, width, *image.shape[2:])


def boxes_alone(record: dict) -> list[dict]:
    """The annotations of a record, their boxes as corners, without anything that mixing would make wrong.

    Raises:
        UserError: the record has boxes or labels of another kind.
    """
    if "sem_seg_file_name" in record or "proposal_boxes" in record:
        raise UserError("INPUT.MOSAIC and COPY_PASTE are for boxes, not labelled pixels or proposals: set them to 0")
    found = []
    for annotation in record.get("annotations", ()):
        if annotation["bbox_mode"] not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            raise UserError("INPUT.MOSAIC and COPY_PASTE are for upright boxes in pixels: set them to 0")
        box = BoxMode.convert([float(x) for x in annotation["bbox"]], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        kept = {key: annotation[key] for key in ("category_id", "iscrowd") if key in annotation}
        found.append({**kept, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS})
    return found


def mixers(cfg: CfgNode) -> list[Mosaic | CopyPaste]:
    """What INPUT.MOSAIC and INPUT.COPY_PASTE ask for, in the order in which it is applied.

    Raises:
        UserError: a probability is none, or the model learns more than boxes.
    """
    found = []
    for key, mixer in (("MOSAIC", Mosaic), ("COPY_PASTE", CopyPaste)):
        probability = cfg.INPUT[key]
        if not 0 <= probability <= 1:
            raise UserError(f"INPUT.{key} is {probability}; expected a probability, from 0 to 1")
        if not probability:
            continue
        for other in ("MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"):
            if cfg.MODEL[other]:
                raise UserError(f"INPUT.{key} mixes boxes alone and does not go with MODEL.{other}: set it to 0")
        found.append(mixer(probability))
    return found
