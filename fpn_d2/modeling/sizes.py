"""Sizes of images and maps: padding to a multiple of a stride, cutting to the size that a stride promises."""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pad ``images`` (N, C, H, W) with zeros at the bottom and the right until both sides are multiples."""
    bottom, right = (-side % multiple for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def cut_to_stride(x: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Cut the map ``x`` to (ceil(H / stride), ceil(W / stride)) for images of ``size`` (H, W)."""
    height, width = (-(-side // stride) for side in size)
    return x if x.shape[-2:] == (height, width) else x[..., :height, :width]
