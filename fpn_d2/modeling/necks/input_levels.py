"""What necks that repeat a graph over all levels share: its inputs, every level brought to the same channels."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from .build import Neck
from .conv import xavier_conv
from .fpn import pyramid_levels
from .top_blocks import build_top_block, reads_bottom_up, top_block_of


class InputLevels(nn.Module):
    """1x1 convolutions on the bottom-up maps, and a top block that makes the coarser levels before the graph.

    In an FPN the top block comes last; here its levels take part in the fusion. It reads the last bottom-up map,
    or, for "maxpool" and "p6p7_p5", that map after its 1x1 convolution.

    Attributes:
        bottom_up_levels: level of each map in ``in_features``.
        levels: these and the levels of the top block, ascending.
        out_channels: of each level.
    """

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        in_features: Sequence[str],
        out_channels: int,
        norm: str,
        top_block: str,
    ):
        """Build the ``lateral{k}`` and the ``top_block``.

        Args:
            input_shape: channels and stride of each bottom-up map.
            in_features: names of the maps to use, from high to low resolution; strides double.
            out_channels: d, the channels of every level.
            norm: norm after each 1x1 convolution; empty: none.
            top_block: a name in ``TOP_BLOCKS``.

        Raises:
            ValueError: an option has no such value, a map is missing, or strides do not double.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.out_channels = out_channels
        self.bottom_up_levels = tuple(pyramid_levels(input_shape, in_features))
        for level, name in zip(self.bottom_up_levels, in_features, strict=True):
            self.add_module(f"lateral{level}", xavier_conv(input_shape[name].channels, out_channels, 1, norm))
        self.top_block = build_top_block(top_block, input_shape[in_features[-1]].channels, out_channels, norm)
        self._top_reads_bottom_up = reads_bottom_up(top_block)
        last = self.bottom_up_levels[-1]
        above = self.top_block.num_levels if self.top_block is not None else 0
        self.levels = (*self.bottom_up_levels, *range(last + 1, last + 1 + above))

    def forward(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """Return ``{k: (N, d, H/2^k, W/2^k)}``, k ascending, of the bottom-up maps."""
        maps = {
            level: getattr(self, f"lateral{level}")(features[name])
            for level, name in zip(self.bottom_up_levels, self.in_features, strict=True)
        }
        if self.top_block is not None:
            last = self.bottom_up_levels[-1]
            source = features[self.in_features[-1]] if self._top_reads_bottom_up else maps[last]
            maps |= {last + 1 + i: x for i, x in enumerate(self.top_block(source))}
        return maps


class GraphNeck(Neck):
    """A neck that runs a graph over all levels, those of the top block included, several times.

    Attributes:
        input_levels: makes the inputs of the graph.
        levels: those of inputs and outputs, ascending.
        repeats: how often the graph is run, each time with weights of its own.
    """

    default_repeats: int

    def __init__(self, input_levels: InputLevels, repeats: int):
        """Take over the inputs of the graph.

        Raises:
            ValueError: ``repeats`` is below one.
        """
        super().__init__()
        if repeats < 1:
            raise ValueError(
                f"repeats (MODEL.FPN.REPEATS) is {repeats}; expected 1 or more (in a configuration, 0 is the neck's "
                "own)"
            )
        self.repeats = repeats
        self.input_levels = input_levels
        self.levels = input_levels.levels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        refuse_fpn_options(cfg, cls.__name__)
        return {
            "input_shape": input_shape,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "top_block": top_block_of(cfg),
            "repeats": cfg.MODEL.FPN.REPEATS or cls.default_repeats,
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output, the finest first."""
        return {f"p{k}": ShapeSpec(channels=self.input_levels.out_channels, stride=2**k) for k in self.levels}

    @property
    def size_divisibility(self) -> int:
        """The coarsest bottom-up stride, as for the FPN; the neck itself works at any size."""
        return 2 ** self.input_levels.bottom_up_levels[-1]


# Options of the FPN that a graph has no counterpart of, and the value that leaves them alone.
FPN_ONLY = {"UPSAMPLE": "nearest", "FUSE_TYPE": "sum", "TOP_DOWN": True, "LATERAL": True, "OUT_FEATURES": []}


def refuse_fpn_options(cfg: CfgNode, neck: str) -> None:
    """Refuse a configuration that sets what only :class:`~.fpn.FPN` reads.

    Raises:
        ValueError: a key of ``FPN_ONLY`` has another value than it has there.
    """
    for key, value in FPN_ONLY.items():
        found = cfg.MODEL.FPN[key]
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ValueError(
                f"MODEL.FPN.{key} is {found!r}, which the neck {neck} does not have; "
                f"set it to {value!r} or take MODEL.FPN.NECK FPN"
            )
