"""The convolution that all necks are made of: a norm after it, and a bias only without one."""

from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, get_norm
from torch import Tensor


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: str = "",
    *,
    stride: int = 1,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Conv2d:
    """Make convolution, norm and activation, in this order; weights are as PyTorch draws them.

    Sizes become ceil(size / stride). Its parameters are ``weight``, ``bias`` (without a norm) and ``norm.*``.

    Raises:
        ValueError: this Detectron2 has no norm of that name.
    """
    try:
        norm_layer = get_norm(norm, out_channels)
    except KeyError:
        raise ValueError(
            f"norm (MODEL.FPN.NORM) is {norm!r}, which this Detectron2 does not know; expected GN, BN, SyncBN, "
            "FrozenBN or an empty string"
        ) from None
    except ValueError as error:  # group norm wants a multiple of its 32 groups
        raise ValueError(
            f"norm (MODEL.FPN.NORM) {norm!r} does not go with {out_channels} channels (MODEL.FPN.OUT_CHANNELS): {error}"
        ) from None
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=norm == "",
        norm=norm_layer,
        activation=activation,
    )


def xavier_conv(*args, **options) -> Conv2d:
    """Make a :func:`conv` with the initial weights of Detectron2's FPN."""
    layer = conv(*args, **options)
    weight_init.c2_xavier_fill(layer)
    return layer
