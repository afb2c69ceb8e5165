"""What a neck is, the registry of necks and the builder that reads the configuration."""

import re
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from fpn_d2.errors import UserError

NECK_REGISTRY = Registry("NECK")
NECK_REGISTRY.__doc__ = """
Registry of necks: backbones that turn the maps of a bottom-up pathway, which they own, into a pyramid.

A registered name is called as ``NECK_REGISTRY.get(name)(cfg, bottom_up)`` and returns a :class:`Neck`.
"""


class Neck(Backbone):
    """A Detectron2 backbone: images -> bottom-up pathway, which it owns -> feature pyramid.

    A subclass makes its own layers in its constructor and ends it with :meth:`own`; :meth:`fuse` is what it computes.
    Maps are in dictionaries, from high to low resolution.

    Attributes:
        in_features: names of the bottom-up maps that it reads.
        bottom_up: takes images (N, 3, H, W), returns a dictionary of maps.
    """

    _size_divisibility = 0  # the sides of images are padded to a multiple of this many pixels; 0: no need

    def own(self, bottom_up: Backbone, in_features: Sequence[str], outputs: dict[str, ShapeSpec]) -> None:
        """Take the bottom-up pathway as the last child, and say what the neck reads and returns.

        As the last: optimizers number their state in the order of parameters, and Detectron2's FPN has this one. A
        subclass of a neck that has called it calls it again behind its own layers.

        Args:
            bottom_up: the pathway.
            in_features: names of its maps that the neck reads.
            outputs: channels and stride of each map that :meth:`fuse` returns, in the same order.
        """
        self.in_features = tuple(in_features)
        # What code for Detectron2 reads of a backbone.
        self._out_features = list(outputs)
        self._out_feature_channels = {name: shape.channels for name, shape in outputs.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in outputs.items()}
        self._modules.pop("bottom_up", None)
        self.bottom_up = bottom_up

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the pyramid ``{"p2": (N, C, H/4, W/4), ...}`` of the images ``x`` (N, 3, H, W).

        Override it in a neck that has to know the size of the images, or runs the bottom-up pathway more than once.
        """
        return self.fuse(self.bottom_up(x))

    def fuse(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pyramid of the bottom-up maps ``{"res2": ..., ...}``."""
        raise NotImplementedError(f"{type(self).__name__} has no fuse")

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level; asked for another one, it says which keys would give it."""
        return PyramidShapes(super().output_shape())

    @property
    def size_divisibility(self) -> int:
        """Image sides are padded to a multiple of this many pixels: what the neck or the pathway asks for."""
        return max(self._size_divisibility, self.bottom_up.size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What the bottom-up pathway asks for on Detectron2's main branch (a square input for some ViTs)."""
        constraints = dict(getattr(self.bottom_up, "padding_constraints", {}))
        if "size_divisibility" in constraints:
            constraints["size_divisibility"] = max(constraints["size_divisibility"], self.size_divisibility)
        return constraints

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``; a neck that it can compile overrides this and returns a module.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"torch.jit.script cannot compile the neck {type(self).__name__} with these options, only the FPN with "
            "those that Detectron2 has too; trace the model instead (torch.jit.trace, or Detectron2's TracingAdapter)"
        )


class PyramidShapes(dict):
    """Name of each level: its ``ShapeSpec``. A level that is not there is an error that names the keys to set."""

    def __missing__(self, name: str) -> ShapeSpec:
        raise NoSuchLevel(
            f"the pyramid has {', '.join(self) or 'no levels'}, not the {name!r} that a head, the RPN or the detector "
            f"asks for{_cure(name, list(self))}"
        )


class NoSuchLevel(UserError, KeyError):
    """A level is asked for that the pyramid does not have."""

    __str__ = ValueError.__str__  # that of KeyError shows quotes and escapes


def _cure(name: str, levels: list[str]) -> str:
    found = [re.fullmatch(r"p(\d+)", level) for level in (name, *levels)]
    if all(found) and levels:
        asked, *have = (int(match[1]) for match in found)
        if asked > max(have):
            return (
                ": set MODEL.FPN.TOP_BLOCK to p6p7_p5 (FCOS, CenterNet and what is built on them), p6p7_c5 (RetinaNet) "
                "or maxpool (one level more), and MODEL.FPN.OUT_FEATURES, where it is set, to name it"
            )
        if asked < min(have):
            return ": add the bottom-up map of its stride to MODEL.FPN.IN_FEATURES"
    return "; set its IN_FEATURES (MODEL.RPN.IN_FEATURES, MODEL.ROI_HEADS.IN_FEATURES, ...) to levels of the pyramid"


def build_neck(cfg: CfgNode, bottom_up: Backbone) -> Neck:
    """Build the neck named in ``cfg.MODEL.FPN.NECK`` on ``bottom_up``.

    Raises:
        UserError: no neck has that name, or the one that has it does not own its bottom-up pathway.
    """
    name = cfg.MODEL.FPN.NECK
    if name not in NECK_REGISTRY:
        known = ", ".join(sorted(key for key, _ in NECK_REGISTRY))
        raise UserError(f"MODEL.FPN.NECK is {name!r}, which is not a registered neck; known necks: {known}")
    neck = NECK_REGISTRY.get(name)(cfg, bottom_up)
    if not hasattr(neck, "bottom_up"):
        raise UserError(
            f"the neck {name} has no bottom_up, expected a fpn_d2.modeling.Neck whose constructor ends with "
            "self.own(bottom_up, in_features, outputs)"
        )
    return neck
