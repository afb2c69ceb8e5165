"""Simple feature pyramid (Li et al., "Exploring Plain Vision Transformer Backbones", ECCV 2022, section 3).

Shape legend, for an image of H x W pixels in a batch of N and a plain ViT with patches of 16 x 16 pixels:
    res4     the one bottom-up map: (N, C, ceil(H / 16), ceil(W / 16))
    p{k}     (N, d, ceil(H / 2^k), ceil(W / 2^k)), each made from res4 alone: no map sees another level's
"""

from collections.abc import Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from ..sizes import cut_to_stride
from .auto_top_block import top_block_of
from .build import NECK_REGISTRY, Neck
from .parts import ChannelLayerNorm, consecutive_levels, conv, refuse_fpn_options, rescale_layers, single_level
from .top_blocks import build_top_block, reads_bottom_up


@NECK_REGISTRY.register()
class SimpleFeaturePyramid(Neck):
    """Every level from the last map of a plain ViT, by transposed convolution or pooling, then 1x1 and 3x3 convolution.

    Child modules have the names of Detectron2's class of the same name, ``simfp_{k}`` and ``top_block``. Its misspelt
    padding constraint is not repeated: images are padded to a multiple of the coarsest level's stride.
    """

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "LN",
        levels: Sequence[int] = (2, 3, 4, 5),
        top_block: str = "maxpool",
    ):
        """Build the neck.

        Args:
            bottom_up: the bottom-up pathway.
            in_features: the name of the one map to use, the last of a plain ViT.
            out_channels: d, the channels of every output.
            norm: "LN" (as published: layer norm over the channels), another norm of
                :func:`detectron2.layers.get_norm`, or empty: none.
            levels: the levels k to make, with stride 2^k; consecutive, ascending.
            top_block: as for :class:`~fpn_d2.modeling.FPN`, of those that read the last output.

        Raises:
            UserError: not exactly one map is asked for, it is missing, or an option has no such value.
        """
        super().__init__()
        input_shape = bottom_up.output_shape()
        level = single_level(type(self).__name__, input_shape, in_features)
        levels = consecutive_levels(levels, "levels (MODEL.FPN.SIMPLE_PYRAMID_LEVELS)")
        if reads_bottom_up(top_block):
            raise UserError(
                f"top_block (MODEL.FPN.TOP_BLOCK) is {top_block!r}, which reads C5, but {type(self).__name__} has only "
                f"{in_features[0]} below it; expected maxpool, p6p7_p5 or none"
            )
        norm = ChannelLayerNorm if norm == "LN" else norm
        channels = input_shape[in_features[0]].channels
        self.levels, self._map_stride = levels, 2**level
        top = build_top_block(top_block, in_features[0], channels, levels[-1], out_channels)
        for k in levels:
            if channels % 2 ** max(level - k, 0):
                raise UserError(
                    f"{in_features[0]} has {channels} channels, which cannot be halved {level - k} times for p{k}; "
                    "leave out fine levels in MODEL.FPN.SIMPLE_PYRAMID_LEVELS"
                )
            last = conv(out_channels, out_channels, 3, norm)  # first: refuses a norm that does not exist
            layers, width = rescale_layers(channels, level - k, norm)
            self.add_module(f"simfp_{k}", nn.Sequential(*layers, conv(width, out_channels, 1, norm), last))
        self.top_block = top
        above = [levels[-1] + 1 + i for i in range(top.num_levels if top is not None else 0)]
        outputs = {f"p{k}": ShapeSpec(channels=out_channels, stride=2**k) for k in [*levels, *above]}
        self._size_divisibility = 2 ** levels[-1]
        self.own(bottom_up, in_features, outputs)

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone) -> dict:
        """Read ``cfg.MODEL.FPN``; top block "auto" is p6p7_p5 for RetinaNet."""
        refuse_fpn_options(cfg, cls.__name__)
        levels = consecutive_levels(cfg.MODEL.FPN.SIMPLE_PYRAMID_LEVELS, "MODEL.FPN.SIMPLE_PYRAMID_LEVELS")
        top_block = top_block_of(cfg, levels[-1])
        if cfg.MODEL.FPN.TOP_BLOCK == "auto" and top_block == "p6p7_c5":
            top_block = "p6p7_p5"
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "levels": levels,
            "top_block": top_block,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Cut each level to ceil(side / stride) as well, which matters for sides that are no multiple of 16.

        Only the levels finer than the map can be larger. That of the others is not asked: the tracer of an export would
        take the answer for a limit of the image's size.
        """
        size, strides = tuple(x.shape[-2:]), self._out_feature_strides
        finer = {name for name, stride in strides.items() if stride < self._map_stride}
        maps = super().forward(x)
        return {name: cut_to_stride(y, size, strides[name]) if name in finer else y for name, y in maps.items()}

    def fuse(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p2": ..., ...}``; finer levels have exactly 2^n times as many cells as the map."""
        outputs = [getattr(self, f"simfp_{k}")(features[self.in_features[0]]) for k in self.levels]
        if self.top_block is not None:
            outputs += self.top_block(outputs[-1])
        return dict(zip(self._out_features, outputs, strict=True))
