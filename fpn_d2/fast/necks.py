"""The FPN's sum of a lateral and what comes down from above, in place where nobody needs the lateral."""

from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from .convolution import FastConvolution
from .guard import Fast, are_plain, is_itself, need_gradients, need_not_be_called

_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.GroupNorm)


class FastFPN(Fast):
    """The FPN of this package, and necks made from it."""

    REPLACES = ("merge",)

    def merge(self, level: int, lateral: Tensor | None, coarser: Tensor, size: tuple[int, int]) -> Tensor:
        """Join a level's lateral with what comes down from above; see ``FPN.merge``."""
        if lateral is None or not self._owns(level, lateral, coarser):
            return super().merge(level, lateral, coarser, size)
        return add_nearest(lateral, coarser)

    def _owns(self, level: int, lateral: Tensor, coarser: Tensor) -> bool:
        """Whether ``lateral`` is fresh from a convolution that nobody watches, and :func:`add_nearest` fits it."""
        conv, upsample = getattr(self, f"fpn_lateral{level}"), getattr(self, f"fpn_upsample{level}")
        return (
            is_itself(self)
            and are_plain(lateral, coarser)
            and not need_gradients(lateral, coarser)
            and self.upsample == "nearest"
            and self._fuse_type == "sum"
            and need_not_be_called(upsample, type(upsample))
            and isinstance(conv, FastConvolution)
            and need_not_be_called(conv)
            and conv.activation is None
            and (conv.norm is None or (type(conv.norm) in _NORMS and need_not_be_called(conv.norm, type(conv.norm))))
            and lateral.dtype == coarser.dtype
            and all(2 * a - b in (0, 1) for a, b in zip(coarser.shape[2:], lateral.shape[2:], strict=True))
        )


def add_nearest(finer: Tensor, coarser: Tensor) -> Tensor:
    """Add ``coarser``, up-sampled by repeating cells, to ``finer`` in place: no up-sampled map is ever made.

    Args:
        finer: (N, C, H, W), changed.
        coarser: (N, C, ceil(H / 2), ceil(W / 2)).

    Returns:
        ``finer``; to the last bit what adding the up-sampled map gives.
    """
    height, width = finer.shape[-2:]
    h, w = height // 2, width // 2
    # As (..., h, 2, w, 2), where a coarser cell is one number for a block of four; what is odd is added as strips.
    blocks = finer[..., : 2 * h, : 2 * w].unflatten(3, (w, 2)).unflatten(2, (h, 2))
    blocks += coarser[..., :h, None, :w, None]
    if height > 2 * h:
        row = finer[..., -1, : 2 * w].unflatten(2, (w, 2))
        row += coarser[..., h, :w, None]
    if width > 2 * w:
        column = finer[..., : 2 * h, -1].unflatten(2, (h, 2))
        column += coarser[..., :h, w, None]
    if height > 2 * h and width > 2 * w:
        finer[..., -1, -1] += coarser[..., h, w]
    return finer
