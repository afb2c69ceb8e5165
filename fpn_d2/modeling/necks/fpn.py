"""Feature Pyramid Network (Lin et al., CVPR 2017, figure 3) and its ablations (tables 1 and 2).

Shape legend, for an image of H x W pixels in a batch of N:
    res{k}   bottom-up map of level k: (N, C_k, ceil(H / 2^k), ceil(W / 2^k))
    m{k}     merged map of level k: lateral plus up-sampled m{k+1}: (N, d, as res{k})
    p{k}     output of level k: (N, d, as res{k}); above the last bottom-up level it comes from the top block
"""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone import FPN as Detectron2FPN
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .auto_top_block import top_block_of
from .build import NECK_REGISTRY, Neck
from .parts import chosen, conv, pyramid_levels
from .top_blocks import build_top_block, num_top_levels, reads_bottom_up
from .upsample import build_upsample

FUSE_TYPES = ("sum", "avg")


@NECK_REGISTRY.register()
class FPN(Neck, Detectron2FPN):
    """1x1 laterals, a top-down pathway and 3x3 output convolutions; equal to Detectron2's FPN where that works.

    Child modules have Detectron2's names: ``fpn_lateral{k}``, ``fpn_output{k}`` and ``top_block``, with
    ``fpn_upsample{k}`` beside them where up-sampling has parameters. A module that no output depends on is not built.
    It is a Detectron2 ``FPN`` to whoever asks, with what others read of one: ``in_features``, ``lateral_convs``,
    ``output_convs``, ``top_block``.
    """

    _square_pad = 0  # of Detectron2's main branch

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        upsample: str = "nearest",
        fuse_type: str = "sum",
        top_block: str = "maxpool",
        top_down: bool = True,
        lateral: bool = True,
        out_features: Sequence[str] = (),
    ):
        """Build the neck.

        Args:
            bottom_up: the bottom-up pathway.
            in_features: names of the maps to use, from high to low resolution, e.g. res2 to res5; strides double.
            out_channels: d, the channels of every output.
            norm: a norm of :func:`detectron2.layers.get_norm` after each convolution, which then has no bias;
                empty: none.
            upsample: "nearest", "bilinear" or "deconv".
            fuse_type: "sum" of lateral and top-down map, or their average "avg".
            top_block: "maxpool", "p6p7_c5", "p6p7_p5", "p6p7_maxpool" or "none".
            top_down: False cuts the top-down pathway: each level is its 1x1 and 3x3 convolution alone, a bottom-up
                pyramid in the style of SSD.
            lateral: False cuts the lateral connections: the coarsest map goes through its 1x1 convolution and is
                up-sampled from level to level; of the finer bottom-up maps only the sizes are used.
            out_features: names of the outputs to return, e.g. ["p2"] for the finest level alone; empty: all.

        Raises:
            UserError: an option has no such value, a map is missing, strides do not double, an output does not
                exist, or both pathways are cut.
        """
        Backbone.__init__(self)  # Detectron2's FPN would build every module a second time
        input_shape = bottom_up.output_shape()
        levels = pyramid_levels(input_shape, in_features)
        if fuse_type not in FUSE_TYPES:
            raise UserError(f"fuse_type (MODEL.FPN.FUSE_TYPE) is {fuse_type!r}; expected one of {FUSE_TYPES}")
        if not (top_down or lateral):
            raise UserError(
                "top_down (MODEL.FPN.TOP_DOWN) and lateral (MODEL.FPN.LATERAL) are both False: the finer levels "
                "would see nothing; set at least one of them to True"
            )
        above = [levels[-1] + 1 + i for i in range(num_top_levels(top_block))]
        outputs = chosen(
            {f"p{k}": ShapeSpec(channels=out_channels, stride=2**k) for k in [*levels, *above]}, out_features
        )
        self.levels = levels
        self.upsample = upsample
        self.top_down = top_down
        self._fuse_type = fuse_type
        self._size_divisibility = 2 ** levels[-1]  # as Detectron2 pads; the neck itself works at any size

        # What the wanted outputs depend on; nothing else is built.
        wanted = [k for k in [*levels, *above] if f"p{k}" in outputs]
        top_levels = max(wanted[-1] - levels[-1], 0)
        needed = {k for k in wanted if k <= levels[-1]}
        if top_levels and not reads_bottom_up(top_block):
            needed.add(levels[-1])
        self._output_levels = self._levels_for(needed)
        if top_down and self._output_levels:
            merged_levels = [k for k in levels if k >= self._output_levels[0]]
        else:
            merged_levels = self._output_levels
        self._merged_levels = merged_levels
        self._lateral_levels = merged_levels if lateral else merged_levels[-1:]

        # Top block first, each pair of convolutions before either is filled: the order in which Detectron2 draws
        # random numbers, so that the same seed gives the same initial weights.
        last = (in_features[-1], input_shape[in_features[-1]].channels, levels[-1])
        top = build_top_block(top_block, *last, out_channels, norm, top_levels)
        for level, name in zip(levels, in_features, strict=True):
            pair = {}
            if level in self._lateral_levels:
                pair[f"fpn_lateral{level}"] = conv(input_shape[name].channels, out_channels, 1, norm)
            if level in self._output_levels:
                pair[f"fpn_output{level}"] = conv(out_channels, out_channels, 3, norm)
            for child, module in pair.items():
                weight_init.c2_xavier_fill(module)
                self.add_module(child, module)
        for level in merged_levels[:-1] if top_down else []:
            self.add_module(f"fpn_upsample{level}", build_upsample(upsample, out_channels))
        self.top_block = top
        self.own(bottom_up, in_features, outputs)

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        last = pyramid_levels(bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES)[-1]
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "upsample": cfg.MODEL.FPN.UPSAMPLE,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "top_block": top_block_of(cfg, last),
            "top_down": cfg.MODEL.FPN.TOP_DOWN,
            "lateral": cfg.MODEL.FPN.LATERAL,
            "out_features": cfg.MODEL.FPN.OUT_FEATURES,
        }

    @property
    def lateral_convs(self) -> list[Conv2d]:
        """The 1x1 convolutions, from low to high resolution, as Detectron2's FPN runs them."""
        return [getattr(self, f"fpn_lateral{k}") for k in reversed(self._lateral_levels)]

    @property
    def output_convs(self) -> list[Conv2d]:
        """The 3x3 convolutions, from low to high resolution."""
        return [getattr(self, f"fpn_output{k}") for k in reversed(self._output_levels)]

    def fuse(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p2": (N, d, H/4, W/4), ...}``, from high to low resolution, for maps of any size."""
        outputs = self._outputs(features)
        if self.top_block is not None:
            last, name = self.levels[-1], self.top_block.in_feature
            source = features[name] if name in self.in_features else outputs[last]
            outputs |= {last + 1 + i: x for i, x in enumerate(self.top_block(source))}
        return {name: outputs[int(name[1:])] for name in self._out_features}

    def _levels_for(self, needed: set[int]) -> list[int]:
        """Levels, ascending, whose output convolution is needed to return those in ``needed``."""
        return sorted(needed)

    def _outputs(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """Return the output of each level that is needed, without the top block's."""
        merged = None
        outputs = {}
        for level, name in zip(reversed(self.levels), reversed(self.in_features), strict=True):
            if level not in self._merged_levels:
                continue
            lateral = getattr(self, f"fpn_lateral{level}")(features[name]) if level in self._lateral_levels else None
            if merged is None or not self.top_down:
                merged = lateral
            else:
                merged = self.merge(level, lateral, merged, features[name].shape[-2:])
            if level in self._output_levels:
                outputs[level] = getattr(self, f"fpn_output{level}")(merged)
        return outputs

    def merge(self, level: int, lateral: Tensor | None, coarser: Tensor, size: tuple[int, int]) -> Tensor:
        """Join a level's lateral with what comes down from above.

        Args:
            level: k.
            lateral: (N, d, *size), or None where laterals are cut.
            coarser: (N, d, h, w), the merged map of level k + 1.
            size: (height, width) of level k.

        Returns:
            (N, d, *size).
        """
        from_above = getattr(self, f"fpn_upsample{level}")(coarser, size)
        if lateral is None:
            return from_above
        merged = lateral + from_above
        return merged / 2 if self._fuse_type == "avg" else merged

    def __prepare_scriptable__(self) -> nn.Module:
        """Return Detectron2's FPN with the same modules, which ``torch.jit.script`` can compile.

        Raises:
            UserError: these options are not Detectron2's.
        """
        if not self._computes_detectron2s():
            return super().__prepare_scriptable__()
        twin = Detectron2FPN.__new__(Detectron2FPN)
        nn.Module.__init__(twin)
        for name, child in self.named_children():
            if not name.startswith("fpn_upsample"):  # a function there
                twin.add_module(name, child)
        for name in ("in_features", "lateral_convs", "output_convs", "training", "top_block"):
            setattr(twin, name, getattr(self, name))
        for name in ("features", "feature_channels", "feature_strides"):
            setattr(twin, f"_out_{name}", getattr(self, f"_out_{name}"))
        twin._fuse_type, twin._size_divisibility, twin._square_pad = self._fuse_type, self.size_divisibility, 0
        # Set by detectron2.export, which cannot compile its own FPN otherwise.
        prepare = getattr(twin, "__prepare_scriptable__", None)
        return twin if prepare is None else prepare()

    def _computes_detectron2s(self) -> bool:
        """Whether Detectron2's FPN with these modules gives the same maps."""
        own = type(self)  # of a fast one the plain class
        plain = (own.forward, own.fuse, own._outputs, own.merge) == (Neck.forward, FPN.fuse, FPN._outputs, FPN.merge)
        whole = self.top_down and self._lateral_levels == self._output_levels == self.levels
        return plain and whole and self.upsample == "nearest"
