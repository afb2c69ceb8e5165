"""The level rule of a configuration, applied to boxes in pixels of their images."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes

from fpn_d2.errors import UserError
from fpn_d2.inference.load import configuration_of
from fpn_d2.modeling.level_assign import CanonicalLevelAssigner
from fpn_d2.modeling.roi_rules import build_rule, combines_levels


@dataclass(frozen=True)
class Rule:
    """k = floor(k0 + log2(sqrt(w * h) / s0)) at the network's size, then the nearest level there is; or another rule.

    Attributes:
        levels: ascending.
        canonical_box_size: s0, in pixels of the network's input.
        canonical_level: k0.
        min_size: ``INPUT.MIN_SIZE_TEST``.
        max_size: ``INPUT.MAX_SIZE_TEST``.
        name: ``MODEL.ROI_LEVEL_ASSIGN.NAME``. A RoI that is pooled from several levels counts on its canonical one.
        assigner: what gives boxes their level indices; None: the rule above.
    """

    levels: tuple[int, ...]
    canonical_box_size: float = 224
    canonical_level: int = 4
    min_size: int = 800
    max_size: int = 1333
    name: str = "canonical"
    assigner: Callable | None = None

    @classmethod
    def of(cls, cfg: CfgNode, name: str | None = None) -> "Rule":
        """The rule of a configuration; for RetinaNet, which pools nothing, the canonical one over its head's levels.

        Args:
            cfg: the configuration.
            name: another rule for its model, a name that ``MODEL.ROI_LEVEL_ASSIGN.NAME`` could have.

        Raises:
            UserError: the model has no pyramid, or there is no such rule.
        """
        retina = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
        names = cfg.MODEL.RETINANET.IN_FEATURES if retina else cfg.MODEL.ROI_HEADS.IN_FEATURES
        found = [re.fullmatch(r"p(\d+)", name) for name in names]
        if not all(found):
            raise UserError(f"the model has no pyramid: its heads look at {list(names)}, not at p2, p3, ...")
        assign = cfg.MODEL.ROI_LEVEL_ASSIGN
        levels = tuple(sorted(int(match[1]) for match in found))
        name = ("canonical" if retina else assign.NAME) if name is None else name
        return cls(
            levels,
            assign.CANONICAL_BOX_SIZE,
            assign.CANONICAL_LEVEL,
            cfg.INPUT.MIN_SIZE_TEST,
            cfg.INPUT.MAX_SIZE_TEST,
            name,
            _assigner(cfg, name, levels),
        )

    def other(self, canonical_box_size: float | None = None, canonical_level: int | None = None) -> "Rule":
        """The canonical rule with another s0 or k0, for the same images."""
        if canonical_box_size is not None and not canonical_box_size > 0:
            raise UserError(f"the canonical box size is {canonical_box_size}; expected pixels, more than 0")
        given = {"canonical_box_size": canonical_box_size, "canonical_level": canonical_level}
        given = {key: value for key, value in given.items() if value is not None}
        return replace(self, name="canonical", assigner=None, **given)

    def scales(self, sizes: np.ndarray) -> np.ndarray:
        """(I,) by how much images are enlarged for the network; ``sizes`` (I, 2) are heights and widths."""
        if self.min_size == 0:
            return np.ones(len(sizes))
        return np.minimum(self.min_size / sizes.min(1), self.max_size / sizes.max(1))

    def assign(self, boxes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """(N,) the level of boxes.

        Args:
            boxes: (N, 4) x1, y1, x2, y2 in pixels of the images.
            scales: (N,) of their images.
        """
        seen = Boxes(torch.as_tensor(boxes * scales[:, None]))
        assigner = self.assigner or CanonicalLevelAssigner(self.levels, self.canonical_box_size, self.canonical_level)
        return np.array(self.levels)[assigner([seen]).numpy()]

    def assign_in(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(N,) the level of boxes (N, 4) in an image of ``size``, its height and width."""
        return self.assign(boxes, np.repeat(self.scales(np.array([size], float)), len(boxes)))

    def words(self) -> str:
        """How tables call it: canonical size and level, or the name of another rule."""
        return f"{self.canonical_box_size:g}, {self.canonical_level}" if self.assigner is None else self.name


def _assigner(cfg: CfgNode, name: str, levels: tuple[int, ...]) -> Callable | None:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_LEVEL_ASSIGN.NAME = name
    return None if name == "canonical" or combines_levels(cfg) else build_rule(cfg, levels, cfg.MODEL.FPN.OUT_CHANNELS)


def rule_of_file(path: str) -> Rule:
    """The rule of a configuration file, or of the configuration that a checkpoint holds or has beside it.

    Raises:
        UserError: there is no such file, or it says nothing of a pyramid.
    """
    is_config = path.endswith((".yaml", ".yml"))
    return Rule.of(configuration_of(path, path if is_config else None)[0])
