"""Numbers that a model keeps beside its parameters and buffers, which no state dict holds."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_OF_TORCH = ("training",)


class ModelNumbers:
    """The plain numbers among the attributes of a model's modules that training changes.

    RetinaNet, for one, divides its losses by a running mean of the number of objects, which is an attribute. To go on
    from a checkpoint without it would change the losses of the next hundred iterations.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: As it is before training; or its distributed wrapper.
        """
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._before = self._all()

    def state_dict(self) -> dict[str, dict[str, int | float]]:
        """Name of the module -> {attribute: number}, of those that are not as they were, or are new."""
        changed: dict[str, dict[str, int | float]] = {}
        for (module, name), number in self._all().items():
            if self._before.get((module, name)) != number:
                changed.setdefault(module, {})[name] = number
        return changed

    def load_state_dict(self, state: dict[str, dict[str, int | float]]) -> None:
        modules = dict(self._model.named_modules())
        for module, numbers in state.items():
            for name, number in numbers.items() if module in modules else ():
                setattr(modules[module], name, number)

    def _all(self) -> dict[tuple[str, str], int | float]:
        return {
            (module_name, name): value
            for module_name, module in self._model.named_modules()
            for name, value in vars(module).items()
            if type(value) in (int, float) and name not in _OF_TORCH
        }
