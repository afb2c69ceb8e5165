"""The optimizer that SOLVER.OPTIMIZER names, with Detectron2's parameter groups and gradient clipping."""

import contextlib
import logging

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from fpn_d2.errors import UserError
from fpn_d2.fast.apply import numerics

from .bottom_up_rates import own_groups, split_groups

logger = logging.getLogger(__name__)

OPTIMIZERS = ("SGD", "AdamW")


def scale_learning_rate(cfg: CfgNode) -> CfgNode:
    """Scale SOLVER.BASE_LR from SOLVER.BASE_LR_BATCH_SIZE to SOLVER.IMS_PER_BATCH, and say so.

    Args:
        cfg: Stays as it is.

    Returns:
        The configuration to train with: ``cfg`` itself where nothing changes.
    """
    meant, size = cfg.SOLVER.BASE_LR_BATCH_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if meant in (0, size):
        return cfg
    if meant < 0:
        raise UserError(f"SOLVER.BASE_LR_BATCH_SIZE is {meant}; expected a number of images, or 0")
    scaled = cfg.clone()
    scaled.defrost()
    scaled.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR * size / meant
    scaled.SOLVER.BASE_LR_BATCH_SIZE = size
    if cfg.is_frozen():
        scaled.freeze()
    logger.info(
        "SOLVER.BASE_LR: %g for batches of %d images becomes %g x %d / %d = %g for batches of %d",
        cfg.SOLVER.BASE_LR, meant, cfg.SOLVER.BASE_LR, size, meant, scaled.SOLVER.BASE_LR, size,
    )
    return scaled


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build Detectron2's SGD, or AdamW (Loshchilov and Hutter, ICLR 2019) from the same keys.

    On a CPU and with MODEL.NUMERICS "fast", SGD takes its step in one pass, which rounds otherwise.

    AdamW reads BASE_LR, WEIGHT_DECAY, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR and CLIP_GRADIENTS. Both
    read SOLVER.BOTTOM_UP_*; see `bottom_up_rates`.

    Raises:
        UserError: SOLVER.OPTIMIZER is neither.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if name == "SGD" and not (on_cpu and numerics(cfg) == "fast") and not own_groups(cfg):
        return solver.build_optimizer(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    if own_groups(cfg):
        groups = split_groups(cfg, model, groups)
    options = {"lr": cfg.SOLVER.BASE_LR}
    if name == "SGD":
        options.update(momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV)
    optimizer = maybe_add_gradient_clipping(cfg, getattr(torch.optim, name))
    # One pass over the parameters instead of several. Not on a GPU: there a fused step undoes the loss scaling itself,
    # after gradients were clipped that were still scaled.
    if on_cpu and (name != "SGD" or numerics(cfg) == "fast"):
        with contextlib.suppress(RuntimeError, TypeError):  # before torch 2.4 for GPUs only
            return optimizer(groups, **options, fused=True)
    return optimizer(groups, **options)
