"""A trained model made faster for inference, with the same detections."""

import copy
import functools

import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn

from fpn_d2.fast.box_predictor import FPNBoxPredictor
from fpn_d2.fast.convolution import fuse_norms, use_fast_convolutions
from fpn_d2.fast.linear import use_onednn
from fpn_d2.modeling.level_assign import CanonicalLevelAssigner
from fpn_d2.modeling.poolers import CombiningROIPooler, PyramidROIPooler
from fpn_d2.modeling.rpn import FPNRPN

DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of ``model`` that runs faster; ``model`` itself stays as it is.

    Normalisations are folded into their convolutions, maps are kept channels-last, 3x3 convolutions take fewer
    products, residual blocks add and rectify within a convolution, fully connected layers run through oneDNN, the RPN
    decodes only the anchors that it keeps, and RoIs are pooled by this package's operation. In float32 the detections
    are the same within float rounding. On a CPU the weights of convolutions are kept in a second form, those of 3x3
    ones of four times their size; ``FPN_D2_CONV=direct`` in the environment saves it.

    Args:
        model: a ``GeneralizedRCNN`` (or a meta-architecture made from it, as ``PanopticFPN``) or ``RetinaNet`` with a
            pyramid, Detectron2's own or one of ours, with its weights loaded.
        dtype: ``torch.bfloat16`` or ``torch.float16`` for lower precision in convolutions and fully connected layers;
            box decoding, scores and NMS stay in float32. It is never used unless asked for.

    Returns:
        The copy, in evaluation mode, called like ``model``. It cannot be trained, and has other parameter names.

    Raises:
        TypeError: ``model`` is of another kind, or ``dtype`` is none of the above.

    Example:
        >>> predictor = DefaultPredictor(cfg)
        >>> predictor.model = fpn_d2.optimize_for_inference(predictor.model)
    """
    if not isinstance(model, GeneralizedRCNN | RetinaNet):
        raise TypeError(
            f"optimize_for_inference got a {type(model).__name__}; expected a GeneralizedRCNN or a RetinaNet (for a "
            "model wrapped for several GPUs, its .module)"
        )
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype!r}; expected None, torch.float32, torch.bfloat16 or torch.float16")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fuse_norms(model)
    use_fast_convolutions(model)
    use_onednn(model)
    _swap(model, RPN, _fast_rpn)
    _swap(model, ROIPooler, _fast_pooler)
    _swap(model, FastRCNNOutputLayers, FPNBoxPredictor.taking_over)
    for module in model.modules():
        if isinstance(module, FPNRPN):
            module.exact = False
        if isinstance(module, PyramidROIPooler) and hasattr(module.level_poolers[0], "aligned"):
            module.exact = False
    model.to(memory_format=torch.channels_last)  # forward alone, a group norm too is fast so
    if dtype in (torch.bfloat16, torch.float16):
        _lower_precision(model, dtype)
    return model


def _swap(module: nn.Module, kind: type, make) -> None:
    """Replace each child of exactly this type; subclasses may compute something else and are left alone."""
    for name, child in list(module.named_children()):
        if type(child) is kind:
            setattr(module, name, make(child))
        else:
            _swap(child, kind, make)


def _fast_rpn(rpn: RPN) -> FPNRPN:
    fast = FPNRPN.__new__(FPNRPN)
    fast.__dict__ = rpn.__dict__
    fast.level_loss_weights = [1.0] * len(rpn.in_features)
    return fast


def _fast_pooler(pooler: ROIPooler) -> nn.Module:
    first = pooler.level_poolers[0]
    scales = [level.spatial_scale for level in pooler.level_poolers]
    kind = {True: "ROIAlignV2", False: "ROIAlign"}.get(getattr(first, "aligned", None))
    if kind is None:  # RoIPool or rotated boxes: nothing faster here
        return pooler
    return PyramidROIPooler(
        output_size=tuple(pooler.output_size),
        scales=scales,
        sampling_ratio=first.sampling_ratio,
        pooler_type=kind,
        assigner=lambda levels: CanonicalLevelAssigner(levels, pooler.canonical_box_size, pooler.canonical_level),
    )


def _lower_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Run the parts with convolutions and fully connected layers in ``dtype``, and hand float32 to what decodes."""
    _run_in(model.backbone, dtype)
    heads = [model.head] if isinstance(model, RetinaNet) else [model.proposal_generator.rpn_head]
    for head in heads:
        _run_in(head, dtype)
        head.register_forward_hook(_to_float32)
    roi_heads = getattr(model, "roi_heads", None)
    branches = [getattr(roi_heads, f"{name}_head", None) for name in ("box", "mask", "keypoint")]
    for head in [*branches, getattr(model, "sem_seg_head", None)]:
        if head is None:
            continue
        for part in head if isinstance(head, nn.ModuleList) else [head]:  # one box head per stage of a cascade
            _run_in(part, dtype)
            last = getattr(part, "predictor", getattr(part, "score_lowres", part))
            last.register_forward_hook(_to_float32)
    for pooler in model.modules():
        if isinstance(pooler, CombiningROIPooler):
            pooler.extractor.to(dtype)
    if isinstance(roi_heads, Res5ROIHeads):
        _run_in(roi_heads.res5, dtype)
        roi_heads.res5.register_forward_hook(_to_float32)


def _run_in(module: nn.Module, dtype: torch.dtype) -> None:
    module.to(dtype)
    module.register_forward_pre_hook(functools.partial(_inputs_to, dtype=dtype))


# Functions of the module, not of the moment: the model can be copied and saved.
def _inputs_to(module: nn.Module, args: tuple, dtype: torch.dtype) -> tuple:
    return _cast(args, dtype)


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
