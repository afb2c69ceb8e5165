"""Random bottom-up maps for the tests of the necks, and slow resizing for their references."""

import math

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import nn

CHANNELS = {"res2": 8, "res3": 12, "res4": 16, "res5": 20}
SHAPES = {name: ShapeSpec(channels=c, stride=4 * 2**i) for i, (name, c) in enumerate(CHANNELS.items())}
ODD_SIZES = [(64, 96), (65, 97), (33, 127), (100, 31), (31, 31), (1, 1)]


class Given(Backbone):
    """A bottom-up pathway without layers: it is called with its maps, so that a neck on it is called with them too."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        self.shapes = shapes

    def forward(self, maps):
        return maps

    def output_shape(self):
        return self.shapes


def bottom_up_maps(size, names=tuple(CHANNELS), images=2, dtype=torch.float32):
    """Maps of images of ``size`` (height, width) in pixels from a bottom-up pathway that rounds sizes up."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            images,
            CHANNELS[name],
            *(math.ceil(side / SHAPES[name].stride) for side in size),
            generator=generator,
            dtype=dtype,
        )
        for name in names
    }


def randomise(module: nn.Module, std=0.3, seed=1) -> nn.Module:
    """Draw all parameters and running statistics: biases start at zero and weights at one, where mistakes hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("fusion.weight"):  # below zero the map is switched off, and with all of them the node
                parameter += 1
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
    return module


def repeated(x, factor, size):
    """Up-sampling cell by cell: cell i of ``size`` sees cell i // factor."""
    out = x.new_zeros(*x.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            out[:, :, i, j] = x[:, :, i // factor, j // factor]
    return out


def pooled(x, window, stride, padding):
    """Max pooling cell by cell: cell i sees the cells from i * stride - padding on that exist; sizes round up."""
    size = [math.ceil(side / stride) for side in x.shape[-2:]]
    out = x.new_zeros(*x.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i * stride - padding, j * stride - padding
            seen = x[:, :, max(top, 0) : top + window, max(left, 0) : left + window]
            out[:, :, i, j] = seen.amax(dim=(2, 3))
    return out
