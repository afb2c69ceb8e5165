"""What necks that repeat a graph over all levels share: its inputs, every level brought to the same channels."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .auto_top_block import top_block_of
from .build import Neck
from .parts import pyramid_levels, refuse_fpn_options, xavier_conv
from .top_blocks import build_top_block


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
            UserError: an option has no such value, a map is missing, or strides do not double.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.out_channels = out_channels
        self.bottom_up_levels = tuple(pyramid_levels(input_shape, in_features))
        for level, name in zip(self.bottom_up_levels, in_features, strict=True):
            self.add_module(f"lateral{level}", xavier_conv(input_shape[name].channels, out_channels, 1, norm))
        name, last = in_features[-1], self.bottom_up_levels[-1]
        self.top_block = build_top_block(top_block, name, input_shape[name].channels, last, out_channels, norm)
        above = self.top_block.num_levels if self.top_block is not None else 0
        self.levels = (*self.bottom_up_levels, *range(last + 1, last + 1 + above))

    def forward(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """Return ``{k: (N, d, H/2^k, W/2^k)}``, k ascending, of the bottom-up maps."""
        maps = {
            level: getattr(self, f"lateral{level}")(features[name])
            for level, name in zip(self.bottom_up_levels, self.in_features, strict=True)
        }
        if self.top_block is not None:
            last, name = self.bottom_up_levels[-1], self.top_block.in_feature
            source = features[name] if name in self.in_features else maps[last]
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

        Args:
            input_levels: see above.
            repeats: how often the graph is run.

        Raises:
            UserError: ``repeats`` is below one.
        """
        super().__init__()
        if repeats < 1:
            raise UserError(
                f"repeats (MODEL.FPN.REPEATS) is {repeats}; expected 1 or more (in a configuration, 0 is the neck's "
                "own)"
            )
        self.repeats = repeats
        self.input_levels = input_levels
        self.levels = input_levels.levels
        # As for the FPN; the neck itself works at any size.
        self._size_divisibility = 2 ** input_levels.bottom_up_levels[-1]

    def own(self, bottom_up: Backbone) -> None:
        """Take the bottom-up pathway as the last child; see :class:`Neck`."""
        channels = self.input_levels.out_channels
        outputs = {f"p{k}": ShapeSpec(channels=channels, stride=2**k) for k in self.levels}
        super().own(bottom_up, self.input_levels.in_features, outputs)

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        refuse_fpn_options(cfg, cls.__name__)
        last = pyramid_levels(bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES)[-1]
        return {
            "bottom_up": bottom_up,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "top_block": top_block_of(cfg, last),
            "repeats": cfg.MODEL.FPN.REPEATS or cls.default_repeats,
        }
