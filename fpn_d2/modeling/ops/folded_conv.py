"""Convolution and frozen normalisation as one operation."""

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class FoldedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` that scales its weights by its frozen batch normalisation, rather than its output.

    The weights are folded anew in each call: they may be training. The norm stays a child, so that state dicts are
    those of ``Conv2d``. The result differs by float rounding. With any other norm it is ``Conv2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        # Without gradients the norm is one operation, and on a GPU a cheaper one than folding.
        if not isinstance(self.norm, FrozenBatchNorm2d) or (x.is_cuda and not torch.is_grad_enabled()):
            return super().forward(x)
        weight, bias = folded_weights(self)
        x = nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def folded_weights(conv: Conv2d) -> tuple[Tensor, Tensor]:
    """The weight and bias with which ``conv`` alone computes ``conv.norm(conv(x))``.

    Args:
        conv: its ``norm`` is frozen, or a batch normalisation with running statistics in evaluation mode.
    """
    norm = conv.norm
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:  # batch normalisation without affine parameters has none
        scale = scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    return conv.weight * scale[:, None, None, None], bias


def fold_frozen_norms(module: nn.Module) -> nn.Module:
    """Replace, in place, each convolution with a frozen normalisation by one that folds it on the fly.

    Parameters, buffers and their names stay the same.
    """
    for name, child in list(module.named_children()):
        if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
            folded = FoldedConv2d.__new__(FoldedConv2d)
            folded.__dict__ = child.__dict__
            setattr(module, name, folded)
        else:
            fold_frozen_norms(child)
    return module


@torch.no_grad()
def fuse_norms(module: nn.Module) -> int:
    """Fold, in place and for good, every frozen or running normalisation into the convolution before it.

    For inference only: the norms are gone, and with them the names that checkpoints use.

    Returns:
        The number of norms that were folded.
    """
    fused = 0
    for child in module.modules():
        norm = getattr(child, "norm", None)
        running = isinstance(norm, FrozenBatchNorm2d) or (
            isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
        )
        if isinstance(child, Conv2d) and running:
            weight, bias = folded_weights(child)
            child.weight = nn.Parameter(weight, requires_grad=False)
            child.bias = nn.Parameter(bias, requires_grad=False)
            child.norm = None
            fused += 1
    return fused
