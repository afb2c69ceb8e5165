"""Weights in another form, kept from one inference to the next."""

from collections.abc import Callable, Sequence

from torch import Tensor


class PackedWeights:
    """Transformed weights of one layer, kept for as long as what they were made from stays the same.

    Copies and pickles of it are empty.
    """

    def __init__(self):
        # By form, in one value that other threads find whole: what it was made from, what was made, and the memory that
        # it was made from, which nobody else can then be given.
        self._kept: dict[str, tuple[tuple, object, list]] = {}

    def __reduce__(self) -> tuple:
        return PackedWeights, ()

    def clear(self) -> None:
        """Forget them."""
        self._kept = {}

    def get(self, form: str, tensors: Sequence[Tensor], make: Callable[[], object]) -> object:
        """Return what ``make()`` returned.

        Args:
            form: the name of the form; each is kept by itself.
            tensors: what it is made from: as long as these are the same and nobody wrote to them, so is it.
            make: makes it.
        """
        if any(tensor.is_inference() for tensor in tensors):  # these do not say when they were written to
            return make()
        made_from = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
        kept = self._kept.get(form)
        if kept is None or kept[0] != made_from:
            kept = self._kept[form] = made_from, make(), [tensor.untyped_storage() for tensor in tensors]
        return kept[1]
