"""Detectron2's convolution and residual blocks, with the frozen normalisation folded in and faster operations."""

from collections.abc import Callable

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import cpu_maps, onednn_conv, torch_winograd, winograd
from .packed_weights import PackedWeights


class FastConv2d(Conv2d):
    """Detectron2's ``Conv2d``, within float rounding.

    A frozen batch normalisation scales the weights rather than the output, anew in each call: the weights may be
    training. 3x3 kernels run by minimal filtering where that is faster, and at inference all kernels with weights in
    the form that suits the machine, which is kept. Parameters, the norm and their names stay, so that state dicts are
    those of ``Conv2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        frozen = isinstance(self.norm, FrozenBatchNorm2d)
        # Without gradients the norm is one operation, and on a GPU a cheaper one than folding.
        if x.is_cuda and (not frozen or not torch.is_grad_enabled()):
            return super().forward(x)
        relu = isinstance(self.activation, nn.ReLU) and (frozen or self.norm is None)
        x = self._convolved(x, relu)
        if self.norm is not None and not frozen:
            x = self.norm(x)
        return x if self.activation is None or relu else self.activation(x)

    def rectified(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``relu(self(x) + add)``, for inference.

        Args:
            x: (N, C, H, W).
            add: of the shape of the output, or None.
        """
        if self.activation is None and (self.norm is None or isinstance(self.norm, FrozenBatchNorm2d)):
            return self._convolved(x, True, add)
        x = self(x)
        return (x if add is None else x.add_(add)).relu_()

    def _convolved(self, x: Tensor, relu: bool, add: Tensor | None = None) -> Tensor:
        """Convolution, norm if it is frozen, ``add``, and ReLU if ``relu``."""
        frozen = isinstance(self.norm, FrozenBatchNorm2d)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if (self.kernel_size, *geometry) == ((3, 3), (1, 1), (1, 1), (1, 1), 1):
            if winograd.pays(x, self.weight, self.bias):
                if torch.is_grad_enabled():
                    scale, bias = folded_scale(self) if frozen else (None, self.bias)
                    return _then(winograd.conv3x3(x, self.weight, bias, scale), relu, add)
                factors = winograd.factor_dtype(x)
                packed, bias = self._kept(f"compiled, {factors}", frozen, lambda weight: winograd.pack(weight, factors))
                return _then(winograd.convolve(x, packed, bias, relu and add is None), relu, add)
            if torch_winograd.pays(x, self.weight, self.bias):
                packed, bias = self._kept("torch", frozen, torch_winograd.pack)
                return _then(torch_winograd.convolve(x, packed, bias, relu and add is None), relu, add)
        if onednn_conv.pays(x, self.weight, self.bias, geometry):
            packed, bias = self._kept("oneDNN", frozen, lambda weight: onednn_conv.pack(weight, x.shape, geometry))
            return onednn_conv.convolve(x, packed, bias, geometry, relu, add)
        return _then(self._direct(x, frozen, geometry), relu, add)

    def _kept(self, form: str, frozen: bool, pack: Callable[[Tensor], object]) -> tuple[object, Tensor | None]:
        """The weights in another form, and the bias."""

        def make() -> tuple[object, Tensor | None]:
            weight, bias = folded_weights(self) if frozen else (self.weight, self.bias)
            return pack(weight), bias

        norm = (*self.norm.parameters(), *self.norm.buffers()) if frozen else ()
        own = [tensor for tensor in (self.weight, self.bias, *norm) if tensor is not None]
        return self._packed.get(form, own, make)

    def _direct(self, x: Tensor, frozen: bool, geometry: onednn_conv.Geometry) -> Tensor:
        if not frozen:
            return nn.functional.conv2d(x, self.weight, self.bias, *geometry)
        scale, bias = folded_scale(self)
        keeps_graph = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not keeps_graph or cpu_maps.is_watched() or isinstance(self.padding, str):
            return nn.functional.conv2d(x, winograd.scaled(self.weight, scale), bias, *geometry)
        if (dtype := cpu_maps.autocast_dtype(x.device.type)) is not None:
            x = x.to(dtype)
        return _FoldedConvolution.apply(x, self.weight, bias, scale, geometry)

    def train(self, mode: bool = True) -> "FastConv2d":
        """Switch between training and evaluation; transformed weights that were kept are dropped."""
        self._packed.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FastConv2d":
        self._packed.clear()
        return super()._apply(*args, **kwargs)


def _then(x: Tensor, relu: bool, add: Tensor | None) -> Tensor:
    x = x if add is None else x.add_(add)
    return x.relu_() if relu else x


class _FastBlock:
    """A residual block of Detectron2's that adds and rectifies within the convolutions, at inference on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv in self._convs()[:-1]:
            x = conv.rectified(x)
        return self._convs()[-1].rectified(x, shortcut)


class FastBasicBlock(_FastBlock, BasicBlock):
    """See :class:`_FastBlock`."""

    def _convs(self) -> tuple[FastConv2d, ...]:
        return self.conv1, self.conv2


class FastBottleneckBlock(_FastBlock, BottleneckBlock):
    """See :class:`_FastBlock`."""

    def _convs(self) -> tuple[FastConv2d, ...]:
        return self.conv1, self.conv2, self.conv3


_FAST_BLOCKS = {BasicBlock: FastBasicBlock, BottleneckBlock: FastBottleneckBlock}


def use_fast_convolutions(module: nn.Module) -> nn.Module:
    """Replace, in place, each convolution in ``module``, Detectron2's and PyTorch's; parameters and names stay.

    So are residual blocks of Detectron2's ResNets, whose convolutions they are.
    """
    for name, child in list(module.named_children()):
        if type(child) is Conv2d or (type(child) is nn.Conv2d and child.padding_mode == "zeros"):
            fast = _become(FastConv2d, child)
            if type(child) is nn.Conv2d:
                fast.norm = fast.activation = None
            fast._packed = PackedWeights()
            setattr(module, name, fast)
            continue
        use_fast_convolutions(child)
        block = _FAST_BLOCKS.get(type(child))
        if block is not None and all(isinstance(conv, FastConv2d) for conv in block._convs(child)):
            setattr(module, name, _become(block, child))
    return module


def _become(kind: type, module: nn.Module) -> nn.Module:
    """The same module, parameters and all, as another class."""
    other = kind.__new__(kind)
    other.__dict__ = module.__dict__
    return other


class _FoldedConvolution(torch.autograd.Function):
    """Convolution with scaled weights, which are computed again for the backward pass.

    Those of a ResNet-50 would take 90 MB from its forward to its backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, geometry):
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        folded = winograd.scaled(weight, scale).to(x.dtype)
        return nn.functional.conv2d(x, folded, bias.to(x.dtype), *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        folded = winograd.scaled(weight, scale).to(x.dtype)
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            *(gradient, x, folded, [len(weight)], stride, padding, dilation, False, [0, 0], groups),
            ctx.needs_input_grad[:3],
        )
        if of_weight is not None:
            of_weight = winograd.scaled(of_weight.to(weight.dtype), scale)
        return of_x, of_weight, of_bias, None, None


def folded_scale(conv: Conv2d) -> tuple[Tensor, Tensor]:
    """The scale of its weights and the bias with which ``conv`` alone computes ``conv.norm(conv(x))``, (C',) each.

    Args:
        conv: its ``norm`` is frozen, or a batch normalisation with running statistics in evaluation mode.
    """
    norm = conv.norm
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:  # batch normalisation without affine parameters has none
        scale = scale * norm.weight
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale
    return scale, bias if norm.bias is None else bias + norm.bias


def folded_weights(conv: Conv2d) -> tuple[Tensor, Tensor]:
    """The weight and bias with which ``conv`` alone computes ``conv.norm(conv(x))``; see :func:`folded_scale`."""
    scale, bias = folded_scale(conv)
    return winograd.scaled(conv.weight, scale), bias


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
