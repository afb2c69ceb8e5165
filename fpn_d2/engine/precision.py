"""The inner training loop for each precision: float32, float16 with loss scaling, bfloat16."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn

from fpn_d2.errors import UserError


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Data type of the forward pass in training, or None where SOLVER.AMP.ENABLED is off.

    Raises:
        UserError: For an unknown SOLVER.AMP.DTYPE, and for float16 on a CPU.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    name = cfg.SOLVER.AMP.DTYPE
    if name == "auto":
        return torch.float16 if on_gpu else torch.bfloat16
    if name not in ("float16", "bfloat16"):
        raise UserError(f"SOLVER.AMP.DTYPE must be auto, float16 or bfloat16, not {name!r}")
    if name == "float16" and not on_gpu:
        raise UserError(
            f"SOLVER.AMP.DTYPE float16 needs a GPU, but MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: "
            "set it to bfloat16, or to auto"
        )
    return getattr(torch, name)


def precision_name(cfg: CfgNode) -> str:
    """"float32", "bfloat16" or "float16": `amp_dtype` in a word."""
    return str(amp_dtype(cfg) or torch.float32).removeprefix("torch.")


def autocast(cfg: CfgNode) -> contextlib.AbstractContextManager:
    """Context in which a forward pass has the precision of training; it does nothing where AMP is off."""
    dtype = amp_dtype(cfg)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=dtype)


class BadStep(Exception):
    """A step came to nothing finite, here or in another process: it is not to be taken."""


class StepWatch(Protocol):
    """Who is asked about each step; in all processes alike."""

    def bad_losses(self, losses: dict[str, torch.Tensor], error: str) -> bool:
        """After the forward pass: whether to leave the step out. ``error``: what ended the pass instead of losses."""

    def bad_gradients(self, losses: dict[str, torch.Tensor]) -> bool:
        """After the backward pass: the same."""


class Watched:
    """Beside one of Detectron2's inner trainers: leaves out the steps of which its `watch` says so."""

    watch: StepWatch | None = None

    def run_step(self) -> None:
        if self.watch is None:
            super().run_step()
            return
        model = self.model
        self.model = _WatchedModel(model, self.watch)
        try:
            super().run_step()
        except BadStep:
            pass
        finally:
            self.model = model

    def _write_metrics(self, loss_dict: dict[str, torch.Tensor], *args: object, **kwargs: object) -> None:
        # Called between the backward pass and the optimizer's step, in v0.6 and in the main branch.
        if self.watch is not None and self.watch.bad_gradients(loss_dict):
            raise BadStep
        super()._write_metrics(loss_dict, *args, **kwargs)


class _WatchedModel:
    def __init__(self, model: nn.Module, watch: StepWatch):
        self._model = model
        self._watch = watch

    @property
    def training(self) -> bool:
        return self._model.training

    def __call__(self, data: list[dict]) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = {}
        error = ""
        try:
            losses = self._model(data)
        except FloatingPointError as raised:  # Detectron2's RPN looks at its own boxes
            error = str(raised)
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        if self._watch.bad_losses(losses, error):
            raise BadStep
        return losses


class WatchedTrainer(Watched, SimpleTrainer):
    """Detectron2's `SimpleTrainer`, which can leave out a step."""


class WatchedAMPTrainer(Watched, AMPTrainer):
    """Detectron2's `AMPTrainer`, which can leave out a step."""


class AutocastTrainer(WatchedTrainer):
    """Detectron2's `SimpleTrainer` with the forward pass under autocast: bfloat16 needs no loss scaling."""

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        context: Callable[[], contextlib.AbstractContextManager],
    ):
        """
        Args:
            model, data_loader, optimizer: As in `SimpleTrainer`.
            context: Makes the context of one forward pass.
        """
        super().__init__(model, data_loader, optimizer)
        self._context = context

    def run_step(self) -> None:
        # The inherited step calls self.model once; only that call belongs under autocast, the backward pass does not.
        model = self.model
        self.model = _InContext(model, self._context)
        try:
            super().run_step()
        finally:
            self.model = model


class _InContext:
    def __init__(self, model: nn.Module, context: Callable[[], contextlib.AbstractContextManager]):
        self._model = model
        self._context = context

    @property
    def training(self) -> bool:
        return self._model.training

    def __call__(self, data: list[dict]) -> dict[str, torch.Tensor]:
        with self._context():
            return self._model(data)


def build_inner_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """Detectron2's `SimpleTrainer` or `AMPTrainer` where they serve, else `AutocastTrainer`."""
    dtype = amp_dtype(cfg)
    if dtype is None:
        return WatchedTrainer(model, data_loader, optimizer)
    if dtype == torch.float16:
        return WatchedAMPTrainer(model, data_loader, optimizer)
    return AutocastTrainer(model, data_loader, optimizer, lambda: autocast(cfg))
