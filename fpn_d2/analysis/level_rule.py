"""The level rule of a configuration, applied to boxes in pixels of their images."""

import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.config import CfgNode

from fpn_d2.errors import UserError
from fpn_d2.modeling.level_assign import canonical_levels


@dataclass(frozen=True)
class Rule:
    """k = floor(k0 + log2(sqrt(w * h) / s0)) at the network's size, then the nearest level there is.

    Attributes:
        levels: ascending.
        canonical_box_size: s0, in pixels of the network's input.
        canonical_level: k0.
        min_size: ``INPUT.MIN_SIZE_TEST``.
        max_size: ``INPUT.MAX_SIZE_TEST``.
    """

    levels: tuple[int, ...]
    canonical_box_size: float = 224
    canonical_level: int = 4
    min_size: int = 800
    max_size: int = 1333

    @classmethod
    def of(cls, cfg: CfgNode) -> "Rule":
        """The rule of a configuration; for RetinaNet, which pools nothing, over the levels of its head.

        Raises:
            UserError: the model has no pyramid.
        """
        retina = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
        names = cfg.MODEL.RETINANET.IN_FEATURES if retina else cfg.MODEL.ROI_HEADS.IN_FEATURES
        found = [re.fullmatch(r"p(\d+)", name) for name in names]
        if not all(found):
            raise UserError(f"the model has no pyramid: its heads look at {list(names)}, not at p2, p3, ...")
        assign = cfg.MODEL.ROI_LEVEL_ASSIGN
        return cls(
            tuple(sorted(int(name[1]) for name in found)),
            assign.CANONICAL_BOX_SIZE,
            assign.CANONICAL_LEVEL,
            cfg.INPUT.MIN_SIZE_TEST,
            cfg.INPUT.MAX_SIZE_TEST,
        )

    def other(self, canonical_box_size: float | None = None, canonical_level: int | None = None) -> "Rule":
        """The same with another s0 or k0."""
        if canonical_box_size is not None and not canonical_box_size > 0:
            raise UserError(f"the canonical box size is {canonical_box_size}; expected pixels, more than 0")
        given = {"canonical_box_size": canonical_box_size, "canonical_level": canonical_level}
        return replace(self, **{key: value for key, value in given.items() if value is not None})

    def scales(self, sizes: np.ndarray) -> np.ndarray:
        """(I,) by how much images are enlarged for the network; ``sizes`` (I, 2) are heights and widths."""
        if self.min_size == 0:
            return np.ones(len(sizes))
        return np.minimum(self.min_size / sizes.min(1), self.max_size / sizes.max(1))

    def assign(self, areas: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """(N,) the level of boxes.

        Args:
            areas: (N,) in square pixels of the images.
            scales: (N,) of their images.
        """
        seen = torch.as_tensor(areas * scales**2)
        places = canonical_levels(seen, self.levels, self.canonical_box_size, self.canonical_level)
        return np.array(self.levels)[places.numpy()]
