"""A bottom-up pathway without work, under which a neck is measured alone."""

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor


class GivenMaps(Backbone):
    """A bottom-up pathway that gives the maps that it was given."""

    def __init__(self, maps: dict[str, Tensor], shapes: dict[str, ShapeSpec]):
        super().__init__()
        self._maps, self._shapes = maps, shapes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self._maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes
