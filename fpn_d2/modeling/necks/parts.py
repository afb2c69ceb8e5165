"""What necks are made of: convolutions, sizes, and the checks of what a configuration asks for."""

import math
from collections.abc import Callable, Sequence

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from fpn_d2.errors import UserError


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
        UserError: this Detectron2 has no norm of that name.
    """
    try:
        norm_layer = get_norm(norm, out_channels)
    except KeyError:
        raise UserError(
            f"norm (MODEL.FPN.NORM) is {norm!r}, which this Detectron2 does not know; expected GN, BN, SyncBN, "
            "FrozenBN or an empty string"
        ) from None
    except ValueError as error:  # group norm wants a multiple of its 32 groups
        raise UserError(
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


def fit(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Bring ``x``, already up-sampled by two, to ``size`` (height, width).

    A map of odd size 2n - 1 has a coarser map of size n, and that one up-sampled has 2n cells: the last is cut, so
    that cell i of the finer map always meets cell i // 2 of the coarser one. A bottom-up pathway that rounds sizes
    down leaves the up-sampled map too small; it is then stretched.
    """
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    if height >= size[0] and width >= size[1]:
        return x[..., : size[0], : size[1]]
    return interpolate(x, mode, size=size)


def interpolate(x: Tensor, mode: str, **target) -> Tensor:
    """``F.interpolate`` for the modes "nearest" and "bilinear"."""
    return F.interpolate(x, mode=mode, align_corners=None if mode == "nearest" else False, **target)


def nearest(x: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Up-sample ``x`` by repeating cells, so that cell i of ``size`` (height, width) is cell i // factor of ``x``."""
    return fit(interpolate(x, "nearest", scale_factor=float(factor)), size, "nearest")


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of (N, C, H, W): the "LN" that Detectron2 0.6 lacks.

    On Detectron2's main branch ``get_norm`` has the same under the same name, with the same parameters; this one is
    used on both, so that both give the same numbers.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescale_layers(channels: int, steps: int, norm: str | Callable) -> tuple[list[nn.Module], int]:
    """Layers that bring a map to 2^steps times its resolution, as published for ViTDet.

    Up: 2x2 transposed convolutions with stride 2, each halving the channels, norm and GELU between them.
    Down: one max pooling, rounding sizes up.

    Args:
        channels: of the map.
        steps: positive: finer; 0: as it is, no layer; negative: coarser.
        norm: name or constructor of the norm between transposed convolutions.

    Returns:
        The layers and the channels of what they give.

    Raises:
        UserError: the norm does not go with the channels between the convolutions.
    """
    if steps < 0:
        return [nn.MaxPool2d(kernel_size=2**-steps, stride=2**-steps, ceil_mode=True)], channels
    layers = []
    for step in range(steps):
        if step:
            try:
                between = get_norm(norm, channels) or nn.Identity()
            except ValueError as error:  # group norm wants a multiple of its 32 groups
                raise UserError(
                    f"norm (MODEL.FPN.NORM) {norm!r} does not go with the {channels} channels between transposed "
                    f"convolutions, each of which halves those of the bottom-up map: {error}; use LN"
                ) from None
            layers += [between, nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    return layers, channels


# What maps are called in bottom-up pathways of other projects, and the builders of these.
_FOREIGN_MAPS = {
    "stage": "build_vovnet_backbone (VoVNet) or build_swint_backbone (Swin)",
    "dla": "build_dla_backbone (DLA)",
    "layer": "build_timm_backbone (Detic's)",
    "swin": "build_swintransformer_backbone (Detic's)",
}


def _other_pathway(name: str) -> str:
    """What to do about a map that the pathway does not give, by its name."""
    for prefix, builders in _FOREIGN_MAPS.items():
        if name.startswith(prefix):
            return (
                f"That is a map of another one: set MODEL.FPN.BOTTOM_UP to its builder, {builders}, or let "
                "fpn_d2.swap(cfg) do it while the stock builder's name is in MODEL.BACKBONE.NAME"
            )
    return (
        "For a ResNet, MODEL.RESNETS.OUT_FEATURES names what it gives; another pathway is chosen by MODEL.FPN.BOTTOM_UP"
    )


def pyramid_levels(input_shape: dict[str, ShapeSpec], in_features: Sequence[str]) -> list[int]:
    """Return the level k, with stride 2^k, of each map in ``in_features``.

    Raises:
        UserError: there is none, one is not in ``input_shape``, or their strides are not consecutive powers of 2.
    """
    available = ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in input_shape.items())
    if not in_features:
        raise UserError(f"in_features (MODEL.FPN.IN_FEATURES) is empty; name bottom-up maps, of {available}")
    missing = [name for name in in_features if name not in input_shape]
    if missing:
        raise UserError(
            f"in_features (MODEL.FPN.IN_FEATURES) asks for {', '.join(missing)}, which the bottom-up pathway does "
            f"not give; it gives {available}. {_other_pathway(missing[0])}"
        )
    strides = [input_shape[name].stride for name in in_features]
    levels = [math.log2(stride) for stride in strides]
    if any(level % 1 for level in levels) or any(b - a != 1 for a, b in zip(levels, levels[1:], strict=False)):
        raise UserError(
            f"in_features (MODEL.FPN.IN_FEATURES) {list(in_features)} have strides {strides}; expected powers of 2 "
            "that double from map to map, from high to low resolution"
        )
    return [int(level) for level in levels]


def chosen(shapes: dict[str, ShapeSpec], out_features: Sequence[str]) -> dict[str, ShapeSpec]:
    """Keep of ``shapes`` those named in ``out_features``, or all if that is empty."""
    if isinstance(out_features, str):
        raise UserError(f"out_features (MODEL.FPN.OUT_FEATURES) is the text {out_features!r}; expected a list of names")
    unknown = [name for name in out_features if name not in shapes]
    if unknown:
        raise UserError(
            f"out_features (MODEL.FPN.OUT_FEATURES) asks for {', '.join(unknown)}; with these in_features and this "
            f"top_block the pyramid has {', '.join(shapes)}"
        )
    return {name: shape for name, shape in shapes.items() if name in out_features or not out_features}


def single_level(neck: str, input_shape: dict[str, ShapeSpec], in_features: Sequence[str]) -> int:
    """Return the level of the one map that ``neck`` takes.

    Raises:
        UserError: ``in_features`` does not name exactly one map of ``input_shape`` whose stride is a power of 2.
    """
    if len(in_features) != 1:
        available = ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in input_shape.items())
        raise UserError(
            f"{neck} takes one bottom-up map, but in_features (MODEL.FPN.IN_FEATURES) names {len(in_features)}: "
            f"{', '.join(in_features) or 'none'}; the bottom-up pathway gives {available}"
        )
    return pyramid_levels(input_shape, in_features)[0]


def consecutive_levels(levels: Sequence[int], what: str) -> list[int]:
    """Return ``levels`` as a list.

    Raises:
        UserError: it is empty or not a run of consecutive ascending whole numbers above 0; ``what`` names the key.
    """
    levels = list(levels)
    if not levels or levels[0] < 1 or levels != list(range(levels[0], levels[0] + len(levels))):
        raise UserError(f"{what} is {levels}; expected consecutive ascending levels, as [2, 3, 4, 5]")
    return levels


# Options of the FPN that a graph has no counterpart of, and the value that leaves them alone.
FPN_ONLY = {"UPSAMPLE": "nearest", "FUSE_TYPE": "sum", "TOP_DOWN": True, "LATERAL": True, "OUT_FEATURES": []}


def refuse_fpn_options(cfg: CfgNode, neck: str) -> None:
    """Refuse a configuration that sets what only :class:`~.fpn.FPN` reads.

    Raises:
        UserError: a key of ``FPN_ONLY`` has another value than it has there.
    """
    for key, value in FPN_ONLY.items():
        found = cfg.MODEL.FPN[key]
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise UserError(
                f"MODEL.FPN.{key} is {found!r}, which the neck {neck} does not have; "
                f"set it to {value!r} or take MODEL.FPN.NECK FPN"
            )
