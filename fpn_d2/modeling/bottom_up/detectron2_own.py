"""Detectron2's bottom-up pathways without a registered builder: RegNet, and on its main branch Swin, MViT and ViT.

Their parameters keep Detectron2's names, so that its checkpoints load; their maps are called ``res{k}`` for stride 2^k.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import backbone as detectron2_backbones
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from torch import Tensor

from fpn_d2.errors import UserError

from .names import register_bottom_up
from .timm_weights import pairs_to_options


class NamedByLevel:
    """Mixed into a bottom-up pathway: calls its maps ``res{k}``, where it calls them s1, p0, scale2 or last_feat."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of the images ``x`` (N, 3, H, W)."""
        shapes = super().output_shape()
        return {_name(shapes[name]): value for name, value in super().forward(x).items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return {_name(shape): shape for shape in super().output_shape().values()}


def _name(shape: ShapeSpec) -> str:
    return f"res{shape.stride.bit_length() - 1}"


class RegNetBackbone(NamedByLevel, RegNet):
    """Detectron2's RegNet (Radosavovic et al., CVPR 2020) with its maps called res2 to res5."""


@register_bottom_up
def build_regnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RegNetBackbone:
    """Build the RegNet of ``cfg.MODEL.REGNET``.

    Raises:
        UserError: it has fewer stages than OUT_FEATURES asks for, or images do not have 3 channels.
    """
    keys = cfg.MODEL.REGNET
    stages = {"res2": "s1", "res3": "s2", "res4": "s3", "res5": "s4"}
    if input_shape.channels != 3 or not keys.OUT_FEATURES or not set(keys.OUT_FEATURES) <= set(stages):
        raise UserError(
            f"MODEL.REGNET.OUT_FEATURES is {keys.OUT_FEATURES}, for images of {input_shape.channels} channels; "
            "expected some of res2, res3, res4, res5, and 3 channels"
        )
    try:
        return RegNetBackbone(
            stem_class=SimpleStem,
            stem_width=keys.STEM_WIDTH,
            block_class=ResBottleneckBlock,
            depth=keys.DEPTH,
            w_a=keys.W_A,
            w_0=keys.W_0,
            w_m=keys.W_M,
            group_width=keys.GROUP_WIDTH,
            se_ratio=keys.SE_RATIO,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
            norm=cfg.MODEL.RESNETS.NORM,
            out_features=[stages[name] for name in sorted(keys.OUT_FEATURES)],
        )
    except AssertionError as error:
        raise UserError(f"there is no RegNet of MODEL.REGNET {dict(keys)}: {error}") from None


def _build_from_main(class_name: str, cfg: CfgNode, **options) -> Backbone:
    """Build the class that only Detectron2's main branch has, with ``MODEL.BOTTOM_UP.OPTIONS``."""
    original = getattr(detectron2_backbones, class_name, None)
    if original is None:
        raise UserError(
            f"{cfg.MODEL.FPN.BOTTOM_UP} needs the {class_name} of Detectron2's main branch, which this one "
            "lacks; build_timm_backbone and build_vit_backbone have such models of timm's"
        )
    asked = pairs_to_options(cfg.MODEL.BOTTOM_UP.OPTIONS, "MODEL.BOTTOM_UP.OPTIONS")
    # Swin's own size_divisibility reads an attribute that nothing sets; it and MViT take any size. ViT cuts a rest off.
    divisibility = (options | asked).get("patch_size", 16) if class_name == "ViT" else 0
    parts = {"__doc__": f"Detectron2's {class_name}.", "size_divisibility": divisibility}
    named = type(f"{class_name}Backbone", (NamedByLevel, original), parts)
    try:
        return named(**(options | asked))
    except TypeError as error:
        raise UserError(f"MODEL.BOTTOM_UP.OPTIONS {asked} do not fit Detectron2's {class_name}: {error}") from None


def _refuse_freezing(cfg: CfgNode, class_name: str) -> None:
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}, but Detectron2's {class_name} cannot be "
            "frozen by stages; set it to 0"
        )


@register_bottom_up
def build_d2_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the Swin transformer of Detectron2's main branch; FREEZE_AT counts as its own frozen_stages.

    Raises:
        UserError: this Detectron2 has none, or an option does not fit.
    """
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT or -1
    return _build_from_main("SwinTransformer", cfg, in_chans=input_shape.channels, frozen_stages=frozen)


@register_bottom_up
def build_d2_mvit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the MViTv2 of Detectron2's main branch.

    Raises:
        UserError: this Detectron2 has none, an option does not fit, or it is to be frozen.
    """
    _refuse_freezing(cfg, "MViT")
    return _build_from_main("MViT", cfg, in_chans=input_shape.channels)


@register_bottom_up
def build_d2_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the plain ViT of Detectron2's main branch, ViTDet's with windows.

    Raises:
        UserError: this Detectron2 has none, an option does not fit, or it is to be frozen.
    """
    _refuse_freezing(cfg, "ViT")
    return _build_from_main("ViT", cfg, in_chans=input_shape.channels)
