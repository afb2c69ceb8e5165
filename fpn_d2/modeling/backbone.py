"""The one entry in Detectron2's registry: a bottom-up pathway and the neck that owns it, each by its name."""

import logging

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone

from fpn_d2.config import require_keys
from fpn_d2.fast.apply import numerics, speed_up

from .bottom_up.checkpointing import checkpoint_stages
from .bottom_up.names import find_bottom_up
from .bottom_up.timm_backbone import TimmBackbone
from .bottom_up.vit import ViTBackbone
from .necks import Neck, build_neck

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
def build_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Neck:
    """Build the bottom-up pathway ``cfg.MODEL.FPN.BOTTOM_UP`` with the neck ``cfg.MODEL.FPN.NECK``.

    Args:
        cfg: Detectron2's configuration with the keys of :func:`fpn_d2.add_fpn_d2_config`.
        input_shape: channels of the images.

    Raises:
        UserError: no such bottom-up pathway or neck, the two do not fit, or ``cfg`` lacks our keys.
    """
    require_keys(cfg)
    bottom_up = find_bottom_up(cfg.MODEL.FPN.BOTTOM_UP)(cfg, input_shape)
    if isinstance(getattr(bottom_up, "bottom_up", None), Backbone):
        logger.info(
            "MODEL.FPN.BOTTOM_UP %s builds a whole pyramid: its bottom-up pathway is used", cfg.MODEL.FPN.BOTTOM_UP
        )
        bottom_up = bottom_up.bottom_up
    if cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING and not isinstance(bottom_up, TimmBackbone | ViTBackbone):
        checkpoint_stages(bottom_up)  # those of timm do it themselves
    _warn_of_unused(cfg, bottom_up)
    return speed_up(build_neck(cfg, bottom_up), numerics(cfg))


def _warn_of_unused(cfg: CfgNode, bottom_up: Backbone) -> None:
    shapes = bottom_up.output_shape()
    read = [shapes[name].stride for name in cfg.MODEL.FPN.IN_FEATURES if name in shapes]
    unused = [name for name, shape in shapes.items() if read and shape.stride > max(read)]
    if unused:
        logger.warning(
            f"The bottom-up pathway computes {', '.join(unused)}, which MODEL.FPN.IN_FEATURES does not name: time is "
            "lost, and training on several GPUs stops at parameters without gradients. Leave them out of the pathway's "
            "OUT_FEATURES (MODEL.RESNETS.OUT_FEATURES for a ResNet)"
        )
