"""What a neck is, the registry of necks and the builder that reads the configuration."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import Tensor, nn

NECK_REGISTRY = Registry("NECK")
NECK_REGISTRY.__doc__ = """
Registry of necks: modules that turn the maps of a bottom-up pathway into a pyramid.

A registered name is called as ``NECK_REGISTRY.get(name)(cfg, input_shape)`` and returns a :class:`Neck`.
"""


class Neck(nn.Module):
    """Turns the feature maps of a bottom-up pathway into a feature pyramid.

    A neck is a pure module: ``forward`` takes a dictionary of maps and returns one, both ordered from high to low
    resolution. Its parameters and buffers live in child modules, never on the neck itself, because
    :class:`~fpn_d2.modeling.backbone.PyramidBackbone` shows the children under Detectron2's own names
    (``backbone.fpn_lateral2``, not ``backbone.neck.fpn_lateral2``).
    """

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the pyramid ``{"p2": (N, C, H/4, W/4), ...}`` of the bottom-up maps ``{"res2": ..., ...}``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def pyramid(self, bottom_up: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
        """Return the pyramid of ``images`` (N, 3, H, W): the neck on the maps of ``bottom_up``.

        Override it in a neck that has to know the size of the images, or runs the bottom-up pathway more than once.
        """
        return self(bottom_up(images))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map that ``forward`` returns, in the same order."""
        raise NotImplementedError(f"{type(self).__name__} has no output_shape")

    @property
    def size_divisibility(self) -> int:
        """The sides of the input image are padded to a multiple of this many pixels; 0: no padding is needed."""
        return 0


def build_neck(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> Neck:
    """Build the neck named in ``cfg.MODEL.FPN.NECK`` for bottom-up maps of ``input_shape``.

    Raises:
        ValueError: no neck has that name.
    """
    name = cfg.MODEL.FPN.NECK
    if name not in NECK_REGISTRY:
        known = ", ".join(sorted(key for key, _ in NECK_REGISTRY))
        raise ValueError(f"MODEL.FPN.NECK is {name!r}, which is not a registered neck; known necks: {known}")
    return NECK_REGISTRY.get(name)(cfg, input_shape)
