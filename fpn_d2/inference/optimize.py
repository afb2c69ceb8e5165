"""A trained model made faster for inference, with the same detections."""

import copy
import logging

import torch
from torch import nn

from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.frozen import FrozenConvolution, freeze_convolutions, transform_weights
from fpn_d2.fast.guard import Fast

from .precision import DTYPES, lower_precision

logger = logging.getLogger(__name__)


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of ``model`` that runs faster on a CPU; ``model`` itself stays as it is.

    Normalisations are folded into their convolutions, maps are kept channels-last, 3x3 convolutions take fewer
    products, residual blocks add and rectify within a convolution, box heads run through oneDNN, the RPN decodes only
    the anchors that it keeps, and RoIs are pooled by this package's operation. In float32 the detections are the same
    within float rounding. The transformed weights of 3x3 convolutions take four times the memory of the plain ones;
    ``FPN_D2_CONV=direct`` in the environment saves it.

    Args:
        model: any model of Detectron2's parts, in any meta-architecture, with its weights loaded. Parts that nothing
            here knows stay as they are, and are named in the log. Hooks stay too, and are called.
        dtype: ``torch.bfloat16`` or ``torch.float16`` for lower precision in convolutions and fully connected layers;
            box decoding, scores and NMS stay in float32. It is never used unless asked for.

    Returns:
        The copy, in evaluation mode, called like ``model``. It cannot be trained: weights of convolutions are no
        parameters any more, so that nothing can write to them unnoticed.

    Raises:
        TypeError: ``model`` is no module, or ``dtype`` is none of the above.

    Example:
        >>> predictor = DefaultPredictor(cfg)
        >>> predictor.model = fpn_d2.optimize_for_inference(predictor.model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference got a {type(model).__name__}; expected a model (an nn.Module)")
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype!r}; expected None, torch.float32, torch.bfloat16 or torch.float16")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    make_fast(model)
    freeze_convolutions(model)
    _report(model)
    if dtype in (torch.bfloat16, torch.float16):
        lower_precision(model, dtype)
    transform_weights(model)
    return model


def _report(model: nn.Module) -> None:
    """Say in the log which parts with convolutions or parameters have nothing that runs faster."""
    slow = [
        f"{name} ({type(child).__name__})"
        for name, child in model.named_children()
        if any(True for _ in child.parameters()) and not any(isinstance(m, Fast) for m in child.modules())
    ]
    found = sum(isinstance(module, FrozenConvolution) for module in model.modules())
    text = f"{found} convolutions of the {type(model).__name__} are optimised for inference"
    logger.info(f"{text}; nothing in {', '.join(slow)}" if slow else text)
