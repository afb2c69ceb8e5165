"""A picture of what the detector finds, beside what is there."""

import os

import cv2
import matplotlib.colors
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_d2.data import TrainingMapper
from fpn_d2.errors import UserError

# One panel, in pixels: (width, height).
_PANEL = (480, 360)
_HEADER = 28
_GAP = 4  # between panels; three times that between pairs
_PAIRS_PER_ROW = 2
_PROPOSALS_SHOWN = 20


def draw_detections(cfg: CfgNode, model: nn.Module, dataset_name: str, path: str) -> None:
    """Save a grid of images with their ground truth on the left and the model's detections on the right.

    Args:
        cfg: The configuration. TEST.PICTURE_IMAGES images, spread evenly over the data set, are shown, with
            detections of at least TEST.PICTURE_SCORE.
        model: The model; it is put into evaluation mode and back.
        dataset_name: A registered data set; one of DATASETS.TEST if the model reads its proposals from files
            (MODEL.LOAD_PROPOSALS).
        path: The picture's file.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    records = _records(cfg, dataset_name)
    count = min(cfg.TEST.PICTURE_IMAGES, len(records))
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, count).round().astype(int)]
    classes = MetadataCatalog.get(dataset_name).get("thing_classes", [])
    mapper = TrainingMapper(cfg, False)
    training = model.training
    model.eval()
    try:
        pairs = []
        for record in chosen:
            with torch.no_grad():
                output = model([mapper(record)])[0]
            image = read_image(record["file_name"], "RGB")
            pairs.append(_pair(cfg, image, record.get("annotations", []), output, classes))
    finally:
        model.train(training)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    picture = _grid(pairs, f"score >= {cfg.TEST.PICTURE_SCORE:g}")
    if not cv2.imwrite(path, picture[:, :, ::-1]):
        raise UserError(f"could not write the picture {os.path.abspath(path)}")


def _records(cfg: CfgNode, dataset_name: str) -> list[dict]:
    """The records of a data set, with proposals where the model wants them, as the evaluation reads them."""
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        proposals = [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(dataset_name)]]
    return get_detection_dataset_dicts(
        dataset_name, filter_empty=False, proposal_files=proposals, check_consistency=False
    )


def _pair(cfg: CfgNode, image: np.ndarray, annotations: list[dict], output: dict, classes: list[str]) -> np.ndarray:
    objects = [a for a in annotations if not a.get("iscrowd", 0)]
    masks = [a.get("segmentation") for a in objects]
    truth = _panel(
        image,
        classes,
        boxes=np.array([BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]),
        labels=[a["category_id"] for a in objects],
        scores=None,
        masks=masks if cfg.MODEL.MASK_ON and all(masks) else None,
    )
    return np.hstack([truth, _white(_PANEL[1], _GAP), _panel(image, classes, **_found(cfg, output))])


def _found(cfg: CfgNode, output: dict) -> dict:
    """Boxes, labels, scores and masks to draw of what the model returned for one image."""
    if "instances" in output:
        instances: Instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= cfg.TEST.PICTURE_SCORE]
        return {
            "boxes": instances.pred_boxes.tensor.numpy(),
            "labels": instances.pred_classes.tolist(),
            "scores": instances.scores.tolist(),
            "masks": list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None,
        }
    proposals = output["proposals"].to("cpu")[:_PROPOSALS_SHOWN] if "proposals" in output else None
    boxes = np.zeros((0, 4)) if proposals is None else proposals.proposal_boxes.tensor.numpy()
    return {"boxes": boxes, "labels": [0] * len(boxes), "scores": None, "masks": None}


def _panel(
    image: np.ndarray,
    classes: list[str],
    boxes: np.ndarray,
    labels: list[int],
    scores: list[float] | None,
    masks: list | None,
) -> np.ndarray:
    """Draw on ``image`` (H, W, 3; RGB) scaled into a panel; boxes are (R, 4), x1 y1 x2 y2, in pixels of the image."""
    scale = min(_PANEL[0] / image.shape[1], _PANEL[1] / image.shape[0])
    canvas = Visualizer(image, scale=scale)
    if len(boxes):
        texts = [classes[c] if c < len(classes) else str(c) for c in labels]
        if scores is not None:
            texts = [f"{text} {100 * score:.0f}" for text, score in zip(texts, scores, strict=True)]
        canvas.overlay_instances(
            boxes=boxes, labels=texts, masks=masks, assigned_colors=[_colour(c) for c in labels], alpha=0.3
        )
    drawn = canvas.get_output().get_image()
    panel = _white(_PANEL[1], _PANEL[0])
    height, width = min(drawn.shape[0], _PANEL[1]), min(drawn.shape[1], _PANEL[0])
    top, left = (_PANEL[1] - height) // 2, (_PANEL[0] - width) // 2
    panel[top : top + height, left : left + width] = drawn[:height, :width]
    return panel


def _colour(label: int) -> tuple[float, float, float]:
    """A bright colour for a class, far from those of the classes next to it (steps of the golden angle)."""
    return tuple(matplotlib.colors.hsv_to_rgb((label * 0.618034 % 1.0, 0.85, 1.0)))


def _white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def _grid(pairs: list[np.ndarray], score: str) -> np.ndarray:
    columns = min(_PAIRS_PER_ROW, len(pairs))
    height, pair_width = pairs[0].shape[:2]
    step = pair_width + 3 * _GAP
    rows = -(-len(pairs) // columns)
    picture = _white(_HEADER + rows * (height + _GAP), columns * step - 3 * _GAP)
    for index, pair in enumerate(pairs):
        top, left = _HEADER + index // columns * (height + _GAP), index % columns * step
        picture[top : top + height, left : left + pair_width] = pair
    for column in range(columns):
        for x, text in ((0, "ground truth"), (_PANEL[0] + _GAP, f"detections, {score}")):
            place = (column * step + x + 6, 20)
            cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return picture
