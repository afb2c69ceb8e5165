"""3x3 convolution by minimal filtering in PyTorch alone, where there is no compiler; see winograd.py. Inference only.

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       d: 6 x 6 inputs, g: 3 x 3 weights, Y: 4 x 4 outputs

Each of the three transforms in two dimensions is one matrix over the 36 positions of a tile. The products of all
positions are a convolution of one cell in 36 groups, which oneDNN does faster than a batch of matrix products. Tiles
are worked on in blocks that stay in the processor's cache, all in the same two buffers: memory that is new costs more
than what is computed in it. In the buffers all of a tile lies together: PyTorch's operations then give each thread the
same tiles, one after the other, and little has to go from one core's cache to another's, which may be far.
"""

import functools
import math

import torch
from torch import Tensor

from . import cpu_maps, onednn_conv

# Points of evaluation 0, +-a, +-2a and infinity. With this a, the rounding error is about the smallest, as in the C++.
_A = 181 / 256
_OUT, _IN = 4, 6
_POSITIONS = _IN * _IN
_BLOCK = 256  # tiles
# With fewer, oneDNN reads weights in another layout; a block of fewer is filled up.
_LEAST = 64  # tiles
# Below these the products that are saved do not pay for the transforms.
_MIN_CHANNELS, _MIN_TILES = 128, 32
_GEOMETRY: onednn_conv.Geometry = ((1, 1), (0, 0), (1, 1), _POSITIONS)


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a 3x3 convolution with stride 1 and padding 1 can run here, and is faster than PyTorch's.

    It can on a CPU with oneDNN, without gradients and outside autocast, on channels-last maps of float32.

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
        and onednn_conv.works()
    )


def pack(weight: Tensor) -> Tensor:
    """Transform weights (C', C, 3, 3) to 36 matrices of C' x C, in oneDNN's layout; four times the memory."""
    out_channels, channels = weight.shape[:2]
    turned = _matrices()[1] @ weight.detach().double().flatten(2).permute(2, 0, 1).flatten(1)
    matrices = turned.float().view(_POSITIONS * out_channels, channels, 1, 1)
    return onednn_conv.pack(matrices, (1, _POSITIONS * channels, 1, _BLOCK), _GEOMETRY)


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
    out_channels = len(packed) // _POSITIONS
    rows, columns = _tiles(height), _tiles(width)
    x, out = x.permute(0, 2, 3, 1), x.new_empty(images, height, width, out_channels)
    # Whole images where they are small, else rows of tiles of one image.
    image_block = min(max(1, _BLOCK // (rows * columns)), images)
    row_block = min(max(1, _BLOCK // columns), rows)
    row_block = -(-rows // -(-rows // row_block))  # about as many in the last block
    most = _POSITIONS * max(_LEAST, image_block * row_block * columns) * max(channels, out_channels)
    buffers = x.new_empty(most), x.new_empty(most)
    for i in range(0, images, image_block):
        for j in range(0, rows, row_block):
            cells = out[i : i + image_block, _OUT * j : _OUT * (j + row_block)]
            windows = _windows(x[i : i + image_block], j, _tiles(cells.shape[1]), buffers[1])
            _write(_of_tiles(windows, packed, buffers), bias, relu, cells, buffers[0])
    return out.permute(0, 3, 1, 2)


def _windows(x: Tensor, first: int, rows: int, buffer: Tensor) -> Tensor:
    """Inputs (N, rows, columns, 6, 6, C) of rows of tiles from the row ``first``, of maps (N, H, W, C).

    They overlap, in the buffer, with zeros where they leave the map.
    """
    images, height, width, channels = x.shape
    columns = _tiles(width)
    padded = _within(buffer, images, _OUT * rows + 2, _OUT * columns + 2, channels)
    above = _OUT * first - 1  # the row of the map that is the first row here
    top, bottom = max(above, 0), min(above + _OUT * rows + 2, height)
    padded[:, : top - above] = 0
    padded[:, bottom - above :] = 0
    inner = padded[:, top - above : bottom - above]
    inner[:, :, :1] = 0
    inner[:, :, 1 + width :] = 0
    inner[:, :, 1 : 1 + width] = x[:, top:bottom]
    image, row, cell, channel = padded.stride()
    return padded.as_strided(
        (images, rows, columns, _IN, _IN, channels), (image, _OUT * row, _OUT * cell, row, cell, channel)
    )


def _of_tiles(windows: Tensor, packed: Tensor, buffers: tuple[Tensor, Tensor]) -> Tensor:
    """Inputs (N, rows, columns, 6, 6, C) of tiles to their outputs (N, rows, columns, 4, 4, C').

    The inputs may lie in the second buffer; the outputs do.
    """
    forward, _, back = _matrices()
    one, two = buffers
    tiles, channels, out_channels = windows.shape[:3].numel(), windows.shape[-1], len(packed) // _POSITIONS

    def cells(buffer: Tensor, depth: int) -> Tensor:
        return _within(buffer, 1, max(tiles, _LEAST), 1, _POSITIONS * depth).permute(0, 3, 1, 2)

    inputs = _within(one, *windows.shape).copy_(windows).view(tiles, _POSITIONS, channels)
    torch.bmm(forward.expand(tiles, -1, -1), inputs, out=_within(two, tiles, _POSITIONS, channels))
    products = cells(one, out_channels).zero_()
    onednn_conv.accumulate(cells(two, channels), packed, products, _GEOMETRY)
    products = _within(one, tiles, _POSITIONS, out_channels)
    outputs = _within(two, tiles, _OUT * _OUT, out_channels)
    torch.bmm(back.expand(tiles, -1, -1), products, out=outputs)
    return outputs.view(*windows.shape[:3], _OUT, _OUT, out_channels)


def _write(tiles: Tensor, bias: Tensor | None, relu: bool, out: Tensor, buffer: Tensor) -> None:
    """Outputs (N, rows, columns, 4, 4, C') of tiles, a bias and a ReLU, to a map (N, H, W, C') that may end earlier."""
    images, rows, columns, _, _, channels = tiles.shape
    fits = out.shape[1:3] == (_OUT * rows, _OUT * columns)
    whole = out if fits else _within(buffer, images, _OUT * rows, _OUT * columns, channels)
    tiled = whole.unflatten(2, (columns, _OUT)).unflatten(1, (rows, _OUT)).transpose(2, 3)
    if bias is not None:
        tiles += bias
    if relu:
        torch.clamp_min(tiles, 0, out=tiled)
    else:
        tiled.copy_(tiles)
    if not fits:
        out.copy_(whole[:, : out.shape[1], : out.shape[2]])


def _within(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


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
