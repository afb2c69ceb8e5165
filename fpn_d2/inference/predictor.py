"""A trained detector that is called with images.

    image (H, W, 3) -> views: the image, or its tiles -> resized as in the evaluation of the training -> batches of
    views of one size -> model -> Instances in pixels of the image
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from fpn_d2.data.fast_transforms import transform_image
from fpn_d2.data.image_files import file_problem
from fpn_d2.data.image_loading import read_image, to_chw
from fpn_d2.errors import UserError, not_found

from .tiles import Tiling, merge

_ORDERS = ("BGR", "RGB")
# Views of a list of images that wait for others of their size, in bytes of network input.
_WAITING_BYTES = 256 * 2**20


@dataclass
class View:
    """What the network is shown of an image: ``tensor`` (C, h, w) of the part ``frame``, x1 y1 x2 y2 in the image."""

    tensor: Tensor
    frame: tuple[int, int, int, int]


@dataclass
class Prepared:
    """An image that is ready for the network.

    Attributes:
        size: height and width of the image, upright, in pixels.
        views: the image, or its tiles, at the network's size.
        pixels: the image, (H, W, C) in the channel order ``INPUT.FORMAT``.
    """

    size: tuple[int, int]
    views: list[View]
    pixels: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + sum(view.tensor.nbytes for view in self.views)


class Predictor:
    """A model with what it needs to take images as they come.

    Images are resized by ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``, as in the evaluation. Batches are made of
    images that have the same size then: none is padded for another's sake, so that detections do not depend on what
    else is in the list.

    Attributes:
        model: the detector, in evaluation mode.
        cfg: its configuration.
        class_names: name of each class, in the order of ``pred_classes``.
        category_ids: what each class is called in COCO json.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        *,
        class_names: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        batch_size: int = 1,
        min_score: float = 0.0,
        tiling: Tiling | None = None,
    ):
        """
        Args:
            model: a detector built from ``cfg``, with its weights.
            cfg: ``INPUT`` and ``MODEL.DEVICE`` are read, and the threshold of NMS where there are tiles.
            class_names: see the attribute; the numbers of the classes if not given.
            category_ids: see the attribute; 1, 2, ... if not given.
            batch_size: most images, or tiles, in a batch.
            min_score: detections with a lower score are left out.
            tiling: cut images into tiles so; None: show each whole.

        Raises:
            UserError: the model takes its proposals from files, or names and ids differ in number from the classes.
        """
        if cfg.MODEL.LOAD_PROPOSALS:
            raise UserError(
                "this model reads its proposals from files (MODEL.LOAD_PROPOSALS True) and cannot be shown just any "
                "image; take one with an RPN"
            )
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; expected 1 or more")
        self.model = model.eval()
        self.cfg = cfg
        count = number_of_classes(cfg)
        self.class_names = tuple(class_names) or tuple(str(i) for i in range(count))
        self.category_ids = tuple(category_ids) or tuple(range(1, count + 1))
        for what, given in (("names", self.class_names), ("category ids", self.category_ids)):
            if len(given) != count:
                raise UserError(f"the model has {count} classes, but {len(given)} {what} were given: {list(given)[:5]}")
        self.batch_size = batch_size
        self.min_score = min_score
        self.tiling = tiling
        sides = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
        self._resize = T.ResizeShortestEdge(sides, cfg.INPUT.MAX_SIZE_TEST)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def __call__(self, images, *, channels: str | None = None) -> Instances | list[Instances]:
        """Detect objects.

        Args:
            images: one image or a list of them: a path, a PIL image, or an array, uint8 of shape (H, W, 3) or (H, W).
                Files and PIL images are turned upright by their EXIF tag; arrays are taken as they are.
            channels: order of the channels of arrays, "BGR" (as OpenCV reads) or "RGB"; has to be said for arrays of
                shape (H, W, 3).

        Returns:
            For one image its `Instances`, for a list a list of them, on the CPU. ``image_size`` is (H, W) of the
            upright image; ``pred_boxes`` (R, 4) are x1, y1, x2, y2 in its pixels, float32; ``scores`` (R,),
            descending; ``pred_classes`` (R,) int64, indices into ``class_names``; where the model has them
            ``pred_masks`` (R, H, W) bool and ``pred_keypoints`` (R, K, 3) as x, y, score.

        Raises:
            UserError: an image is missing, cannot be read, or is of another kind.

        Example:
            >>> predictor = fpn_d2.load("output/my/model_best.pth")
            >>> instances = predictor("image.jpg")
            >>> instances.pred_boxes.tensor, instances.scores
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray)):
            return self.detect([self.prepare(images, channels=channels)])[0]
        if not isinstance(images, Sequence):
            raise UserError(
                f"got a {type(images).__name__}; expected a path, a PIL image, an array (H, W, 3), or a list of those"
            )
        results, waiting = [], []
        for image in images:
            waiting.append(self.prepare(image, channels=channels))
            if sum(prepared.nbytes for prepared in waiting) > _WAITING_BYTES:
                results += self.detect(waiting)
                waiting = []
        return results + self.detect(waiting)

    def prepare(self, image, *, channels: str | None = None) -> Prepared:
        """Read an image and bring it to the network's size; may be called from several threads.

        Args:
            image: see :meth:`__call__`.
            channels: see :meth:`__call__`.

        Raises:
            UserError: see :meth:`__call__`.
        """
        pixels = self._pixels(image, channels)
        height, width = pixels.shape[:2]
        frames = [(0, 0, width, height)]
        if self.tiling is not None:
            tiles = self.tiling.frames(height, width)
            frames = tiles if len(tiles) == 1 or not self.tiling.whole else [*frames, *tiles]
        views = [self._view(pixels, frame) for frame in frames]
        return Prepared((height, width), views, pixels)

    def _view(self, pixels: np.ndarray, frame: tuple[int, int, int, int]) -> View:
        x1, y1, x2, y2 = frame
        part = pixels[y1:y2, x1:x2]
        return View(to_chw(transform_image(self._resize.get_transform(part), part)), frame)

    def _pixels(self, image, channels: str | None) -> np.ndarray:
        """The image, (H, W, C) in the channel order INPUT.FORMAT."""
        wanted = self.cfg.INPUT.FORMAT
        if isinstance(image, (str, Path)):
            return read(str(image), wanted)
        if isinstance(image, Image.Image):
            return convert_PIL_to_numpy(ImageOps.exif_transpose(image), wanted)
        if not isinstance(image, np.ndarray):
            raise UserError(f"an image is a {type(image).__name__}; expected a path, a PIL image or an array (H, W, 3)")
        grey = image.ndim == 2
        if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] == 3)) or image.size == 0:
            raise UserError(
                f"an image is an array of {image.dtype} and shape {image.shape}; expected uint8, 0 to 255, of shape "
                "(height, width, 3) or (height, width)"
            )
        if grey:
            return convert_PIL_to_numpy(Image.fromarray(image), wanted)
        if channels not in _ORDERS:
            raise UserError(
                f"the channel order of an array is {channels!r}; say channels='BGR' (as OpenCV reads files) or 'RGB'"
            )
        if wanted in _ORDERS:
            return image if channels == wanted else image[:, :, ::-1]
        rgb = image if channels == "RGB" else image[:, :, ::-1]
        return convert_PIL_to_numpy(Image.fromarray(np.ascontiguousarray(rgb)), wanted)

    def detect(self, images: Sequence[Prepared]) -> list[Instances]:
        """Detect objects in images that are prepared, in batches of views of one size; see :meth:`__call__`."""
        views = [(place, view) for place, image in enumerate(images) for view in image.views]
        views.sort(key=lambda pair: pair[1].tensor.shape)  # stable: tiles stay in their order
        found: list[list[tuple[View, Instances]]] = [[] for _ in images]
        start = 0
        while start < len(views):
            shape = views[start][1].tensor.shape
            stop = start + 1
            while stop < min(start + self.batch_size, len(views)) and views[stop][1].tensor.shape == shape:
                stop += 1
            batch = views[start:stop]
            for (place, view), instances in zip(batch, self._run([view for _, view in batch]), strict=True):
                found[place].append((view, instances))
            start = stop
        return [self._whole(image, parts) for image, parts in zip(images, found, strict=True)]

    def _run(self, views: list[View]) -> list[Instances]:
        """Instances in pixels of each view's frame."""
        inputs = []
        for view in views:
            x1, y1, x2, y2 = view.frame
            inputs.append({"image": view.tensor, "height": y2 - y1, "width": x2 - x1})
        with torch.inference_mode():
            outputs = self.model(inputs)
        return [self._instances(output) for output in outputs]

    def _instances(self, output: dict) -> Instances:
        if "instances" in output:
            instances = output["instances"].to("cpu")
        elif "proposals" in output:  # an RPN alone
            proposals = output["proposals"].to("cpu")
            instances = Instances(
                proposals.image_size,
                pred_boxes=proposals.proposal_boxes,
                scores=proposals.objectness_logits.float().sigmoid(),
                pred_classes=torch.zeros(len(proposals), dtype=torch.int64),
            )
        else:
            raise UserError(f"the model gives {sorted(output)} and detects no objects; expected 'instances'")
        # Of a tensor made in inference mode nothing can be changed later on.
        boxes = Boxes(instances.pred_boxes.tensor.float().clone())
        fields = {k: v.clone() if isinstance(v, Tensor) else v for k, v in instances.get_fields().items()}
        instances = Instances(instances.image_size, **{**fields, "pred_boxes": boxes})
        return instances[instances.scores >= self.min_score] if self.min_score > 0 else instances

    def _whole(self, image: Prepared, parts: list[tuple[View, Instances]]) -> Instances:
        """The instances of an image out of those of its views."""
        if len(parts) == 1:
            return parts[0][1]
        height, width = image.size
        kept = []
        for view, instances in parts:
            instances.pred_boxes.tensor += torch.tensor(view.frame[:2] * 2, dtype=torch.float32)
            if view.frame == (0, 0, width, height):  # what a tile sees whole, it sees better
                box = instances.pred_boxes.tensor
                large = (box[:, 2:] - box[:, :2]).amax(1) > self.tiling.seen_whole
                instances = instances[large]
            kept.append((view, instances))
        tiles = torch.cat([torch.full((len(i),), number) for number, (_, i) in enumerate(kept)])
        boxes = torch.cat([i.pred_boxes.tensor for _, i in kept])
        classes = torch.cat([i.pred_classes for _, i in kept])
        merged, scores, groups = merge(
            boxes,
            torch.cat([i.scores for _, i in kept]),
            classes,
            tiles,
            torch.tensor([view.frame for view, _ in kept], dtype=torch.float32),
            image.size,
            nms_threshold(self.cfg),
        )
        first = torch.tensor([group[0] for group in groups], dtype=torch.int64)
        result = Instances(image.size, pred_boxes=Boxes(merged), scores=scores, pred_classes=classes[first])
        rows = [(view, instances, row) for view, instances in kept for row in range(len(instances))]
        if kept[0][1].has("pred_masks"):
            result.pred_masks = _masks(rows, groups, image.size)
        if kept[0][1].has("pred_keypoints"):
            result.pred_keypoints = _keypoints(rows, groups) if groups else kept[0][1].pred_keypoints[:0]
        return result


def _masks(rows: list[tuple[View, Instances, int]], groups: list[list[int]], size: tuple[int, int]) -> Tensor:
    masks = torch.zeros((len(groups), *size), dtype=torch.bool)
    for mask, group in zip(masks, groups, strict=True):
        for member in group:
            view, instances, row = rows[member]
            x1, y1, x2, y2 = view.frame
            mask[y1:y2, x1:x2] |= instances.pred_masks[row]
    return masks


def _keypoints(rows: list[tuple[View, Instances, int]], groups: list[list[int]]) -> Tensor:
    """Of each keypoint of an object in parts, the place with the highest score."""
    results = []
    for group in groups:
        parts = []
        for member in group:
            view, instances, row = rows[member]
            points = instances.pred_keypoints[row].clone()
            points[:, :2] += torch.tensor(view.frame[:2], dtype=points.dtype)
            parts.append(points)
        stacked = torch.stack(parts)
        best = stacked[:, :, 2].argmax(0)
        results.append(stacked[best, torch.arange(stacked.shape[1])])
    return torch.stack(results)


def read(path: str, image_format: str) -> np.ndarray:
    """Read an image file, upright, as (H, W, C) in the channel order ``image_format``.

    Raises:
        UserError: it does not exist, or cannot be read as an image; the text does not repeat the path of a bad file.
    """
    kind, said = file_problem(path) or ("", "") if "://" not in path else ("", "")  # a pipe would block for ever
    if kind == "file_missing":
        raise UserError(f"there is no image {path}: {not_found(path)}")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not an image")
    if kind:
        raise UserError(f"{said}: it cannot be read as an image")
    try:
        return read_image(path, image_format)
    except UnidentifiedImageError:
        raise UserError(f"{path} cannot be read as an image: it is of no kind that is known") from None
    except Exception as error:  # on a broken file the decoders raise almost anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({said})") from error


def number_of_classes(cfg: CfgNode) -> int:
    """How many classes the detector of a configuration tells apart; 1 for an RPN alone."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return 1
    retina = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE or cfg.MODEL.META_ARCHITECTURE == "FCOS"
    return cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES


def nms_threshold(cfg: CfgNode) -> float:
    """IoU above which the detector of a configuration takes two detections for one object."""
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        return cfg.MODEL.RETINANET.NMS_THRESH_TEST
    return cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
