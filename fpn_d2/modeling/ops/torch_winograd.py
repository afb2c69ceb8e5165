"""3x3 convolution by minimal filtering in PyTorch alone, where there is no compiler; see winograd.py. Inference only.

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       d: 6 x 6 inputs, g: 3 x 3 weights, Y: 4 x 4 outputs

Each of the three transforms in two dimensions is one matrix over the 36 positions of a tile, and the products of all
positions are one batch of matrix products over tiles and channels. Tiles are worked on in blocks that stay in the
processor's cache, all in the same two buffers: memory that is new costs more than what is computed in it.
"""

import functools
import math

import torch
from torch import Tensor

from . import cpu_maps

# Points of evaluation 0, +-a, +-2a and infinity. With this a, the rounding error is about the smallest, as in the C++.
_A = 181 / 256
_OUT, _IN = 4, 6
_BLOCK = 256  # tiles
# Below these the products that are saved do not pay for the transforms.
_MIN_CHANNELS, _MIN_TILES = 256, 16


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a 3x3 convolution with stride 1 and padding 1 can run here, and is faster than PyTorch's.

    It can on a CPU, without gradients and outside autocast, on channels-last maps of float32.

    Args:
        x: (N, C, H, W).
        weight: (C', C, 3, 3).
        bias: (C',) or None.
    """
    return (
        cpu_maps.is_plain(x, weight, bias)
        and x.dtype == weight.dtype == torch.float32
        and x.shape[1] == weight.shape[1]
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and len(x) * _tiles(x.shape[2]) * _tiles(x.shape[3]) >= _MIN_TILES
        and not torch.is_grad_enabled()
        and cpu_maps.autocast_dtype("cpu") is None
        and cpu_maps.is_on()
    )


def pack(weight: Tensor) -> Tensor:
    """Transform weights (C', C, 3, 3) to 36 matrices, (36, C, C'); four times the memory."""
    kernel = _matrices()[1]
    turned = kernel @ weight.detach().double().flatten(2).permute(2, 1, 0).flatten(1)
    return turned.float().view(_IN * _IN, *weight.shape[1::-1])


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``conv2d(x, weight, bias, padding=1)`` within float rounding, and a ReLU if ``relu``.

    Args:
        x: (N, C, H, W) for which :func:`pays` holds.
        packed: what :func:`pack` returned.
        bias: (C',) or None.
        relu: whether negative outputs become 0.

    Returns:
        (N, C', H, W), channels-last.
    """
    images, channels, height, width = x.shape
    out_channels = packed.shape[2]
    rows, columns = _tiles(height), _tiles(width)
    padded = _padded(x.permute(0, 2, 3, 1), _OUT * rows + 2, _OUT * columns + 2)
    out = x.new_empty(images, _OUT * rows, _OUT * columns, out_channels)
    tiled = out.view(images, rows, _OUT, columns, _OUT, -1).permute(2, 4, 0, 1, 3, 5)
    image, row, cell, channel = padded.stride()
    windows = padded.as_strided(
        (_IN, _IN, images, rows, columns, channels), (row, cell, image, _OUT * row, _OUT * cell, channel)
    )
    # Whole images where they are small, else rows of tiles of one image.
    image_block = min(max(1, _BLOCK // (rows * columns)), images)
    row_block = min(max(1, _BLOCK // columns), rows)
    most = _IN * _IN * image_block * row_block * columns * max(channels, out_channels)
    buffers = x.new_empty(most), x.new_empty(most)
    for i in range(0, images, image_block):
        for j in range(0, rows, row_block):
            block = slice(None), slice(None), slice(i, i + image_block), slice(j, j + row_block)
            tiles = _of_tiles(windows[block], packed, buffers)
            if bias is not None:
                tiles += bias
            if relu:
                torch.clamp_min(tiles, 0, out=tiled[block])
            else:
                tiled[block] = tiles
    return out[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _of_tiles(windows: Tensor, packed: Tensor, buffers: tuple[Tensor, Tensor]) -> Tensor:
    """Inputs (6, 6, N, rows, columns, C) of tiles to their outputs (4, 4, N, rows, columns, C'), in the buffers."""
    forward, _, back = _matrices()
    channels, out_channels = packed.shape[1:]
    tiles = windows.shape[2:5].numel()

    def within(buffer: Tensor, *shape: int) -> Tensor:
        return buffer[: math.prod(shape)].view(shape)

    one, two = buffers
    inputs = within(one, *windows.shape).copy_(windows).view(_IN * _IN, -1)
    positions = torch.mm(forward, inputs, out=within(two, _IN * _IN, tiles * channels))
    products = within(one, _IN * _IN, tiles, out_channels)
    torch.bmm(positions.view(_IN * _IN, tiles, channels), packed, out=products)
    outputs = torch.mm(back, products.flatten(1), out=within(two, _OUT * _OUT, tiles * out_channels))
    return outputs.view(_OUT, _OUT, *windows.shape[2:5], out_channels)


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """(N, H, W, C) to (N, height, width, C): a border of one zero above and left, and zeros to the sizes asked for.

    ``torch.nn.functional.pad`` writes zeros everywhere first, which costs as much as the copy.
    """
    images, inner_height, inner_width, channels = x.shape
    out = x.new_empty(images, height, width, channels)
    out[:, :1] = 0
    out[:, 1 + inner_height :] = 0
    inner = out[:, 1 : 1 + inner_height]
    inner[:, :, :1] = 0
    inner[:, :, 1 + inner_width :] = 0
    inner[:, :, 1 : 1 + inner_width] = x
    return out


def _tiles(side: int) -> int:
    return -(-side // _OUT)


@functools.lru_cache(maxsize=1)
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Of inputs (36, 36), of weights (36, 9; float64) and back (16, 36), for both dimensions at once.

    A polynomial is what it is at six points; at infinity that is its leading coefficient. By transposition, what
    multiplies polynomials also correlates (Lavin and Gray, CVPR 2016, section 4).
    """
    points = torch.tensor([0, _A, -_A, 2 * _A, -2 * _A], dtype=torch.float64)

    def evaluate(coefficients: int) -> Tensor:
        at_infinity = torch.zeros(1, coefficients, dtype=torch.float64)
        at_infinity[0, -1] = 1
        return torch.cat([points[:, None] ** torch.arange(coefficients), at_infinity])

    kernel, back, forward = evaluate(3), evaluate(_OUT).T.contiguous(), torch.linalg.inv(evaluate(_IN)).T.contiguous()
    return torch.kron(forward, forward).float(), torch.kron(kernel, kernel), torch.kron(back, back).float()
