"""Detectron2's RoI heads with our poolers."""

import math

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    StandardROIHeads,
    build_box_head,
)
from torch import nn

from fpn_d2.config import require_keys
from fpn_d2.errors import UserError
from fpn_d2.fast.apply import numerics, speed_up
from fpn_d2.fast.guard import of_class

from .poolers import build_pooler
from .roi_rules import extracted_channels
from .swap import refuse_lost_branches


class _PyramidPoolers:
    """Puts our poolers where Detectron2's ``from_config`` put its own, and builds the heads for what they give."""

    @configurable
    def __init__(self, *, numerics: str = "fast", **kwargs):
        """Build the heads.

        Args:
            numerics: "fast", or "exact" for Detectron2's own operations; see :func:`fpn_d2.fast.apply.speed_up`.
            kwargs: the arguments of Detectron2's heads.
        """
        super().__init__(**kwargs)
        speed_up(self, numerics)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: Detectron2's heads, with the pooler that compiles itself."""
        stock = {FPNROIHeads: StandardROIHeads, FPNCascadeROIHeads: CascadeROIHeads}.get(type(self))
        return self if stock is None else of_class(self, stock)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        require_keys(cfg)
        refuse_lost_branches(cfg)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        _check_maps(names, input_shape)
        seen = _as_extracted(cfg, input_shape)
        args = super().from_config(_without_gaps(cfg, input_shape), seen)
        output_size = _box_output_size(cfg)
        if not isinstance(output_size, int):
            for key in {"box_head", "box_heads"} & set(args):
                args[key] = _resized(args[key], cfg, seen, output_size)
        for branch, head, size in (
            ("box", cfg.MODEL.ROI_BOX_HEAD, output_size),
            ("mask", cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION),
            ("keypoint", cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION),
        ):
            if args.get(f"{branch}_in_features"):
                args[f"{branch}_in_features"] = names
            if args.get(f"{branch}_pooler") is not None:  # some heads pool by themselves
                args[f"{branch}_pooler"] = build_pooler(
                    cfg,
                    input_shape,
                    output_size=size,
                    sampling_ratio=head.POOLER_SAMPLING_RATIO,
                    pooler_type=head.POOLER_TYPE,
                )
        return args | {"numerics": numerics(cfg)}


def _check_maps(names: list[str], input_shape: dict[str, ShapeSpec]) -> None:
    if not names or any(name not in input_shape for name in names):
        raise UserError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {list(names)}; expected maps that the backbone gives: "
            f"{', '.join(input_shape)}"
        )
    channels = [input_shape[name].channels for name in names]
    if len(set(channels)) > 1:
        raise UserError(
            f"MODEL.ROI_HEADS.IN_FEATURES {list(names)} have {channels} channels; the heads are shared over the "
            "levels, so that all have to be the same: use a neck"
        )


def _as_extracted(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """The maps with the channels that the heads see, for extractors that pass on more than those of one map."""
    shapes = [input_shape[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    channels = shapes[0].channels
    extracted = extracted_channels(cfg, [int(math.log2(shape.stride)) for shape in shapes], channels)
    if extracted == channels:
        return input_shape
    for branch, there in (("MASK", cfg.MODEL.MASK_ON), ("KEYPOINT", cfg.MODEL.KEYPOINT_ON)):
        if there and not cfg.MODEL[f"ROI_{branch}_HEAD"].POOLER_TYPE:
            raise UserError(
                f"MODEL.ROI_LEVEL_ASSIGN.NAME {cfg.MODEL.ROI_LEVEL_ASSIGN.NAME!r} gives the heads {extracted} "
                f"channels, but MODEL.ROI_{branch}_HEAD.POOLER_TYPE is empty: that head pools by itself, from maps of "
                f"{channels}. Expected a pooler type, or another rule"
            )
    return {name: ShapeSpec(channels=extracted, stride=shape.stride) for name, shape in input_shape.items()}


def _without_gaps(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> CfgNode:
    """Show Detectron2 one level only where there are gaps between levels, which its poolers refuse."""
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    levels = [math.log2(input_shape[name].stride) for name in names]
    if levels[-1] - levels[0] + 1 == len(levels):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.IN_FEATURES = names[:1]
    return cfg


def _box_output_size(cfg: CfgNode) -> int | tuple[int, ...]:
    size = tuple(cfg.MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE)
    if size and len(size) != 2:
        raise UserError(f"MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE is {list(size)}; expected [height, width] or []")
    return size or cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION


def _resized(heads: nn.Module | list, cfg: CfgNode, input_shape: dict[str, ShapeSpec], size: tuple[int, ...]):
    """Build the box head(s) anew for RoIs that are not square, which Detectron2's configuration cannot say."""
    if isinstance(heads, list):
        return [_resized(head, cfg, input_shape, size) for head in heads]
    channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    head = build_box_head(cfg, ShapeSpec(channels=channels, height=size[0], width=size[1]))
    if head.output_shape != heads.output_shape:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE needs a box head that ends in a fully connected layer "
            f"(MODEL.ROI_BOX_HEAD.NUM_FC of at least 1); this one gives {head.output_shape}"
        )
    return head


@ROI_HEADS_REGISTRY.register()
class FPNROIHeads(_PyramidPoolers, StandardROIHeads):
    """``StandardROIHeads`` whose box, mask and keypoint branches pool by ``MODEL.ROI_LEVEL_ASSIGN``."""


@ROI_HEADS_REGISTRY.register()
class FPNCascadeROIHeads(_PyramidPoolers, CascadeROIHeads):
    """``CascadeROIHeads`` whose box, mask and keypoint branches pool by ``MODEL.ROI_LEVEL_ASSIGN``."""
