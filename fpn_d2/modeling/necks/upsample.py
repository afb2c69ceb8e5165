"""Up-sampling by two to the exact size of the next finer map."""

import torch
from torch import Tensor, nn

from .parts import fit, interpolate

UPSAMPLES = ("nearest", "bilinear", "deconv")


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
        ValueError: ``name`` is not one of ``UPSAMPLES``.
    """
    if name not in UPSAMPLES:
        raise ValueError(f"upsample (MODEL.FPN.UPSAMPLE) is {name!r}; expected one of {', '.join(UPSAMPLES)}")
    return Deconv(channels) if name == "deconv" else Interpolate(name)
