"""3x3 convolution by minimal filtering in PyTorch alone, where there is no compiler; see winograd.py. Inference only.

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       d: 6 x 6 inputs, g: 3 x 3 weights, Y: 4 x 4 outputs

Each of the three transforms in two dimensions is one matrix over the 36 positions of a tile, and the products of all
positions are one batch of matrix products over tiles and channels. Tiles are worked on in blocks that stay in the
processor's cache, all in the same two buffers: memory that is new costs more than what is computed in it. Of large maps
each thread takes blocks of its own, as PyTorch's operations divide positions here and tiles there: what one core wrote
the next operation reads from the other, half the time of this convolution where their caches are far apart.
"""

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import cpu_maps, workers

# Points of evaluation 0, +-a, +-2a and infinity. With this a, the rounding error is about the smallest, as in the C++.
_A = 181 / 256
_OUT, _IN = 4, 6
_BLOCK, _BLOCK_OF_THREAD = 256, 128  # tiles
# Products of a thread below which waking it costs more than it gains: PyTorch's own threads first wait for work a while.
_MIN_PRODUCTS_OF_THREAD = 750_000_000
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
    rows, columns = _tiles(height), _tiles(width)
    out = x.new_empty(images, height, width, packed.shape[2])
    threads = torch.get_num_threads()
    if packed.numel() * images * rows * columns < threads * _MIN_PRODUCTS_OF_THREAD:
        threads = 1
    block = _BLOCK if threads == 1 else _BLOCK_OF_THREAD
    # Whole images where they are small, else rows of tiles of one image.
    image_block = min(max(1, block // (rows * columns)), -(-images // threads))
    row_block = min(max(1, block // columns), rows if images > 1 else -(-rows // threads))
    most = _IN * _IN * image_block * row_block * columns * max(channels, packed.shape[2])

    def work(blocks: Iterable[tuple[int, int]]) -> None:
        buffers = x.new_empty(most), x.new_empty(most)
        for i, j in blocks:
            cells = out[i : i + image_block, _OUT * j : _OUT * (j + row_block)]
            windows = _windows(x.permute(0, 2, 3, 1)[i : i + image_block], j, -(-cells.shape[1] // _OUT), buffers[1])
            _write(_of_tiles(windows, packed, buffers), bias, relu, cells, buffers[0])

    blocks = [(i, j) for i in range(0, images, image_block) for j in range(0, rows, row_block)]
    workers.share(work, blocks, threads)
    return out.permute(0, 3, 1, 2)


def _windows(x: Tensor, first: int, rows: int, buffer: Tensor) -> Tensor:
    """Inputs (6, 6, N, rows, columns, C) of rows of tiles from the row ``first``, of maps (N, H, W, C).

    They overlap, in the buffer, with zeros where they leave the map.
    """
    images, height, width, channels = x.shape
    columns = _tiles(width)
    padded = _within(buffer, images, _OUT * rows + 2, _OUT * columns + 2, channels)
    # The first row of the padded map is this row of the map.
    above = _OUT * first - 1
    top, bottom = max(above, 0), min(above + _OUT * rows + 2, height)
    padded[:, : top - above] = 0
    padded[:, bottom - above :] = 0
    inner = padded[:, top - above : bottom - above]
    inner[:, :, :1] = 0
    inner[:, :, 1 + width :] = 0
    inner[:, :, 1 : 1 + width] = x[:, top:bottom]
    image, row, cell, channel = padded.stride()
    return padded.as_strided(
        (_IN, _IN, images, rows, columns, channels), (row, cell, image, _OUT * row, _OUT * cell, channel)
    )


def _of_tiles(windows: Tensor, packed: Tensor, buffers: tuple[Tensor, Tensor]) -> Tensor:
    """Inputs (6, 6, N, rows, columns, C) of tiles to their outputs (4, 4, N, rows, columns, C').

    The inputs may lie in the second buffer; the outputs do.
    """
    forward, _, back = _matrices()
    channels, out_channels = packed.shape[1:]
    tiles = windows.shape[2:5].numel()
    one, two = buffers
    inputs = _within(one, *windows.shape).copy_(windows).view(_IN * _IN, -1)
    positions = torch.mm(forward, inputs, out=_within(two, _IN * _IN, tiles * channels))
    products = _within(one, _IN * _IN, tiles, out_channels)
    torch.bmm(positions.view(_IN * _IN, tiles, channels), packed, out=products)
    outputs = torch.mm(back, products.flatten(1), out=_within(two, _OUT * _OUT, tiles * out_channels))
    return outputs.view(_OUT, _OUT, *windows.shape[2:5], out_channels)


def _write(tiles: Tensor, bias: Tensor | None, relu: bool, out: Tensor, buffer: Tensor) -> None:
    """Outputs (4, 4, N, rows, columns, C') of tiles, a bias and a ReLU, to a map (N, H, W, C'); the last may overlap."""
    images, rows, columns, channels = tiles.shape[2:]
    fits = out.shape[1:3] == (_OUT * rows, _OUT * columns)
    whole = out if fits else _within(buffer, images, _OUT * rows, _OUT * columns, channels)
    # Of all six dimensions, in the order of the tiles.
    tiled = whole.unflatten(2, (columns, _OUT)).unflatten(1, (rows, _OUT)).permute(2, 4, 0, 1, 3, 5)
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
