"""Going on with another optimizer, other settings of it, or another precision than a checkpoint was saved with."""

import logging

import torch
from detectron2.engine import SimpleTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from fpn_d2.errors import UserError

logger = logging.getLogger(__name__)

# What an optimizer keeps for each tensor is of a kind that these settings tell.
_TELLING = ("momentum", "betas", "alpha", "rho", "lr_decay")


def optimized_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the tensors that ``optimizer`` changes, in the order in which its state numbers them."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]


def load_inner(inner: SimpleTrainer, state: dict, names: list[str] | None, precision: str | None, own: str) -> None:
    """Load what a checkpoint holds of Detectron2's inner trainer: the optimizer's state, and the loss scale of float16.

    The settings (learning rate, momentum, weight decay, ...) are the configuration's; what is loaded is the memory
    that the optimizer has of each tensor, found by the tensor's name. Another kind of optimizer, and a loss scale where
    there was none, start anew, with a warning.

    Args:
        inner: The trainer.
        state: Its state in the checkpoint.
        names: `optimized_names` when it was saved; None: it does not say.
        precision, own: "float32", "bfloat16" or "float16": then (None: it does not say), and now.

    Raises:
        UserError: It cannot be told which tensor a state belongs to.
    """
    if precision and precision != own:
        logger.warning("The training was in %s and goes on in %s: its weights are float32 in both", precision, own)
    _load_optimizer(inner, state["optimizer"], names)
    scaler = getattr(inner, "grad_scaler", None)
    if scaler is not None and "grad_scaler" in state:
        scaler.load_state_dict(state["grad_scaler"])


def _load_optimizer(inner: SimpleTrainer, saved: dict, names: list[str] | None) -> None:
    optimizer = inner.optimizer
    settings = optimizer.state_dict()
    if _kind(saved) != _kind(settings):
        logger.warning(
            "The checkpoint's optimizer was another one (with %s) than SOLVER.OPTIMIZER is now (with %s): the weights "
            "and the schedule go on, what it remembers of each tensor starts anew",
            " and ".join(_kind(saved)) or "nothing", " and ".join(_kind(settings)) or "nothing",
        )
        return
    _say_changes(saved, settings)
    own_names = optimized_names(inner.model, optimizer)
    if names is None:  # saved by Detectron2, or by an older version: the order is all there is
        sizes = [[len(group["params"]) for group in s["param_groups"]] for s in (saved, settings)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the checkpoint's optimizer has {sum(sizes[0])} tensors in {len(sizes[0])} groups, this model's "
                f"{sum(sizes[1])} in {len(sizes[1])}, and it does not name them: resume with the MODEL.BACKBONE."
                "FREEZE_AT and SOLVER.WEIGHT_DECAY_* of the checkpoint, or start anew from its weights (MODEL.WEIGHTS)"
            )
        state = saved["state"]
    else:
        known = {name: saved["state"][k] for k, name in enumerate(names) if k in saved["state"]}
        state = {k: known[name] for k, name in enumerate(own_names) if name in known}
        new = set(own_names) - set(names)
        if new:
            logger.warning(
                "%d tensors that were frozen are trained now: the optimizer's memory of them is new", len(new)
            )
            like = next(iter(known.values()), {})
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            # As at a first step; an optimizer that does all tensors at once wants every one to have a memory, or none.
            state |= {k: _empty(like, parameters[k]) for k, name in enumerate(own_names) if name in new}
    optimizer.load_state_dict({**settings, "state": state})


def _empty(like: dict, parameter: torch.Tensor) -> dict:
    """What an optimizer remembers of a tensor before its first step, with the entries of ``like``."""
    return {
        key: torch.zeros_like(value) if value.dim() == 0 else torch.zeros_like(parameter)
        for key, value in like.items()
        if isinstance(value, torch.Tensor)
    }


def put_rates(scheduler: LRScheduler, base_rates: list[float]) -> None:
    """Have ``scheduler`` go on where it is, with the learning rates of the configuration instead of the checkpoint's.

    Args:
        scheduler: Its state is loaded.
        base_rates: Of the configuration, one for each group of the optimizer.
    """
    scheduler.base_lrs = list(base_rates)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _kind(state: dict) -> list[str]:
    return [key for key in _TELLING if any(key in group for group in state["param_groups"])]


def _say_changes(saved: dict, settings: dict) -> None:
    """Warn of settings that the checkpoint had otherwise."""

    def values(state: dict, key: str) -> set:
        return {str(group[key]) for group in state["param_groups"] if key in group}

    for key in ("initial_lr", "momentum", "nesterov", "betas", "weight_decay"):
        before, now = values(saved, key), values(settings, key)
        if before and before != now:
            logger.warning(
                "The optimizer's %s was %s in the checkpoint and is %s: the configuration's is taken",
                key, ", ".join(sorted(before)), ", ".join(sorted(now)),
            )
