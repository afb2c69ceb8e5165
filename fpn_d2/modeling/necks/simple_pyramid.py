"""Simple feature pyramid (Li et al., "Exploring Plain Vision Transformer Backbones", ECCV 2022, section 3).

Shape legend, for an image of H x W pixels in a batch of N and a plain ViT with patches of 16 x 16 pixels:
    res4     the one bottom-up map: (N, C, ceil(H / 16), ceil(W / 16))
    p{k}     (N, d, ceil(H / 2^k), ceil(W / 2^k)), each made from res4 alone: no map sees another level's
"""

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn

from ..sizes import cut_to_stride
from .build import NECK_REGISTRY, Neck
from .conv import conv
from .fpn import pyramid_levels
from .input_levels import refuse_fpn_options
from .top_blocks import build_top_block, reads_bottom_up, top_block_of


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
        ValueError: the norm does not go with the channels between the convolutions.
    """
    if steps < 0:
        return [nn.MaxPool2d(kernel_size=2**-steps, stride=2**-steps, ceil_mode=True)], channels
    layers = []
    for step in range(steps):
        if step:
            try:
                between = get_norm(norm, channels) or nn.Identity()
            except ValueError as error:  # group norm wants a multiple of its 32 groups
                raise ValueError(
                    f"norm (MODEL.FPN.NORM) {norm!r} does not go with the {channels} channels between transposed "
                    f"convolutions, each of which halves those of the bottom-up map: {error}; use LN"
                ) from None
            layers += [between, nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    return layers, channels


@NECK_REGISTRY.register()
class SimpleFeaturePyramid(Neck):
    """Every level from the last map of a plain ViT, by transposed convolution or pooling, then 1x1 and 3x3 convolution.

    Child modules have the names of Detectron2's class of the same name, ``simfp_{k}`` and ``top_block``. Its misspelt
    padding constraint is not repeated: images are padded to a multiple of the coarsest level's stride.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "LN",
        levels: Sequence[int] = (2, 3, 4, 5),
        top_block: str = "maxpool",
    ):
        """Build the neck.

        Args:
            input_shape: channels and stride of each bottom-up map.
            in_features: the name of the one map to use, the last of a plain ViT.
            out_channels: d, the channels of every output.
            norm: "LN" (as published: layer norm over the channels), another norm of
                :func:`detectron2.layers.get_norm`, or empty: none.
            levels: the levels k to make, with stride 2^k; consecutive, ascending.
            top_block: as for :class:`~fpn_d2.modeling.FPN`, of those that read the last output.

        Raises:
            ValueError: not exactly one map is asked for, it is missing, or an option has no such value.
        """
        super().__init__()
        level = single_level(type(self).__name__, input_shape, in_features)
        levels = consecutive_levels(levels, "levels (MODEL.FPN.SIMPLE_PYRAMID_LEVELS)")
        if reads_bottom_up(top_block):
            raise ValueError(
                f"top_block (MODEL.FPN.TOP_BLOCK) is {top_block!r}, which reads C5, but {type(self).__name__} has only "
                f"{in_features[0]} below it; expected maxpool, p6p7_p5 or none"
            )
        norm = ChannelLayerNorm if norm == "LN" else norm
        channels = input_shape[in_features[0]].channels
        self.in_feature = in_features[0]
        self.levels = levels
        top = build_top_block(top_block, channels, out_channels)
        for k in levels:
            if channels % 2 ** max(level - k, 0):
                raise ValueError(
                    f"{in_features[0]} has {channels} channels, which cannot be halved {level - k} times for p{k}; "
                    "leave out fine levels in MODEL.FPN.SIMPLE_PYRAMID_LEVELS"
                )
            last = conv(out_channels, out_channels, 3, norm)  # first: refuses a norm that does not exist
            layers, width = rescale_layers(channels, level - k, norm)
            self.add_module(f"simfp_{k}", nn.Sequential(*layers, conv(width, out_channels, 1, norm), last))
        self.top_block = top
        above = [levels[-1] + 1 + i for i in range(top.num_levels if top is not None else 0)]
        self._output_shape = {f"p{k}": ShapeSpec(channels=out_channels, stride=2**k) for k in [*levels, *above]}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``cfg.MODEL.FPN``; top block "auto" is p6p7_p5 for RetinaNet."""
        refuse_fpn_options(cfg, cls.__name__)
        top_block = top_block_of(cfg)
        if cfg.MODEL.FPN.TOP_BLOCK == "auto" and top_block == "p6p7_c5":
            top_block = "p6p7_p5"
        return {
            "input_shape": input_shape,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "levels": cfg.MODEL.FPN.SIMPLE_PYRAMID_LEVELS,
            "top_block": top_block,
        }

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p2": ..., ...}``; finer levels have exactly 2^n times as many cells as the map."""
        outputs = [getattr(self, f"simfp_{k}")(features[self.in_feature]) for k in self.levels]
        if self.top_block is not None:
            outputs += self.top_block(outputs[-1])
        return dict(zip(self._output_shape, outputs, strict=True))

    def pyramid(self, bottom_up: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
        """Run both and cut each level to ceil(side / stride), which matters for sides that are no multiple of 16."""
        size = tuple(images.shape[-2:])
        maps = super().pyramid(bottom_up, images)
        return {name: cut_to_stride(x, size, self._output_shape[name].stride) for name, x in maps.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output, from high to low resolution."""
        return dict(self._output_shape)

    @property
    def size_divisibility(self) -> int:
        """The stride of the coarsest level below the top block."""
        return 2 ** self.levels[-1]


def single_level(neck: str, input_shape: dict[str, ShapeSpec], in_features: Sequence[str]) -> int:
    """Return the level of the one map that ``neck`` takes.

    Raises:
        ValueError: ``in_features`` does not name exactly one map of ``input_shape`` whose stride is a power of 2.
    """
    if len(in_features) != 1:
        available = ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in input_shape.items())
        raise ValueError(
            f"{neck} takes one bottom-up map, but in_features (MODEL.FPN.IN_FEATURES) names {len(in_features)}: "
            f"{', '.join(in_features) or 'none'}; the bottom-up pathway gives {available}"
        )
    return pyramid_levels(input_shape, in_features)[0]


def consecutive_levels(levels: Sequence[int], what: str) -> list[int]:
    """Return ``levels`` as a list.

    Raises:
        ValueError: it is empty or not a run of consecutive ascending whole numbers above 0; ``what`` names the key.
    """
    levels = list(levels)
    if not levels or levels[0] < 1 or levels != list(range(levels[0], levels[0] + len(levels))):
        raise ValueError(f"{what} is {levels}; expected consecutive ascending levels, as [2, 3, 4, 5]")
    return levels
