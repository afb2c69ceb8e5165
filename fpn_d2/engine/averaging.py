"""Moving average of the weights (SOLVER.EMA_DECAY): what is evaluated and saved, while the training goes its way."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fpn_d2.errors import UserError


class WeightAveraging(HookBase):
    """Averages the parameters after each iteration, with weights that fall off exponentially.

    After n updates the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that a short training is not held
    back by where it started. Buffers, as the statistics of batch norms, are the model's own. It goes before hooks that
    save or evaluate: those do so `applied`. A checkpoint's "model" is the average, and this hook's state what the
    training goes on from.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: Or its distributed wrapper.
            decay: In [0, 1), usually 0.99 to 0.9999.

        Raises:
            UserError: It is out of that range.
        """
        if not 0 <= decay < 1:
            raise UserError(f"SOLVER.EMA_DECAY is {decay}; expected at least 0 and less than 1, as 0.999")
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._decay = decay
        self._updates = 0
        try:
            self._average = AveragedModel(nn.ParameterList(self._live().values()), multi_avg_fn=self._move)
        except TypeError:
            raise UserError("SOLVER.EMA_DECAY needs torch 2.1 or newer: install it, or set the key to 0") from None
        self._kept: dict[str, Tensor] | None = None  # the training's own, while the average is in the model

    def after_step(self) -> None:
        self._average.update_parameters(nn.ParameterList(self._live().values()))
        self._updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average, inside; the training's own weights come back afterwards, to the bit."""
        if self._kept is not None or not self._updates:
            yield
            return
        self._kept = {name: value.detach().clone() for name, value in self._live().items()}
        try:
            _copy(self._average.module, self._live().values())
            yield
        finally:
            kept, self._kept = self._kept, None
            _copy(kept.values(), self._live().values())

    def stay(self) -> None:
        """Leave the average in the model: the training is over."""
        if self._updates:
            _copy(self._average.module, self._live().values())

    def state_dict(self) -> dict:
        own = self._kept or {name: value.detach() for name, value in self._live().items()}
        return {"updates": self._updates, "trained": own}

    def load_state_dict(self, state: dict) -> None:
        """Go on; the model has been loaded from the same checkpoint, and so has the average."""
        self._updates = state["updates"]
        if not self._updates:
            return
        live = self._live()
        _copy(live.values(), self._average.module)
        self._average.n_averaged.fill_(self._updates)
        _copy([state["trained"].get(name, value) for name, value in live.items()], live.values())

    def _live(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())

    @torch.no_grad()
    def _move(self, average: list[Tensor], own: list[Tensor], _: object) -> None:
        n = self._updates
        torch._foreach_lerp_(average, own, 1.0 - min(self._decay, (1 + n) / (10 + n)))


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for value, place in zip(source, target, strict=True):
        place.copy_(value)
