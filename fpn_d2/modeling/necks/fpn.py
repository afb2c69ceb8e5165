"""Feature Pyramid Network (Lin et al., CVPR 2017, figure 3).

Shape legend, for an image of H x W pixels in a batch of N:
    res{k}   bottom-up map of level k: (N, C_k, ceil(H / 2^k), ceil(W / 2^k))
    m{k}     merged map of level k: lateral plus up-sampled m{k+1}: (N, d, as res{k})
    p{k}     output of level k: (N, d, as res{k}); above the last bottom-up level it comes from the top block
"""

import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor

from .build import NECK_REGISTRY, Neck
from .top_blocks import build_top_block
from .upsample import build_upsample

FUSE_TYPES = ("sum", "avg")


@NECK_REGISTRY.register()
class FPN(Neck):
    """1x1 laterals, a top-down pathway and 3x3 output convolutions; equal to Detectron2's FPN where that works.

    Child modules have Detectron2's names: ``fpn_lateral{k}``, ``fpn_output{k}`` and ``top_block``, with
    ``fpn_upsample{k}`` beside them where up-sampling has parameters.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        upsample: str = "nearest",
        fuse_type: str = "sum",
        top_block: str = "maxpool",
    ):
        """Build the neck.

        Args:
            input_shape: channels and stride of each bottom-up map.
            in_features: names of the maps to use, from high to low resolution, e.g. res2 to res5; strides double.
            out_channels: d, the channels of every output.
            norm: a norm of :func:`detectron2.layers.get_norm` after each convolution, which then has no bias;
                empty: none.
            upsample: "nearest", "bilinear" or "deconv".
            fuse_type: "sum" of lateral and top-down map, or their average "avg".
            top_block: "maxpool", "p6p7_c5", "p6p7_p5" or "none".

        Raises:
            ValueError: an option has no such value, a map is missing, or strides do not double.
        """
        super().__init__()
        levels = pyramid_levels(input_shape, in_features)
        if fuse_type not in FUSE_TYPES:
            raise ValueError(f"fuse_type (MODEL.FPN.FUSE_TYPE) is {fuse_type!r}; expected one of {FUSE_TYPES}")
        self.in_features = tuple(in_features)
        self.levels = levels
        self.fuse_type = fuse_type
        # Top block first, each pair of convolutions before either is filled: the order in which Detectron2 draws
        # random numbers, so that the same seed gives the same initial weights.
        top = build_top_block(top_block, input_shape[in_features[-1]].channels, out_channels)
        for level, name in zip(levels, in_features, strict=True):
            lateral = _conv(input_shape[name].channels, out_channels, 1, norm)
            output = _conv(out_channels, out_channels, 3, norm)
            weight_init.c2_xavier_fill(lateral)
            weight_init.c2_xavier_fill(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        for level in levels[:-1]:
            self.add_module(f"fpn_upsample{level}", build_upsample(upsample, out_channels))
        self.top_block = top
        self._top_reads_bottom_up = top_block == "p6p7_c5"
        above = [levels[-1] + 1 + i for i in range(top.num_levels if top is not None else 0)]
        self._output_shape = {f"p{k}": ShapeSpec(channels=out_channels, stride=2**k) for k in [*levels, *above]}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        top_block = cfg.MODEL.FPN.TOP_BLOCK
        if top_block == "auto":
            top_block = "p6p7_c5" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "maxpool"
        return {
            "input_shape": input_shape,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "upsample": cfg.MODEL.FPN.UPSAMPLE,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "top_block": top_block,
        }

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p2": (N, d, H/4, W/4), ...}``, from high to low resolution, for maps of any size."""
        merged = None
        outputs = []
        for level, name in zip(reversed(self.levels), reversed(self.in_features), strict=True):
            lateral = getattr(self, f"fpn_lateral{level}")(features[name])
            if merged is None:
                merged = lateral
            else:
                merged = lateral + getattr(self, f"fpn_upsample{level}")(merged, lateral.shape[-2:])
                if self.fuse_type == "avg":
                    merged = merged / 2
            outputs.insert(0, getattr(self, f"fpn_output{level}")(merged))
        if self.top_block is not None:
            outputs += self.top_block(features[self.in_features[-1]] if self._top_reads_bottom_up else outputs[-1])
        return dict(zip(self._output_shape, outputs, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output, p2 first."""
        return dict(self._output_shape)

    @property
    def size_divisibility(self) -> int:
        """The coarsest bottom-up stride, as Detectron2 pads; the neck itself works at any size."""
        return 2 ** self.levels[-1]


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=norm == "",
        norm=_norm(norm, out_channels),
    )


def _norm(name: str, channels: int):
    try:
        return get_norm(name, channels)
    except KeyError:
        raise ValueError(
            f"norm (MODEL.FPN.NORM) is {name!r}, which this Detectron2 does not know; expected GN, BN, SyncBN, "
            "FrozenBN or an empty string"
        ) from None


def pyramid_levels(input_shape: dict[str, ShapeSpec], in_features: Sequence[str]) -> list[int]:
    """Return the level k, with stride 2^k, of each map in ``in_features``.

    Raises:
        ValueError: there is none, one is not in ``input_shape``, or their strides are not consecutive powers of 2.
    """
    available = ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in input_shape.items())
    if not in_features:
        raise ValueError(f"in_features (MODEL.FPN.IN_FEATURES) is empty; name bottom-up maps, of {available}")
    missing = [name for name in in_features if name not in input_shape]
    if missing:
        raise ValueError(
            f"in_features (MODEL.FPN.IN_FEATURES) asks for {', '.join(missing)}, which the bottom-up pathway does "
            f"not give; it gives {available}. For a ResNet, MODEL.RESNETS.OUT_FEATURES names what it gives"
        )
    strides = [input_shape[name].stride for name in in_features]
    levels = [math.log2(stride) for stride in strides]
    if any(level % 1 for level in levels) or any(b - a != 1 for a, b in zip(levels, levels[1:], strict=False)):
        raise ValueError(
            f"in_features (MODEL.FPN.IN_FEATURES) {list(in_features)} have strides {strides}; expected powers of 2 "
            "that double from map to map, from high to low resolution"
        )
    return [int(level) for level in levels]
