"""Enlarging of images as Detectron2's ``ResizeTransform`` does it, sooner: in compiled code to the bit, else by OpenCV.

Detectron2 resizes with Pillow. Where an image grows, its "bilinear" is linear interpolation, rounded to 8 bits between
rows and columns and again at the end, so that the result is at most 1 from the exact value. OpenCV's ``INTER_LINEAR``
rounds the weights to 11 bits and cuts the two products of a column to quarters of a grey level before it rounds, which
puts it less than 0.9 from the exact value. The two integers are then less than 2 apart: by one grey level at most.

Two that look as good are not: ``INTER_LINEAR_EXACT`` rounds the weights to 8 bits, and PyTorch's anti-aliased
interpolation of uint8, for images that shrink, rounds twice, as Pillow does. Both come out two grey levels apart here
and there. So images that shrink are left to Pillow.
"""

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList
from PIL import Image

from . import enlarge
from .image_loading import channel_step

# Beyond, the single precision of OpenCV's positions in the image would use up what is left of the bound.
_MAX_SIDE = 4096


class FastAugInput(T.AugInput):
    """Detectron2's ``AugInput``, whose image is transformed by ``transform_image``.

    What was enlarged here lies in memory of its own, and is mirrored in place: fresh memory for an image of 800 pixels
    takes longer than mirroring it.
    """

    _enlarged: np.ndarray | None = None

    def transform(self, tfm: Transform) -> None:
        if type(tfm) is T.HFlipTransform and self.image is self._enlarged:
            for plane in self.image.transpose(2, 0, 1):
                cv2.flip(plane, 1, dst=plane)
        else:
            enlarges = _enlarges(tfm, self.image)
            self.image = transform_image(tfm, self.image)
            self._enlarged = self.image if enlarges else self._enlarged
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)


def transform_image(transform: Transform, image: np.ndarray) -> np.ndarray:
    """``transform.apply_image(image)``: the same to the bit, or within one grey level where OpenCV enlarges.

    Faster for bilinear enlarging of uint8 images of 1 or 3 channels. Whatever else it is, a subclass of
    ``ResizeTransform`` too, is applied by its own method.

    Args:
        transform: Any transform.
        image: Shape (height, width, channels) or (height, width).

    Returns:
        The image, of the same shape but for height and width. What was enlarged lies channel by channel in memory.
    """
    if type(transform) is TransformList:
        for part in transform.transforms:
            image = transform_image(part, image)
        return image
    if not _enlarges(transform, image):
        return transform.apply_image(image)
    # Each channel by itself, into memory of PyTorch's: the model's input, channels first, is then there without a copy.
    planes = enlarge.enlarge(image, transform.new_h, transform.new_w)
    if planes is None:
        step = channel_step(image)  # OpenCV would copy a view of BGR as RGB
        planes = torch.empty((image.shape[2], transform.new_h, transform.new_w), dtype=torch.uint8).numpy()
        for channel, plane in zip(cv2.split(image[:, :, ::step]), planes[::step], strict=True):
            cv2.resize(channel, (transform.new_w, transform.new_h), dst=plane, interpolation=cv2.INTER_LINEAR)
    return planes.transpose(1, 2, 0)


def enlarges_to_the_bit() -> bool:
    """Whether what is enlarged has Detectron2's bits: there is compiled code for it."""
    return enlarge.library() is not None


def _enlarges(transform: Transform, image: np.ndarray) -> bool:
    return (
        type(transform) is T.ResizeTransform
        and image.dtype == np.uint8
        and image.shape in ((transform.h, transform.w, 3), (transform.h, transform.w, 1))  # Pillow takes 4 for RGBA
        and transform.interp == Image.BILINEAR
        and transform.h <= transform.new_h
        and transform.w <= transform.new_w
        and 0 < transform.h <= _MAX_SIDE
        and 0 < transform.w <= _MAX_SIDE
    )
