"""Up-sampling by two to the exact size of the next finer map."""

import torch
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .parts import fit, interpolate

UPSAMPLES = ("nearest", "bilinear", "deconv")


class Deconv(nn.Module):
    """A learned 2x2 transposed convolution with stride 2 that starts out as nearest up-sampling."""

    def __init__(self, channels: int):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        with torch.no_grad():
            self.deconv.weight.copy_(torch.eye(channels)[:, :, None, None].expand_as(self.deconv.weight))
            self.deconv.bias.zero_()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> (N, C, *size)."""
        return fit(self.deconv(x), size, "nearest")


class Interpolate(nn.Module):
    """Nearest or bilinear up-sampling by two."""

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, h, w) -> (N, C, *size)."""
        return fit(interpolate(x, self.mode, scale_factor=2.0), size, self.mode)

    def extra_repr(self) -> str:
        return self.mode


def build_upsample(name: str, channels: int) -> nn.Module:
    """Build a module that is called as ``module(x, size)``.

    Raises:
        UserError: ``name`` is not one of ``UPSAMPLES``.
    """
    if name not in UPSAMPLES:
        raise UserError(f"upsample (MODEL.FPN.UPSAMPLE) is {name!r}; expected one of {', '.join(UPSAMPLES)}")
    return Deconv(channels) if name == "deconv" else Interpolate(name)
