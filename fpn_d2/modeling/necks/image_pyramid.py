"""Featurised image pyramid (Lin et al., CVPR 2017, figure 1 a): the costly reference that a feature pyramid replaces.

For level k the image is resized by 2^(s - k), where the one bottom-up map has stride 2^s, and the bottom-up pathway is
run on it: a cell of that map then covers 2^k pixels of the original image. With s = 4, p2 comes from the image at four
times its size and p6 from a quarter of it, all of them through the same weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor

from fpn_d2.errors import UserError

from ..sizes import cut_to_stride, pad_to_multiple
from .build import NECK_REGISTRY, Neck
from .parts import consecutive_levels, refuse_fpn_options, single_level, xavier_conv


@NECK_REGISTRY.register()
class ImagePyramid(Neck):
    """The bottom-up pathway on the image at several sizes, then a 1x1 and a 3x3 convolution that all levels share.

    The image is first padded with zeros, at the bottom and the right, to a multiple of 2^k, and then resized by the
    exact factor, so that cell i of p{k} always begins at pixel i * 2^k and p{k} has ceil(side / 2^k) cells a side.
    """

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        levels: Sequence[int] = (2, 3, 4, 5, 6),
    ):
        """Build the neck.

        Args:
            bottom_up: the bottom-up pathway.
            in_features: the name of the one map to use at every size of the image, e.g. res4.
            out_channels: d, the channels of every output.
            norm: a norm of :func:`detectron2.layers.get_norm` after each convolution; empty: none.
            levels: the levels k to make, with stride 2^k; consecutive, ascending.

        Raises:
            UserError: not exactly one map is asked for, it is missing, or an option has no such value.
        """
        super().__init__()
        input_shape = bottom_up.output_shape()
        self.level = single_level(type(self).__name__, input_shape, in_features)
        self.levels = consecutive_levels(levels, "levels (MODEL.FPN.IMAGE_PYRAMID_LEVELS)")
        self.pyramid_lateral = xavier_conv(input_shape[in_features[0]].channels, out_channels, 1, norm)
        self.pyramid_output = xavier_conv(out_channels, out_channels, 3, norm)
        self._size_divisibility = 2 ** self.levels[-1]  # any size works: this pads once instead of at each level
        outputs = {f"p{k}": ShapeSpec(channels=out_channels, stride=2**k) for k in self.levels}
        self.own(bottom_up, in_features, outputs)

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        refuse_fpn_options(cfg, cls.__name__)
        if cfg.MODEL.FPN.TOP_BLOCK not in ("auto", "none"):
            raise UserError(
                f"MODEL.FPN.TOP_BLOCK is {cfg.MODEL.FPN.TOP_BLOCK!r}, but an ImagePyramid makes every level from an "
                "image: name the levels in MODEL.FPN.IMAGE_PYRAMID_LEVELS and set it to none"
            )
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "levels": cfg.MODEL.FPN.IMAGE_PYRAMID_LEVELS,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Run the bottom-up pathway on ``x`` (N, 3, H, W) at each size; p{k} is (N, d, ceil(H/2^k), ceil(W/2^k))."""
        size = tuple(x.shape[-2:])
        features = {}
        for k in self.levels:
            maps = self.bottom_up(resize(pad_to_multiple(x, 2**k), self.level - k))
            features[f"res{k}"] = cut_to_stride(maps[self.in_features[0]], size, 2**k)
        return self.fuse(features)

    def fuse(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p2": ..., ...}`` of ``{"res2": ..., ...}``: the bottom-up map at each size, named by its level."""
        return {f"p{k}": self.pyramid_output(self.pyramid_lateral(features[f"res{k}"])) for k in self.levels}


def resize(images: Tensor, steps: int) -> Tensor:
    """Resize ``images`` by exactly 2^steps, bilinear, averaging over what one pixel stands for when they shrink."""
    if steps == 0:
        return images
    height, width = (side << steps if steps > 0 else side >> -steps for side in images.shape[-2:])
    # In float32: not every device averages half precision.
    wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    resized = F.interpolate(wide, size=(height, width), mode="bilinear", align_corners=False, antialias=steps < 0)
    return resized.to(images.dtype)
