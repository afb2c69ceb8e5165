"""Convolutions whose weights are final: norms are folded in for good, and transformed weights are kept."""

from collections.abc import Callable

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from . import onednn_conv, winograd
from .convolution import (
    PLAIN_3X3,
    FastConvolution,
    FastSameConvolution,
    FastTorchConvolution,
    Weights,
    folded_scale,
)
from .guard import mixed, need_gradients, need_not_be_called


class FrozenConvolution(FastConvolution):
    """A :class:`FastConvolution` of a model that is not trained any more.

    Its weight is no parameter, so that nothing that goes through parameters or state dicts can change it behind the
    back of its transformed copy, which is four times as large and is not copied or saved.
    """

    def weights(self, folds: bool, x: Tensor) -> Weights:
        """See :class:`FastConvolution`."""
        scale, bias = folded_scale(self) if folds else (None, self.bias)
        packed = None
        if scale is None and not need_gradients(x, bias):
            if _shape(self) == PLAIN_3X3 and winograd.pays(x, self.weight, bias, packed=True):
                packed = self._transformed(winograd.factor_dtype(x))
            elif onednn_conv.works(x):
                packed = self._reordered(x)
        return Weights(self.weight, scale, bias, packed)

    def _transformed(self, dtype: torch.dtype) -> Tensor:
        return self._keep(("minimal filtering", dtype), lambda: winograd.pack(self.weight, dtype))

    def _reordered(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        # For the first map that comes: what is best for another size hardly differs.
        return self._keep((geometry, x.dtype), lambda: onednn_conv.reorder(self.weight.to(x.dtype), x.shape, geometry))

    def _keep(self, form: tuple, make: Callable[[], Tensor]) -> Tensor:
        made_from = (self.weight.data_ptr(), self.weight._version)
        kept = self._kept.get(form)
        if kept is None or kept[0] != made_from:
            kept = self._kept[form] = made_from, make()
        return kept[1]

    def _apply(self, fn, *args, **kwargs) -> nn.Module:
        self.__dict__.update(weight=fn(self.weight), _kept={})
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}


class FrozenSameConvolution(FrozenConvolution, FastSameConvolution):
    """The same of one that pads by the size of the map."""


@torch.no_grad()
def freeze_convolutions(module: nn.Module) -> None:
    """Make every fast convolution in ``module`` a frozen one, in place, and fold the norm behind it where there is one.

    A norm with hooks, or of another kind than frozen or running batch normalisation, stays.
    """
    for conv in module.modules():
        if not isinstance(conv, FastConvolution) or isinstance(conv, FrozenConvolution):
            continue
        if "weight" not in conv._parameters:  # pruned, or made anew in each call by a parametrisation
            continue
        if isinstance(conv, FastTorchConvolution):
            conv.norm = conv.activation = None
        _fold_norm(conv)
        weight = conv._parameters.pop("weight").detach()
        conv.__dict__.update(weight=weight.contiguous(memory_format=torch.channels_last), _kept={})
        kind = FrozenSameConvolution if isinstance(conv, FastSameConvolution) else FrozenConvolution
        conv.__class__ = mixed(kind, type(conv).plain)


@torch.no_grad()
def transform_weights(module: nn.Module) -> None:
    """Transform the weights of all frozen 3x3 convolutions now, not in the first call."""
    for conv in module.modules():
        if isinstance(conv, FrozenConvolution) and _shape(conv) == PLAIN_3X3 and winograd.can_pack(conv.weight):
            conv._transformed(winograd.factor_dtype(conv.weight))


def _shape(conv: nn.Conv2d) -> tuple:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


def _fold_norm(conv: FastConvolution) -> None:
    norm = conv.norm
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    if type(norm) in kinds and need_not_be_called(norm, type(norm)) and norm.running_mean is not None:
        scale, bias = folded_scale(conv)
        conv.weight = nn.Parameter(winograd.scaled(conv.weight, scale), requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        conv.norm = None
