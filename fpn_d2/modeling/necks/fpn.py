"""Feature Pyramid Network (Lin et al., CVPR 2017, figure 3) and its ablations (tables 1 and 2).

Shape legend, for an image of H x W pixels in a batch of N:
    res{k}   bottom-up map of level k: (N, C_k, ceil(H / 2^k), ceil(W / 2^k))
    m{k}     merged map of level k: lateral plus up-sampled m{k+1}: (N, d, as res{k})
    p{k}     output of level k: (N, d, as res{k}); above the last bottom-up level it comes from the top block
"""

import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor

from .build import NECK_REGISTRY, Neck
from .conv import conv
from .top_blocks import build_top_block, num_top_levels, reads_bottom_up, top_block_of
from .upsample import add_nearest, build_upsample

FUSE_TYPES = ("sum", "avg")


@NECK_REGISTRY.register()
class FPN(Neck):
    """1x1 laterals, a top-down pathway and 3x3 output convolutions; equal to Detectron2's FPN where that works.

    Child modules have Detectron2's names: ``fpn_lateral{k}``, ``fpn_output{k}`` and ``top_block``, with
    ``fpn_upsample{k}`` beside them where up-sampling has parameters. A module that no output depends on is not built.
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
        top_down: bool = True,
        lateral: bool = True,
        out_features: Sequence[str] = (),
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
            top_block: "maxpool", "p6p7_c5", "p6p7_p5", "p6p7_maxpool" or "none".
            top_down: False cuts the top-down pathway: each level is its 1x1 and 3x3 convolution alone, a bottom-up
                pyramid in the style of SSD.
            lateral: False cuts the lateral connections: the coarsest map goes through its 1x1 convolution and is
                up-sampled from level to level; of the finer bottom-up maps only the sizes are used.
            out_features: names of the outputs to return, e.g. ["p2"] for the finest level alone; empty: all.

        Raises:
            ValueError: an option has no such value, a map is missing, strides do not double, an output does not
                exist, or both pathways are cut.
        """
        super().__init__()
        levels = pyramid_levels(input_shape, in_features)
        if fuse_type not in FUSE_TYPES:
            raise ValueError(f"fuse_type (MODEL.FPN.FUSE_TYPE) is {fuse_type!r}; expected one of {FUSE_TYPES}")
        if not (top_down or lateral):
            raise ValueError(
                "top_down (MODEL.FPN.TOP_DOWN) and lateral (MODEL.FPN.LATERAL) are both False: the finer levels "
                "would see nothing; set at least one of them to True"
            )
        above = [levels[-1] + 1 + i for i in range(num_top_levels(top_block))]
        self._output_shape = _chosen(
            {f"p{k}": ShapeSpec(channels=out_channels, stride=2**k) for k in [*levels, *above]}, out_features
        )
        self.in_features = tuple(in_features)
        self.levels = levels
        self.upsample = upsample
        self.fuse_type = fuse_type
        self.top_down = top_down

        # What the wanted outputs depend on; nothing else is built.
        wanted = [k for k in [*levels, *above] if f"p{k}" in self._output_shape]
        top_levels = max(wanted[-1] - levels[-1], 0)
        self._top_reads_bottom_up = reads_bottom_up(top_block)
        needed = {k for k in wanted if k <= levels[-1]}
        if top_levels and not self._top_reads_bottom_up:
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
        top = build_top_block(top_block, input_shape[in_features[-1]].channels, out_channels, norm, top_levels)
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

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        return {
            "input_shape": input_shape,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "upsample": cfg.MODEL.FPN.UPSAMPLE,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
            "top_block": top_block_of(cfg),
            "top_down": cfg.MODEL.FPN.TOP_DOWN,
            "lateral": cfg.MODEL.FPN.LATERAL,
            "out_features": cfg.MODEL.FPN.OUT_FEATURES,
        }

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p2": (N, d, H/4, W/4), ...}``, from high to low resolution, for maps of any size."""
        outputs = self._outputs(features)
        if self.top_block is not None:
            last = self.levels[-1]
            source = features[self.in_features[-1]] if self._top_reads_bottom_up else outputs[last]
            outputs |= {last + 1 + i: x for i, x in enumerate(self.top_block(source))}
        return {name: outputs[int(name[1:])] for name in self._output_shape}

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
            elif lateral is not None and self._adds_in_place(merged, lateral):
                merged = add_nearest(lateral, merged)
            else:
                merged = getattr(self, f"fpn_upsample{level}")(merged, features[name].shape[-2:])
                if lateral is not None:
                    merged = lateral + merged
                    if self.fuse_type == "avg":
                        merged = merged / 2
            if level in self._output_levels:
                outputs[level] = getattr(self, f"fpn_output{level}")(merged)
        return outputs

    def _adds_in_place(self, coarser: Tensor, finer: Tensor) -> bool:
        """Whether :func:`add_nearest` does what these options ask for: at inference, where nobody needs the lateral."""
        fits = all(2 * a - b in (0, 1) for a, b in zip(coarser.shape[2:], finer.shape[2:], strict=True))
        plain = self.upsample == "nearest" and self.fuse_type == "sum"
        # A hook may keep the lateral's output.
        plain = plain and not any(getattr(self, f"fpn_lateral{k}")._forward_hooks for k in self._lateral_levels)
        return plain and fits and not finer.requires_grad and not torch.jit.is_tracing()

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output, p2 first."""
        return dict(self._output_shape)

    @property
    def size_divisibility(self) -> int:
        """The coarsest bottom-up stride, as Detectron2 pads; the neck itself works at any size."""
        return 2 ** self.levels[-1]


def _chosen(shapes: dict[str, ShapeSpec], out_features: Sequence[str]) -> dict[str, ShapeSpec]:
    """Keep of ``shapes`` those named in ``out_features``, or all if that is empty."""
    if isinstance(out_features, str):
        raise TypeError(f"out_features (MODEL.FPN.OUT_FEATURES) is the text {out_features!r}; expected a list of names")
    unknown = [name for name in out_features if name not in shapes]
    if unknown:
        raise ValueError(
            f"out_features (MODEL.FPN.OUT_FEATURES) asks for {', '.join(unknown)}; with these in_features and this "
            f"top_block the pyramid has {', '.join(shapes)}"
        )
    return {name: shape for name, shape in shapes.items() if name in out_features or not out_features}


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
