"""Steps of a training whose losses or gradients are not finite: not taken, written down, counted up to a limit."""

import contextlib
import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fpn_d2.checkpoint.contents import KEY
from fpn_d2.checkpoint.folder import write_checkpoint
from fpn_d2.errors import UserError, shown

from .replay import all_finite, first_bad_gradient, gradient_norms, losses_and_first, plain_batch

logger = logging.getLogger(__name__)

FOLDER = "bad_steps"
_IN_A_ROW = 2  # after so many, of as many batches, it is the weights


class BadSteps:
    """Watches the steps of one training.

    Attributes:
        count: Steps that were not taken, in all processes the same.
        in_a_row: Of them, those since the last that was.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str,
        limit: int,
        *,
        config: str,
        where: Callable[[], tuple[int, int]],
        rate: Callable[[], float],
        batch: Callable[[], list[dict]],
        numbers: Callable[[], dict],
        context: Callable[[], contextlib.AbstractContextManager],
        scaled: bool = False,
    ):
        """
        Args:
            model: The model, or its distributed wrapper.
            folder: OUTPUT_DIR.
            limit: How many steps may be left out (SOLVER.MAX_BAD_STEPS).
            config: The configuration as text, for `replay`.
            where: Gives the iteration, and the seed of its random choices.
            rate: Gives the learning rate.
            batch: Gives the batch.
            numbers: Gives what `ModelNumbers` keeps.
            context: Makes the context of a forward pass.
            scaled: Whether a loss scaler looks at the gradients, to which infinite ones belong.
        """
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._folder, self._limit, self._config = folder, limit, config
        self._where, self._rate, self._batch, self._numbers, self._context = where, rate, batch, numbers, context
        self._scaled = scaled
        self._weights = ""  # the file that has those of the steps in a row
        self._moving = [
            (module, name)
            for module in self._model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            for name in ("running_mean", "running_var", "num_batches_tracked")
        ]
        self._before: list[Tensor] = []
        self.count = self.in_a_row = 0

    def before_step(self) -> None:
        """Keep the running statistics of norms, which a forward pass changes."""
        self._before = [getattr(module, name).clone() for module, name in self._moving]

    def bad_losses(self, losses: dict[str, Tensor], error: str) -> bool:
        """Whether a step is not to be taken because of its losses, in this process or in another.

        Args:
            losses: Of the forward pass.
            error: What ended it instead; "": nothing.

        Raises:
            UserError: There are more such steps than the limit. The text says the likely causes.
        """
        bad = bool(error) or not all_finite(losses)
        if comm.get_world_size() > 1:
            flag = torch.tensor(float(bad), device=next(self._model.parameters()).device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            bad = bool(flag)
        if bad:
            self._leave_out(losses, error)
        return bad

    def bad_gradients(self, losses: dict[str, Tensor]) -> bool:
        """Whether a step is not to be taken because of its gradients, which are the same in all processes.

        Raises:
            UserError: As `bad_losses`.
        """
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        largest = [torch.linalg.vector_norm(gradient, float("inf")).float() for gradient in gradients]
        if self._scaled or not largest or bool(torch.isfinite(torch.stack(largest)).all()):
            self.in_a_row = 0
            return False
        self._leave_out(losses, "")
        return True

    def _leave_out(self, losses: dict[str, Tensor], error: str) -> None:
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        told = self._write_down(losses, error)
        if self.count > self._limit:
            raise UserError(self._causes(told))
        logger.warning("%s. The step is not taken, the %d. of at most %d", told, self.count, self._limit)

    def diverged(self) -> bool:
        """Whether the weights, and not a batch, are the likely cause: nothing is to be saved then."""
        return self.in_a_row >= _IN_A_ROW

    def _write_down(self, losses: dict[str, Tensor], error: str) -> str:
        """Write a file for `replay`; what happened, in words."""
        iteration, seed = self._where()
        numbers, norms, batch = self._numbers(), gradient_norms(self._model), self._batch()
        first = ""
        if batch:
            with torch.no_grad():
                first = losses_and_first(self._model, batch, seed, self._context)[1]
        for (module, name), value in zip(self._moving, self._before, strict=True):
            getattr(module, name).copy_(value)
        for module, values in numbers.items():
            vars(self._model.get_submodule(module)).update(values)
        first = first or first_bad_gradient(norms)
        name = f"{iteration:07d}_rank{comm.get_rank()}.pth"
        if self.in_a_row == 1 or not self._weights:
            self._weights = f"{iteration:07d}_rank0.pth"
        step = {
            "iteration": iteration,
            "seed": seed,
            "learning_rate": self._rate(),
            "losses": {key: float(loss.detach()) for key, loss in losses.items()},
            "first": first,
            "gradient_norms": norms,
            "files": [str(image.get("file_name")) for image in batch],
            "batch": plain_batch(batch),
            "numbers": numbers,
            "weights": self._weights,
        }
        content = {"step": step, KEY: {"config": self._config}}
        if name == self._weights:
            content["model"] = self._model.state_dict()
        where = ""
        if "://" not in self._folder and batch:
            os.makedirs(os.path.join(self._folder, FOLDER), exist_ok=True)
            path = os.path.join(self._folder, FOLDER, name)
            write_checkpoint(content, path)
            where = f"; `fpn-d2 replay {path}` makes it again"
        said = error or ", ".join(f"{key} {value:.4g}" for key, value in step["losses"].items())
        return (
            f"Iteration {iteration}: not finite{f', first in {first}' if first else ''} ({said}), with the images "
            f"{shown(', '.join(step['files']), 300)}{where}"
        )

    def _causes(self, told: str) -> str:
        broken = next((name for name, value in self._model.state_dict().items() if not all_finite(value)), "")
        weights = f"the weights are not finite either ({broken}); " if broken else ""
        return (
            f"the loss or its gradient is infinite or no number in {self.count} steps, of which none was taken; "
            f"SOLVER.MAX_BAD_STEPS is {self._limit}. {told}. Most often SOLVER.BASE_LR is too high ({weights}the rate "
            f"was {self._rate():g}): try a tenth of it, a longer SOLVER.WARMUP_ITERS, or SOLVER.CLIP_GRADIENTS.ENABLED "
            "True; with SOLVER.AMP.ENABLED, try without; weights of another model, and boxes far too large, do it too"
        )
