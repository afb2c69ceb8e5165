"""From a record of a data set to the model's input: Detectron2's mapper, sooner, with more augmentations."""

import copy
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image as read_labels
from detectron2.data.detection_utils import transform_proposals
from fvcore.transforms.transform import BlendTransform, Transform, TransformList
from torch.utils.data import get_worker_info

from fpn_d2.errors import UserError, shown
from fpn_d2.fast.apply import numerics

from .bad_images import BadImage, BadImages
from .box_annotations import instances_of_boxes
from .fast_transforms import FastAugInput, enlarges_to_the_bit
from .image_files import file_problem
from .image_loading import read_image, to_chw
from .mixing import Picture, boxes_alone, mixers

# Weights of red, green and blue in the luma of ITU-R BT.601, as Pillow and Detectron2 take them.
_LUMA = {"R": 0.299, "G": 0.587, "B": 0.114}
# Ratio of an image's sides from which on a failure to resize is the image's fault.
_FLAT = 100


class ColorJitter(T.Augmentation):
    """Change brightness, contrast and saturation, each by a factor drawn from [1 - strength, 1 + strength].

    Detectron2's RandomBrightness and RandomContrast do the first two. Its RandomSaturation takes images for RGB, while
    its models are fed with BGR by default; this one knows the order. Images with another number of channels than
    three keep their saturation.

    Args:
        strength: Largest relative change, in [0, 1).
        image_format: ``INPUT.FORMAT``; an image whose format is not "RGB" or "BGR" keeps its saturation.
    """

    def __init__(self, strength: float, image_format: str):
        super().__init__()
        if not 0.0 <= strength < 1.0:
            raise UserError(f"Expected INPUT.COLOR_JITTER to be at least 0 and less than 1, got {strength}.")
        self.strength = strength
        self.image_format = image_format
        self._first = [
            T.RandomBrightness(1.0 - strength, 1.0 + strength),
            T.RandomContrast(1.0 - strength, 1.0 + strength),
        ]

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for one image of shape (height, width, channels)."""
        transforms = []
        for augmentation in self._first:  # one after the other: contrast is about the mean of the brightened image
            transforms.append(augmentation.get_transform(image))
            image = transforms[-1].apply_image(image)
        if image.ndim == 3 and image.shape[2] == 3 and self.image_format in ("RGB", "BGR"):
            factor = np.random.uniform(1.0 - self.strength, 1.0 + self.strength)
            luma = np.array([_LUMA[channel] for channel in self.image_format], np.float32)
            grey = image.dot(luma)[:, :, None]
            transforms.append(BlendTransform(src_image=grey, src_weight=1.0 - factor, dst_weight=factor))
        return TransformList(transforms)


def scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Detectron2's two augmentations of large-scale jitter (Ghiasi et al., CVPR 2021), as INPUT.SCALE_JITTER asks.

    Raises:
        UserError: The keys are out of range.
    """
    scales, side = list(cfg.INPUT.SCALE_JITTER), cfg.INPUT.SCALE_JITTER_SIZE or max(cfg.INPUT.MIN_SIZE_TRAIN)
    numbers = all(isinstance(scale, int | float) for scale in scales)
    if len(scales) != 2 or not numbers or not 0 < scales[0] <= scales[1] < float("inf"):
        raise UserError(f"INPUT.SCALE_JITTER is {scales}; expected the lowest and the highest scale, as [0.1, 2.0]")
    if side <= 0:
        raise UserError(f"INPUT.SCALE_JITTER_SIZE is {side}; expected a number of pixels, or 0")
    return [T.ResizeScale(*scales, side, side), T.FixedSizeCrop((side, side))]


class TrainingMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, sooner, with ``VERTICAL_FLIP`` and the keys after it in ``INPUT``.

    With all of them off it gives just what Detectron2's own gives, to the bit and from the same random numbers, with
    one exception: without a compiler, and unless ``exact``, images to train on that are enlarged come out within one
    grey level of it. (An augmentation after that which raises the contrast, as the colour jitter may, raises the
    difference too.) Beyond, the file is believed over the record: an image has the size that its file has, and one that
    cannot be read is left out with a warning; see `BadImages`.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, exact: bool = False, max_bad_images: int = 0, mixing: Sequence[Callable] = (), **kwargs
    ):
        """
        Args:
            is_train: Whether to augment, and to give ``instances``.
            exact: Whether to run Detectron2's own operations and nothing else.
            max_bad_images: How many images may be left out because their files cannot be used.
            mixing: What makes one picture of several; see `mixing`. It draws from ``others``.
            **kwargs: The other arguments of ``DatasetMapper``.
        """
        super().__init__(is_train, **kwargs)
        self.exact = exact
        self.bad_images = BadImages(max_bad_images)
        self.mixing = tuple(mixing)
        self.others: Sequence[dict] = ()  # records to draw other pictures from, if there are any; the loader knows them
        if not exact:
            enlarges_to_the_bit()  # is built here, not in each worker of a data loader

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Arguments of this class from a configuration.

        Raises:
            UserError: If ``INPUT.COLOR_JITTER`` is out of range, or ``INPUT.VERTICAL_FLIP`` is on with keypoints:
                which of them are left and right would be wrong in the mirrored image; or if ``MODEL.NUMERICS`` is
                unknown.
        """
        mixing = mixers(cfg) if is_train else ()
        arguments = super().from_config(cfg, is_train)
        arguments["mixing"] = mixing
        arguments["exact"] = numerics(cfg) == "exact"
        arguments["max_bad_images"] = cfg.DATASETS.MAX_BAD_IMAGES
        if is_train and cfg.INPUT.SCALE_JITTER:
            resizing = next(
                k for k, one in enumerate(arguments["augmentations"]) if isinstance(one, T.ResizeShortestEdge)
            )
            arguments["augmentations"][resizing : resizing + 1] = scale_jitter(cfg)
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON  # as Detectron2 has it for what it crops
        if is_train and cfg.INPUT.VERTICAL_FLIP:
            if cfg.MODEL.KEYPOINT_ON:
                raise UserError("INPUT.VERTICAL_FLIP does not go with MODEL.KEYPOINT_ON; set one of them to False.")
            arguments["augmentations"].append(T.RandomFlip(horizontal=False, vertical=True))
        if is_train and cfg.INPUT.COLOR_JITTER != 0:
            arguments["augmentations"].append(ColorJitter(cfg.INPUT.COLOR_JITTER, cfg.INPUT.FORMAT))
        return arguments

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map one record of Detectron2's standard format to the model's input.

        Returns:
            The input; for an image that cannot be used, up to DATASETS.MAX_BAD_IMAGES of them, None in training (the
            loader takes another one), and a black image marked ``unreadable`` otherwise (the evaluation leaves it
            out).

        Raises:
            UserError: Too many images cannot be used. The text says why this one cannot.
        """
        try:
            image = self._read(dataset_dict)
        except BadImage as bad:
            self.bad_images.add(dataset_dict, bad)
            return None if self.is_train else self._blank(dataset_dict, str(bad))
        if self.mixing and self.others:
            dataset_dict, image = self._mix(dataset_dict, image)
        try:
            return self._map(dataset_dict, image)
        except ValueError as error:
            flat = max(image.shape[:2]) >= _FLAT * min(image.shape[:2])
            if not flat:
                raise
            text = f"{image.shape[1]} x {image.shape[0]} pixels are too flat for the sizes in INPUT ({error})"
            self.bad_images.add(dataset_dict, BadImage(text))
            return None if self.is_train else self._blank(dataset_dict, text)

    def _read(self, dataset_dict: dict) -> np.ndarray:
        """The image, upright, as (height, width, channels).

        Raises:
            BadImage: It cannot be used. The text is the reason.
        """
        name = dataset_dict["file_name"]
        problem = file_problem(name) if "://" not in name else None  # a pipe would block for ever
        if problem:
            raise BadImage(problem[1])
        try:
            image = read_image(name, self.image_format, by_pillow=self.exact)
        except Exception as error:  # Pillow raises almost anything on what is broken
            raise BadImage(f"it cannot be read as an image: {shown(str(error), 200)}") from error
        height, width = image.shape[:2]
        recorded = (dataset_dict.get("width", width), dataset_dict.get("height", height))
        if recorded == (width, height):
            return image
        if recorded == (height, width) and dataset_dict.get("annotations"):
            raise BadImage(
                f"it is {width} x {height}, and recorded as {height} x {width}: its boxes may be meant either way"
            )
        self.bad_images.warn(
            dataset_dict, f"it is {width} x {height}, not {recorded[0]} x {recorded[1]} as recorded: that is used"
        )
        return image

    def _mix(self, dataset_dict: dict, image: np.ndarray) -> tuple[dict, np.ndarray]:
        picture = image, boxes_alone(dataset_dict)
        for mix in self.mixing:
            picture = mix(picture, self._draw)
        return {**dataset_dict, "annotations": picture[1]}, picture[0]

    def _draw(self) -> Picture:
        """Another picture, by NumPy's random numbers."""
        while True:  # until too many are bad
            record = self.others[np.random.randint(len(self.others))]
            try:
                return self._read(record), boxes_alone(record)
            except BadImage as bad:
                self.bad_images.add(record, bad)

    def _map(self, dataset_dict: dict, image: np.ndarray) -> dict:
        """What ``DatasetMapper.__call__`` does, by the faster functions unless ``exact``."""
        if get_worker_info() is not None:
            cv2.setNumThreads(0)  # the workers share the cores; and OpenCV's threads do not live through a fork
        # The annotations, by far the largest part, are copied only where something writes into them.
        record = {key: copy.deepcopy(value) for key, value in dataset_dict.items() if key != "annotations"}
        record["height"], record["width"] = image.shape[:2]
        stuff_file = record.pop("sem_seg_file_name", None)
        stuff = None if stuff_file is None else read_labels(stuff_file, "L").squeeze(2)

        # What is evaluated on has Detectron2's bits: detections are to be the same.
        fast = not self.exact and (self.is_train or enlarges_to_the_bit())
        seen = (FastAugInput if fast else T.AugInput)(image, sem_seg=stuff)
        transforms = self.augmentations(seen)
        size = seen.image.shape[:2]
        record["image"] = to_chw(seen.image)
        if seen.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(seen.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            transform_proposals(record, size, transforms, proposal_topk=self.proposal_topk)
        if self.is_train and "annotations" in dataset_dict:
            self._add_instances(record, dataset_dict["annotations"], transforms, size)
        return record

    def _blank(self, dataset_dict: dict, why: str) -> dict:
        size = (dataset_dict.get("height", 32), dataset_dict.get("width", 32))
        channels = 1 if self.image_format == "L" else 3
        record = {key: value for key, value in dataset_dict.items() if key not in ("annotations", "sem_seg_file_name")}
        return {**record, "image": torch.zeros(channels, *size, dtype=torch.uint8), "unreadable": why}

    def _add_instances(self, record: dict, annotations: list, transforms: TransformList, size: tuple[int, int]) -> None:
        own = not self.exact and type(self)._transform_annotations is DatasetMapper._transform_annotations
        if own and not (self.use_instance_mask or self.use_keypoint):
            instances = instances_of_boxes(annotations, transforms, size)
            if instances is not None:
                record["instances"] = instances
                return
        record["annotations"] = copy.deepcopy(annotations)
        self._transform_annotations(record, transforms, size)
