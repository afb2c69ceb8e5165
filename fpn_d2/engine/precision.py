"""The inner training loop for each precision: float32, float16 with loss scaling, bfloat16."""

import contextlib
from collections.abc import Callable, Iterable

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


def autocast(cfg: CfgNode) -> contextlib.AbstractContextManager:
    """Context in which a forward pass has the precision of training; it does nothing where AMP is off."""
    dtype = amp_dtype(cfg)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=dtype)


class AutocastTrainer(SimpleTrainer):
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
    """Detectron2's own `SimpleTrainer` or `AMPTrainer` where they serve, else `AutocastTrainer`."""
    dtype = amp_dtype(cfg)
    if dtype is None:
        return SimpleTrainer(model, data_loader, optimizer)
    if dtype == torch.float16:
        return AMPTrainer(model, data_loader, optimizer)
    return AutocastTrainer(model, data_loader, optimizer, lambda: autocast(cfg))
