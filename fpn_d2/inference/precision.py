"""Lower precision at inference: which parts of a detector take it, and what is handed over between them."""

import functools
import logging

import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import nn

from fpn_d2.fast.guard import Fast
from fpn_d2.modeling.poolers import CombiningROIPooler
from fpn_d2.modeling.roi_heads import FPNCascadeROIHeads, FPNROIHeads
from fpn_d2.modeling.rpn import FPNRPN

logger = logging.getLogger(__name__)

DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
# Networks that take maps or RoIs and are handed on in float32; of subclasses nobody knows what they compute.
_HEADS = (
    *(StandardRPNHead, RetinaNetHead, SemSegFPNHead),
    *(FastRCNNConvFCHead, MaskRCNNConvUpsampleHead, KRCNNConvDeconvUpsampleHead),
)
# What reads the backbone's maps through such networks and poolers alone.
_READERS = (RPN, FPNRPN, StandardROIHeads, CascadeROIHeads, FPNROIHeads, FPNCascadeROIHeads, Res5ROIHeads)


def lower_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the known parts of ``model`` compute in ``dtype``, in place; between all others float32 is handed on.

    Args:
        model: in evaluation mode.
        dtype: torch.bfloat16 or torch.float16.
    """
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module):
        run_in(backbone, dtype)
        if not _all_readers_are_known(model):
            backbone.register_forward_hook(_to_float32)
            logger.info(f"The backbone hands on float32: a {type(model).__name__} has others that read them")
    heads = [module for module in model.modules() if _kind(module) in _HEADS]
    res5 = [module.res5 for module in model.modules() if _kind(module) is Res5ROIHeads]
    for head in [*heads, *res5]:
        run_in(head, dtype)
        # What follows in the same class, as the loss-free part of a mask head, reads the last layer's output.
        last = getattr(head, "predictor", getattr(head, "score_lowres", head))
        last.register_forward_hook(_to_float32)
    for pooler in model.modules():
        if isinstance(pooler, CombiningROIPooler):
            pooler.extractor.to(dtype)
            pooler.register_forward_pre_hook(functools.partial(_maps_to, dtype=dtype))


def _kind(module: nn.Module) -> type:
    return type(module).plain if isinstance(module, Fast) else type(module)


def _all_readers_are_known(model: nn.Module) -> bool:
    readers = [child for name, child in model.named_children() if name != "backbone"]
    if isinstance(model, RetinaNet):
        readers = [model.head]
    for reader in readers:
        parts = [child for name, child in reader.named_children() if name.endswith("_head")]
        parts = [one for part in parts for one in (part if isinstance(part, nn.ModuleList) else [part])]
        if _kind(reader) not in (*_READERS, *_HEADS) or any(_kind(part) not in _HEADS for part in parts):
            return False
    return True


def run_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring ``module`` to ``dtype``, and what it is called with from now on."""
    module.to(dtype)
    module.register_forward_pre_hook(functools.partial(_inputs_to, dtype=dtype))


# Functions of the module, not of the moment: the model can be copied and saved.
def _inputs_to(module: nn.Module, args: tuple, dtype: torch.dtype) -> tuple:
    return _cast(args, dtype)


def _maps_to(module: nn.Module, args: tuple, dtype: torch.dtype) -> tuple:
    return _cast(args[0], dtype), *args[1:]


def _to_float32(module: nn.Module, args: tuple, output: object) -> object:
    return _cast(output, torch.float32)


def _cast(value, dtype: torch.dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value
