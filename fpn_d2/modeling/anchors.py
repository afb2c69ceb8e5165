"""Anchors as torchvision lays them out, for detectors that were trained there."""

import torch
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors with torchvision's two differences; with MODEL.ANCHOR_GENERATOR.OFFSET 0 they are equal.

    The corners of the anchors of a cell are rounded to whole pixels. And the distance between cells is the side of the
    padded image divided by the number of cells, rounded down: 56 and not 64 on a P6 of 4 cells over 224 pixels. The
    finest map is taken to have exactly its stride, as it has in images that are padded to a multiple of 32.
    """

    def generate_cell_anchors(
        self, sizes: tuple = (32, 64, 128, 256, 512), aspect_ratios: tuple = (0.5, 1, 2)
    ) -> Tensor:
        """Return (len(sizes) * len(aspect_ratios), 4) anchors round (0, 0), sizes first, in pixels."""
        # Halves go to the even neighbour, there as here.
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """Return the anchors of each map: H_l * W_l * A boxes, row by row, the A anchors of a cell together."""
        height, width = (side * self.strides[0] for side in features[0].shape[-2:])
        anchors = []
        for level_map, stride, cells in zip(features, self.strides, self.cell_anchors, strict=True):
            rows, columns = level_map.shape[-2:]
            y = torch.arange(rows, device=cells.device) * (height // rows) + self.offset * stride
            x = torch.arange(columns, device=cells.device) * (width // columns) + self.offset * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append(Boxes((shifts + cells).reshape(-1, 4)))
        return anchors
