"""The one table of what is made faster, and the one function that applies it; the only reader of ``MODEL.NUMERICS``."""

import functools

from detectron2.config import CfgNode
from torch import nn

from fpn_d2.config import require_keys
from fpn_d2.errors import UserError

from .blocks import FastBasicBlock, FastBottleneckBlock, FastKeypointHead, FastStem
from .convolution import FastConvolution, FastSameConvolution, FastTorchConvolution
from .detections import FastBoxPredictor
from .group_norm import FastGroupNorm
from .guard import Fast, mixed
from .linear import FastBoxHead
from .necks import FastFPN
from .norms import FastFrozenNormAct
from .poolers import FastLevelPooler, FastROIPooler
from .proposals import FastRPN

NUMERICS = ("fast", "exact")

# A plain class by name, whether it comes from below or from above this room, and what is mixed in before it. It serves
# for classes made from the plain one, too, if they override none of what it replaces.
TABLE: dict[str, type[Fast]] = {
    "detectron2.layers.wrappers.Conv2d": FastConvolution,
    "torch.nn.modules.conv.Conv2d": FastTorchConvolution,
    "torch.nn.modules.normalization.GroupNorm": FastGroupNorm,
    "timm.layers.conv2d_same.Conv2dSame": FastSameConvolution,
    "timm.layers.norm_act.FrozenBatchNormAct2d": FastFrozenNormAct,
    "detectron2.modeling.backbone.resnet.BasicStem": FastStem,
    "detectron2.modeling.backbone.resnet.BasicBlock": FastBasicBlock,
    "detectron2.modeling.backbone.resnet.BottleneckBlock": FastBottleneckBlock,
    "detectron2.modeling.proposal_generator.rpn.RPN": FastRPN,
    "detectron2.modeling.roi_heads.box_head.FastRCNNConvFCHead": FastBoxHead,
    "detectron2.modeling.roi_heads.fast_rcnn.FastRCNNOutputLayers": FastBoxPredictor,
    "detectron2.modeling.roi_heads.keypoint_head.KRCNNConvDeconvUpsampleHead": FastKeypointHead,
    "detectron2.modeling.poolers.ROIPooler": FastROIPooler,
    "fpn_d2.modeling.poolers.PyramidROIPooler": FastLevelPooler,
    "fpn_d2.modeling.necks.fpn.FPN": FastFPN,
}


def numerics(cfg: CfgNode) -> str:
    """Read ``cfg.MODEL.NUMERICS``.

    Raises:
        UserError: it is neither "fast" nor "exact", or the configuration lacks our keys.
    """
    require_keys(cfg)
    if cfg.MODEL.NUMERICS not in NUMERICS:
        raise UserError(f"MODEL.NUMERICS is {cfg.MODEL.NUMERICS!r}; expected one of {', '.join(NUMERICS)}")
    return cfg.MODEL.NUMERICS


def speed_up(module: nn.Module, numerics: str) -> nn.Module:
    """What every registered builder ends with: :func:`make_fast` if ``numerics`` is "fast"; nothing if "exact".

    Raises:
        UserError: it is neither.
    """
    if numerics not in NUMERICS:
        raise UserError(f"numerics is {numerics!r}; expected one of {', '.join(NUMERICS)}")
    return make_fast(module) if numerics == "fast" else module


def make_fast(module: nn.Module) -> nn.Module:
    """Let ``module`` and all in it compute faster, in place, in training too; results differ by float rounding.

    Each module stays the object that it is, with its parameters, hooks and names; only its class changes. No weights
    are kept in a second form: whoever writes to them, in whatever way, is heard at once.

    Returns:
        ``module``.
    """
    for child in module.modules():
        kind = fast_class(type(child))
        if kind is not None:
            child.__class__ = kind
    return module


def make_plain(module: nn.Module) -> nn.Module:
    """Undo :func:`make_fast`, in place."""
    for child in module.modules():
        if isinstance(child, Fast):
            child.__class__ = type(child).plain
    return module


@functools.cache
def fast_class(kind: type) -> type | None:
    """The class that a module of class ``kind`` becomes; None where there is none, or it is one already."""
    if issubclass(kind, Fast):
        return None
    for base in kind.__mro__:
        mixin = TABLE.get(f"{base.__module__}.{base.__qualname__}")
        if mixin is not None:
            if any(getattr(kind, name) is not getattr(base, name) for name in mixin.REPLACES):
                return None
            return mixed(mixin, kind)
    return None
