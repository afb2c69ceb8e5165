"""Detections drawn on an image, by OpenCV: a few milliseconds, for whole folders and videos."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.structures import Instances

# Lines have this share of the image's longer side, text that; on large images no more than these pixels, so that what
# is written at small objects does not cover them.
_LINE, _TEXT = 1 / 400, 1 / 55
_MOST_LINE, _MOST_TEXT = 3, 20
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def colour(index: int) -> tuple[int, int, int]:
    """A bright colour in BGR, far from those of the indices next to it (steps of the golden angle)."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.85, 1.0)
    return int(255 * blue), int(255 * green), int(255 * red)


def draw(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str],
    min_score: float = 0.5,
    colours: Sequence[int] | None = None,
    scores: bool = True,
) -> np.ndarray:
    """Draw detections with their class and score in percent.

    Args:
        image: uint8, (H, W, 3), BGR; stays as it is.
        instances: in pixels of the image.
        class_names: by ``pred_classes``.
        min_score: those with a lower score are left out.
        colours: index of each instance's colour; its class if not given.
        scores: whether to write them.

    Returns:
        A copy with boxes, masks and keypoints.
    """
    canvas = np.ascontiguousarray(image).copy()
    longer = max(canvas.shape[:2])
    line = min(max(1, round(longer * _LINE)), _MOST_LINE)
    labels = instances.pred_classes.tolist()
    order = [i for i, score in enumerate(instances.scores.tolist()) if score >= min_score]
    kinds = list(labels if colours is None else colours)
    if instances.has("pred_masks"):
        for i in order:
            mask = instances.pred_masks[i].numpy()
            canvas[mask] = (0.6 * canvas[mask] + 0.4 * np.array(colour(kinds[i]))).astype(np.uint8)
    for i in reversed(order):  # the best on top
        x1, y1, x2, y2 = (round(v) for v in instances.pred_boxes.tensor[i].tolist())
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour(kinds[i]), line, cv2.LINE_AA)
        if instances.has("pred_keypoints"):
            for x, y, _ in instances.pred_keypoints[i].tolist():
                cv2.circle(canvas, (round(x), round(y)), 2 * line, colour(kinds[i]), -1, cv2.LINE_AA)
        text = str(class_names[labels[i]])
        if scores:
            text = f"{text} {100 * float(instances.scores[i]):.0f}"
        write(canvas, text, (x1, y1), colour(kinds[i]))
    return canvas


def write(canvas: np.ndarray, text: str, place: tuple[int, int], background: tuple[int, int, int]) -> None:
    """Write text on a bar of a colour, above ``place`` (x, y) where there is room; changes ``canvas``.

    OpenCV's font has ASCII alone: other characters become "?".
    """
    text = text.encode("ascii", "replace").decode()
    scale = max(0.35, min(max(canvas.shape[:2]) * _TEXT, _MOST_TEXT) / 30)
    thick = max(1, round(scale * 1.2))
    (width, height), below = cv2.getTextSize(text, _FONT, scale, thick)
    tall = height + below + 2
    left = min(max(place[0], 0), max(canvas.shape[1] - width, 0))
    top = place[1] - tall if place[1] >= tall else place[1]
    top = min(max(top, 0), max(canvas.shape[0] - tall, 0))
    cv2.rectangle(canvas, (left, top), (left + width, top + tall), background, -1)
    cv2.putText(canvas, text, (left, top + height + 1), _FONT, scale, (0, 0, 0), thick, cv2.LINE_AA)


def to_bgr(pixels: np.ndarray, image_format: str) -> np.ndarray:
    """An image in the channel order ``INPUT.FORMAT`` as BGR, uint8."""
    if image_format == "BGR":
        return pixels
    if image_format == "RGB":
        return np.ascontiguousarray(pixels[:, :, ::-1])
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_GRAY2BGR)
    from detectron2.data.detection_utils import convert_image_to_rgb

    return np.ascontiguousarray(convert_image_to_rgb(pixels, image_format)[:, :, ::-1]).clip(0, 255).astype(np.uint8)
