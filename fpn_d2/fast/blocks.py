"""Detectron2's stem and residual blocks, which add and rectify within their convolutions where no gradients are needed.

Their convolutions are then computed without being called; where one has hooks, or is not what it was, all are called.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import FastConvolution, accelerates, convolve
from .guard import Fast, is_itself, need_gradients, need_not_be_called


class _FastBlock(Fast):
    REPLACES = ("forward",)

    def _convolutions(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def _may_pass_over(self, x: Tensor) -> bool:
        """Whether the convolutions need not be called for ``x``, the input of the first."""
        return (
            is_itself(self)
            and all(_is_bare(conv) for conv in self._convolutions())
            and not need_gradients(x, *self.parameters())
            and accelerates(self._convolutions()[0], x)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        if not self._may_pass_over(x):
            return super().forward(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        *others, last = self._convolutions()
        for conv in others:
            x = _rectified(conv, x)
        return _rectified(last, x, shortcut)


def _is_bare(conv: nn.Module) -> bool:
    return isinstance(conv, FastConvolution) and need_not_be_called(conv) and conv.activation is None


def _rectified(conv: FastConvolution, x: Tensor, add: Tensor | None = None) -> Tensor:
    if accelerates(conv, x):
        return convolve(conv, x, relu=True, add=add)
    x = conv(x)
    return (x if add is None else x.add_(add)).relu_()


class FastBasicBlock(_FastBlock):
    """``BasicBlock``: two convolutions."""

    def _convolutions(self) -> tuple[nn.Module, ...]:
        return self.conv1, self.conv2


class FastBottleneckBlock(_FastBlock):
    """``BottleneckBlock``: three convolutions."""

    def _convolutions(self) -> tuple[nn.Module, ...]:
        return self.conv1, self.conv2, self.conv3


class FastStem(_FastBlock):
    """``BasicStem``: convolution, ReLU, max pooling."""

    def _convolutions(self) -> tuple[nn.Module, ...]:
        return (self.conv1,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, ceil(H / 4), ceil(W / 4))."""
        if not self._may_pass_over(x):
            return super().forward(x)
        return F.max_pool2d(_rectified(self.conv1, x), kernel_size=3, stride=2, padding=1)


class FastKeypointHead(Fast):
    """``KRCNNConvDeconvUpsampleHead``: Detectron2's loss of key points asks for maps in PyTorch's own order."""

    REPLACES = ("layers",)

    def layers(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, K, H, W)."""
        return super().layers(x).contiguous()
