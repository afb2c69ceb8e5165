"""Bi-directional FPN with weighted fusion (Tan et al., EfficientDet, CVPR 2020, section 3 and figure 3d).

Shape legend, for an image of H x W pixels in a batch of N:
    p{k}       input of level k: (N, d, ceil(H / 2^k), ceil(W / 2^k))
    p{k}_td    node of the top-down path, as p{k}
    p{k}_out   output of level k, as p{k}; input of level k for the next layer
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .build import NECK_REGISTRY
from .input_levels import GraphNeck, InputLevels
from .parts import fit, nearest, xavier_conv

FUSIONS = ("fast", "softmax", "sum")


class Node(NamedTuple):
    """A node of the graph: its name, its level, and the names of the nodes or inputs that it fuses."""

    name: str
    level: int
    inputs: tuple[str, ...]


def bifpn_nodes(min_level: int, max_level: int) -> tuple[Node, ...]:
    """Return the nodes of one layer for the levels ``min_level`` to ``max_level``, in the order of computation.

    Example:
        >>> [(node.name, node.inputs) for node in bifpn_nodes(3, 5)]
        [('p4_td', ('p4', 'p5')), ('p3_out', ('p3', 'p4_td')), ('p4_out', ('p4', 'p4_td', 'p3_out')), \
('p5_out', ('p5', 'p4_out'))]

    Raises:
        UserError: there are fewer than two levels.
    """
    if max_level <= min_level:
        raise UserError(f"a BiFPN fuses levels, and there is only level {min_level}; it needs at least two")
    nodes = []
    above = f"p{max_level}"
    for k in range(max_level - 1, min_level - 1, -1):
        # The finest level has one node, which ends the top-down path and starts the bottom-up path.
        nodes.append(Node(f"p{k}_td" if k > min_level else f"p{k}_out", k, (f"p{k}", above)))
        above = nodes[-1].name
    for k in range(min_level + 1, max_level + 1):
        own = (f"p{k}", f"p{k}_td") if k < max_level else (f"p{k}",)
        nodes.append(Node(f"p{k}_out", k, (*own, f"p{k - 1}_out")))
    return tuple(nodes)


class Fusion(nn.Module):
    """Weighted sum of maps of one size (section 3.3).

    "fast": w_i / (eps + sum_j w_j) with w = ReLU of a learned weight, eps = 1e-4; "softmax" over learned weights;
    "sum": no weights. Learned weights start at one.
    """

    def __init__(self, num_inputs: int, fusion: str):
        super().__init__()
        self.fusion = fusion
        if fusion != "sum":
            self.weight = nn.Parameter(torch.ones(num_inputs))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the fused map, of the shape of each in ``maps``."""
        if self.fusion == "sum":
            return sum(maps[1:], maps[0])
        if self.fusion == "softmax":
            weights = self.weight.softmax(dim=0)
        else:
            positive = self.weight.relu()
            weights = positive / (positive.sum() + 1e-4)
        # Each weight is a tensor without dimensions, so that maps of half precision stay so.
        return sum((w * x for w, x in zip(weights[1:], maps[1:], strict=True)), weights[0] * maps[0])

    def extra_repr(self) -> str:
        return self.fusion


class FusionNode(nn.Module):
    """Fusion, SiLU, 3x3 convolution and norm: the order of the authors' code.

    A separable convolution is a 3x3 convolution of each channel, without bias, then a 1x1 convolution.
    """

    def __init__(self, num_inputs: int, channels: int, fusion: str, separable: bool, norm: str):
        super().__init__()
        self.fusion = Fusion(num_inputs, fusion)
        self.depthwise = None
        if separable:
            self.depthwise = Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            nn.init.kaiming_uniform_(self.depthwise.weight, a=1)
        self.conv = xavier_conv(channels, channels, 1 if separable else 3, norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the node's map, of the shape of each in ``maps``."""
        x = F.silu(self.fusion(maps))
        if self.depthwise is not None:
            x = self.depthwise(x)
        return self.conv(x)


class BiFPNLayer(nn.Module):
    """One pass top-down and one bottom-up over all levels; its children have the names of the nodes."""

    def __init__(self, nodes: Sequence[Node], channels: int, fusion: str, separable: bool, norm: str):
        super().__init__()
        self.nodes = tuple(nodes)
        for node in self.nodes:
            self.add_module(node.name, FusionNode(len(node.inputs), channels, fusion, separable, norm))

    def forward(self, inputs: dict[int, Tensor], skips: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return the output of each level.

        Args:
            inputs: ``{k: (N, d, H_k, W_k)}``, what the top-down path reads.
            skips: the same for the bottom-up path; another tensor than in ``inputs`` where a bottom-up map has a
                second 1x1 convolution.
        """
        maps = {}
        bottom_up = False
        for node in self.nodes:
            entries = skips if bottom_up else inputs
            size = inputs[node.level].shape[-2:]
            sources = []
            for name in node.inputs:
                level = int(name.split("_")[0][1:])
                sources.append(_resize(maps[name] if name in maps else entries[level], level, node.level, size))
            maps[node.name] = getattr(self, node.name)(sources)
            bottom_up = bottom_up or node.name.endswith("_out")
        return {k: maps[f"p{k}_out"] for k in inputs}


@NECK_REGISTRY.register()
class BiFPN(GraphNeck):
    """Layers that pass over all levels top-down and bottom-up, with learned weights where maps meet.

    Maps are up-sampled by repeating cells and down-sampled by 3x3 stride-2 max pooling, to the exact size of the
    target. As in the authors' code, each use of a bottom-up map in the first layer has its own 1x1 convolution:
    ``input_levels.lateral{k}`` for the top-down path and ``bifpn_skip{k}`` for the bottom-up path. The levels of the
    top block are inputs of the graph, which the paper makes with "p6p7_maxpool". The layers are ``bifpn_layer{i}``.

    Differs from the authors' code: a convolution before a norm has no bias; norms have PyTorch's epsilon and
    momentum; max pooling of even sizes pads at the top and left, not at the bottom and right.
    """

    default_repeats = 3

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "BN",
        top_block: str = "p6p7_maxpool",
        repeats: int = default_repeats,
        fusion: str = "fast",
        separable_conv: bool = True,
    ):
        """Build the neck.

        Args:
            bottom_up: the bottom-up pathway.
            in_features: names of the maps to use, from high to low resolution; strides double.
            out_channels: d, the channels of every level; EfficientDet has 64 (D0) to 384 (D7).
            norm: a norm of :func:`detectron2.layers.get_norm` after each convolution; "BN" in the paper; empty: none.
            top_block: what makes the input levels above the last bottom-up map: "maxpool", "p6p7_c5", "p6p7_p5",
                "p6p7_maxpool" or "none".
            repeats: number of layers; EfficientDet has 3 (D0) to 8 (D7).
            fusion: "fast" (fast normalised fusion), "softmax" or "sum".
            separable_conv: whether the 3x3 convolutions are depthwise separable, as in the paper.

        Raises:
            UserError: an option has no such value, a map is missing, strides do not double, or there is one level.
        """
        if fusion not in FUSIONS:
            raise UserError(f"fusion (MODEL.FPN.FUSION) is {fusion!r}; expected one of {', '.join(FUSIONS)}")
        input_shape = bottom_up.output_shape()
        super().__init__(InputLevels(input_shape, in_features, out_channels, norm, top_block), repeats)
        nodes = bifpn_nodes(self.levels[0], self.levels[-1])
        self._skips = dict(zip(self.input_levels.bottom_up_levels[1:], in_features[1:], strict=True))
        for level, name in self._skips.items():
            self.add_module(f"bifpn_skip{level}", xavier_conv(input_shape[name].channels, out_channels, 1, norm))
        for i in range(repeats):
            self.add_module(f"bifpn_layer{i}", BiFPNLayer(nodes, out_channels, fusion, separable_conv, norm))
        self.own(bottom_up)

    @classmethod
    def from_config(cls, cfg: CfgNode, bottom_up: Backbone) -> dict:
        """Read ``cfg.MODEL.FPN``."""
        return super().from_config(cfg, bottom_up) | {
            "fusion": cfg.MODEL.FPN.FUSION,
            "separable_conv": cfg.MODEL.FPN.SEPARABLE_CONV,
        }

    def fuse(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``{"p3": (N, d, H/8, W/8), ...}``, from high to low resolution, for maps of any size."""
        maps = self.input_levels(features)
        skips = maps | {k: getattr(self, f"bifpn_skip{k}")(features[name]) for k, name in self._skips.items()}
        for i in range(self.repeats):
            maps = skips = getattr(self, f"bifpn_layer{i}")(maps, skips)
        return {f"p{k}": maps[k] for k in self.levels}


def _resize(x: Tensor, level: int, target: int, size: tuple[int, int]) -> Tensor:
    """Bring ``x`` of ``level`` to ``size``, that of the level ``target``, which is the same or next to it."""
    if level > target:
        return nearest(x, 2, size)
    if level < target:
        return fit(F.max_pool2d(x, kernel_size=3, stride=2, padding=1), size, "nearest")
    return x
