"""Other learning rates for the bottom-up pathway, or its single layers, than for what stands on it; or none at first.

Weights that have seen a million images need smaller steps than those that start from nothing, and the first layers,
which know edges and colours, smaller ones than the last: layer-wise decay, as ViTDet (Li et al., ECCV 2022) trains.
"""

import re

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_d2.errors import UserError

# A block among blocks, as in layers.0.blocks.1. or blocks.3.0., or else in res2.0. or s1.b2.
_BLOCK = re.compile(r".*\bblocks(?:\.\d+)+(?=\.)|(?:.*?\.)?b?\d+(?:\.\d+)*(?=\.)")
# Layers of ours behind a ViT, which start from nothing.
_NEW = "rescale."


def check_rates(cfg: CfgNode) -> None:
    """Check the keys of this module.

    Raises:
        UserError: one is out of its range.
    """
    factor, decay = cfg.SOLVER.BOTTOM_UP_LR_FACTOR, cfg.SOLVER.BOTTOM_UP_LAYER_DECAY
    if not 0 < factor < float("inf"):
        raise UserError(
            f"SOLVER.BOTTOM_UP_LR_FACTOR is {factor}; expected more than 0. To train nothing of the bottom-up pathway, "
            "set MODEL.BACKBONE.FREEZE_AT"
        )
    if not 0 < decay <= 1:
        raise UserError(f"SOLVER.BOTTOM_UP_LAYER_DECAY is {decay}; expected more than 0 and at most 1")


def own_groups(cfg: CfgNode) -> bool:
    """Whether the bottom-up pathway gets parameter groups of its own."""
    solver = cfg.SOLVER
    return (solver.BOTTOM_UP_LR_FACTOR, solver.BOTTOM_UP_LAYER_DECAY, solver.BOTTOM_UP_FROZEN_ITERS) != (1, 1, 0)


def split_groups(cfg: CfgNode, model: nn.Module, groups: list[dict]) -> list[dict]:
    """Split parameter groups into those of the bottom-up pathway, with their learning rates, and the rest.

    Args:
        cfg: SOLVER.BOTTOM_UP_LR_FACTOR and BOTTOM_UP_LAYER_DECAY are read.
        model: with the bottom-up pathway.
        groups: as Detectron2 makes them, each with "params" and "lr".

    Returns:
        The same parameters, in other groups: first what stays, in its order.
    """
    check_rates(cfg)
    body = bottom_up_of(model)
    factors = lr_factors([name for name, _ in body.named_parameters()], cfg.SOLVER.BOTTOM_UP_LAYER_DECAY)
    factor_of = {
        id(parameter): cfg.SOLVER.BOTTOM_UP_LR_FACTOR * factors[name] for name, parameter in body.named_parameters()
    }
    rest, own = [], []
    for group in groups:
        parts: dict[float | None, list] = {}
        for parameter in group["params"]:
            parts.setdefault(factor_of.get(id(parameter)), []).append(parameter)
        for factor, parameters in parts.items():
            if factor is None:
                rest.append({**group, "params": parameters})
            else:
                own.append({**group, "params": parameters, "lr": group["lr"] * factor})
    return rest + own


def bottom_up_of(model: nn.Module) -> nn.Module:
    """The bottom-up pathway of ``model``: the part below the neck, or else the whole backbone.

    Raises:
        UserError: The model has no backbone.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"SOLVER.BOTTOM_UP_* are for models with a backbone, which {type(model).__name__} has not: leave them out"
        )
    body = getattr(backbone, "bottom_up", None)
    return body if isinstance(body, nn.Module) else backbone


def lr_factors(names: list[str], decay: float) -> dict[str, float]:
    """For each parameter of a bottom-up pathway ``decay`` to the power of the number of layers that follow, itself too.

    A layer is a block, and what lies between two blocks belongs to the one before; what comes before the first block
    is a layer too.

    Args:
        names: of the parameters, in their order in the model.
        decay: 1: all have the same.

    Raises:
        UserError: there are no blocks to be seen in the names, and ``decay`` is not 1.
    """
    layers: dict[str, int] = {}
    number, known = 0, {}
    for name in names:
        if name.startswith(_NEW):
            continue
        block = _BLOCK.match(name)
        if block:
            number = known.setdefault(block[0], len(known) + 1)
        layers[name] = number
    if decay != 1 and not known:
        raise UserError(
            f"SOLVER.BOTTOM_UP_LAYER_DECAY is {decay}, but the names of this bottom-up pathway show no blocks, as "
            f"{', '.join(names[:2])}: set it to 1, and SOLVER.BOTTOM_UP_LR_FACTOR instead"
        )
    return {name: decay ** (len(known) + 1 - layers[name]) if name in layers else 1.0 for name in names}


class FrozenBottomUp(HookBase):
    """Keeps the bottom-up pathway as it is for the first iterations, so that a new neck and new heads cannot spoil it.

    Its parameters get no gradients, and its norms and dropouts behave as in evaluation. Where a training is resumed
    makes no difference: it all follows from the number of the iteration.
    """

    def __init__(self, model: nn.Module, iterations: int):
        """
        Args:
            model: Or its distributed wrapper, which has to find unused parameters.
            iterations: How many of the first are without the bottom-up pathway.

        Raises:
            UserError: They are less than none, or there is no such pathway.
        """
        if iterations < 0:
            raise UserError(f"SOLVER.BOTTOM_UP_FROZEN_ITERS is {iterations}; expected a number of iterations, or 0")
        self._body = bottom_up_of(model.module if isinstance(model, DistributedDataParallel) else model)
        self._iterations = iterations
        self._trained = [parameter for parameter in self._body.parameters() if parameter.requires_grad]

    def before_step(self) -> None:
        frozen = self.trainer.iter < self._iterations
        for parameter in self._trained:
            parameter.requires_grad = not frozen
        if frozen or self.trainer.iter == self._iterations:  # each time: an evaluation switches the whole model back
            self._body.train(not frozen)
