"""3x3 convolution by minimal filtering in PyTorch alone, where there is no compiler; see winograd.py. Inference only.

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A       d: 6 x 6 inputs, g: 3 x 3 weights, Y: 4 x 4 outputs

Each of the three transforms in two dimensions is one matrix over the 36 positions of a tile, and each position one
matrix product over tiles and channels, by oneDNN. Tiles are worked on in blocks that stay in the processor's cache.
"""

import functools

import torch
from torch import Tensor

from . import cpu_maps

# Points of evaluation 0, +-a, +-2a and infinity. With this a, the rounding error is about the smallest, as in the C++.
_A = 181 / 256
_OUT, _IN = 4, 6
_BLOCK = 256  # tiles
# Below these the products that are saved do not pay for the transforms.
_MIN_CHANNELS, _MIN_TILES = 128, 16


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
        and torch.backends.mkldnn.enabled
        and _works()
    )


def pack(weight: Tensor) -> list[Tensor]:
    """Transform weights (C', C, 3, 3) to 36 matrices (C', C) in oneDNN's layout; four times the memory."""
    kernel = _matrices()[1]
    turned = kernel @ weight.detach().double().flatten(2).permute(2, 0, 1).flatten(1)
    turned = turned.float().view(_IN * _IN, *weight.shape[:2])
    return [torch.ops.mkldnn._reorder_linear_weight(matrix, _BLOCK) for matrix in turned]


def convolve(x: Tensor, packed: list[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
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
    bottom, right = _OUT * rows + 1 - height, _OUT * columns + 1 - width
    padded = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, right, 1, bottom))
    out = x.new_empty(images, _OUT * rows, _OUT * columns, len(packed[0]))
    tiled = out.view(images, rows, _OUT, columns, _OUT, -1)
    image, row, cell, channel = padded.stride()
    windows = padded.as_strided(
        (_IN, _IN, images, rows, columns, channels), (row, cell, image, _OUT * row, _OUT * cell, channel)
    )
    # Whole images where they are small, else rows of tiles of one image.
    image_block = max(1, _BLOCK // (rows * columns))
    row_block = max(1, _BLOCK // columns)
    for i in range(0, images, image_block):
        for j in range(0, rows, row_block):
            block = slice(i, i + image_block), slice(j, j + row_block)
            tiles = _of_tiles(windows[(slice(None), slice(None), *block)], packed)
            if bias is not None:
                tiles += bias
            if relu:
                tiles.relu_()
            tiled[block] = tiles.permute(2, 3, 0, 4, 1, 5)
    return out[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _of_tiles(windows: Tensor, packed: list[Tensor]) -> Tensor:
    """Inputs (6, 6, N, rows, columns, C) of tiles to their outputs (4, 4, N, rows, columns, C')."""
    forward, _, back = _matrices()
    shape = windows.shape[2:5]
    positions = (forward @ windows.reshape(_IN * _IN, -1)).view(_IN * _IN, shape.numel(), -1)
    products = windows.new_empty(_IN * _IN, shape.numel(), len(packed[0]))
    for product, position, matrix in zip(products, positions, packed, strict=True):
        product.copy_(torch.ops.mkldnn._linear_pointwise(position, matrix, None, "none", [], ""))
    return (back @ products.flatten(1)).view(_OUT, _OUT, *shape, -1)


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


@functools.lru_cache(maxsize=1)
def _works() -> bool:
    """Whether this PyTorch has the operations, and they compute what they should."""
    x = torch.arange(30.0).view(1, 2, 3, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.arange(-18.0, 18.0).view(2, 2, 3, 3)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    return cpu_maps.computes(lambda: convolve(x, pack(weight), None, relu=False), expected)
