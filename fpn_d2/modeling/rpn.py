"""Detectron2's region proposal network, with loss weights per pyramid level."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from fpn_d2.config import require_keys
from fpn_d2.errors import UserError
from fpn_d2.fast.apply import numerics, speed_up
from fpn_d2.fast.guard import of_class


@PROPOSAL_GENERATOR_REGISTRY.register()
class FPNRPN(RPN):
    """``RPN`` whose losses are a weighted sum over the levels; with equal weights of 1 it is ``RPN``, bit for bit.

    The losses of a level, without its weight, are its part of Detectron2's: both are divided by the number of anchors
    that are sampled in the whole batch, so that weights of 1 add up to Detectron2's losses.
    """

    @configurable
    def __init__(self, *, level_loss_weights: Sequence[float] = (), numerics: str = "fast", **kwargs):
        """Check and keep the weights.

        Args:
            level_loss_weights: one factor, 0 or more, for each map in ``in_features``, in their order; empty: 1 each.
            numerics: "fast", or "exact" for Detectron2's own operations; see :func:`fpn_d2.fast.apply.speed_up`.
            kwargs: the arguments of Detectron2's ``RPN``.

        Raises:
            UserError: another number of weights, or one that is negative or not finite.
        """
        super().__init__(**kwargs)
        weights = [float(weight) for weight in level_loss_weights] or [1.0] * len(self.in_features)
        if len(weights) != len(self.in_features):
            raise UserError(
                f"level_loss_weights (MODEL.RPN.LEVEL_LOSS_WEIGHTS) has {len(weights)} values; expected one for each "
                f"of the {len(self.in_features)} maps in MODEL.RPN.IN_FEATURES {list(self.in_features)}, or none"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise UserError(
                f"level_loss_weights (MODEL.RPN.LEVEL_LOSS_WEIGHTS) is {weights}; expected numbers of at least 0"
            )
        self.level_loss_weights = weights
        speed_up(self, numerics)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``cfg.MODEL.RPN``."""
        require_keys(cfg)
        return super().from_config(cfg, input_shape) | {
            "level_loss_weights": cfg.MODEL.RPN.LEVEL_LOSS_WEIGHTS,
            "numerics": numerics(cfg),
        }

    def __prepare_scriptable__(self) -> RPN:
        """What ``torch.jit.script`` compiles: Detectron2's ``RPN``, which proposes the same."""
        return of_class(self, RPN, "level_loss_weights") if type(self) is FPNRPN else self

    @torch.jit.unused
    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return ``loss_rpn_cls`` and ``loss_rpn_loc``; see Detectron2's ``RPN.losses``.

        Args:
            anchors: of each of the L levels, R_l boxes.
            pred_objectness_logits: of each level, (N, R_l).
            gt_labels: of each of the N images, (R,), the levels behind each other: 1 object, 0 background, -1 ignored.
            pred_anchor_deltas: of each level, (N, R_l, 4).
            gt_boxes: of each image, (R, 4).
        """
        if all(weight == 1 for weight in self.level_loss_weights):
            return super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        sizes = [len(level) for level in anchors]
        labels = [image.split(sizes) for image in gt_labels]
        boxes = [image.split(sizes) for image in gt_boxes]
        total: dict[str, Tensor] = {}
        scalars: dict[str, float] = {}
        for i, weight in enumerate(self.level_loss_weights):
            # What Detectron2 writes down of a level are counts of anchors: kept apart, and written as their sum.
            with EventStorage() as of_level:
                part = super().losses(
                    [anchors[i]],
                    [pred_objectness_logits[i]],
                    [image[i] for image in labels],
                    [pred_anchor_deltas[i]],
                    [image[i] for image in boxes],
                )
            for name, (value, _) in of_level.latest().items():
                scalars[name] = scalars.get(name, 0.0) + value
            for name, loss in part.items():
                total[name] = total[name] + weight * loss if name in total else weight * loss
        get_event_storage().put_scalars(**scalars)
        return total
