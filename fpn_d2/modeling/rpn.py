"""Detectron2's region proposal network, with loss weights per pyramid level, decoding only what it keeps."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor
from torch.nn import functional as F

from fpn_d2.fast.apply import is_fast
from fpn_d2.fast.convolution import use_fast_convolutions
from fpn_d2.fast.proposals import select_proposals
from fpn_d2.fast.sampling import boxes_of, match, sample
from fpn_d2.fast.selection import find


@PROPOSAL_GENERATOR_REGISTRY.register()
class FPNRPN(RPN):
    """``RPN`` whose losses are a weighted sum over the levels; with equal weights of 1 it is ``RPN``, bit for bit.

    The losses of a level, without its weight, are its part of Detectron2's: both are divided by the number of anchors
    that are sampled in the whole batch, so that weights of 1 add up to Detectron2's losses.

    Unless ``exact``, the images of a batch are labelled, sampled and filtered together, with the same result: in
    training on a GPU the host then waits four times a batch and once an image, not six and up to twelve times.
    """

    exact = False  # of those made from a stock RPN as well, without __init__ (inference/optimize.py)

    @configurable
    def __init__(self, *, level_loss_weights: Sequence[float] = (), exact: bool = False, **kwargs):
        """Check and keep the weights.

        Args:
            level_loss_weights: one factor, 0 or more, for each map in ``in_features``, in their order; empty: 1 each.
            exact: run Detectron2's own code for everything but the choice of the anchors to decode.
            kwargs: the arguments of Detectron2's ``RPN``.

        Raises:
            ValueError: another number of weights, or one that is negative or not finite.
        """
        super().__init__(**kwargs)
        weights = [float(weight) for weight in level_loss_weights] or [1.0] * len(self.in_features)
        if len(weights) != len(self.in_features):
            raise ValueError(
                f"level_loss_weights (MODEL.RPN.LEVEL_LOSS_WEIGHTS) has {len(weights)} values; expected one for each "
                f"of the {len(self.in_features)} maps in MODEL.RPN.IN_FEATURES {list(self.in_features)}, or none"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"level_loss_weights (MODEL.RPN.LEVEL_LOSS_WEIGHTS) is {weights}; expected numbers of at least 0"
            )
        self.level_loss_weights = weights
        self.exact = exact

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read ``cfg.MODEL.RPN`` and ``cfg.MODEL.NUMERICS``."""
        args = super().from_config(cfg, input_shape)
        if is_fast(cfg):
            use_fast_convolutions(args["head"])
        return args | {"level_loss_weights": cfg.MODEL.RPN.LEVEL_LOSS_WEIGHTS, "exact": not is_fast(cfg)}

    @torch.jit.unused
    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the labels of the anchors and the boxes that they are matched with; see Detectron2's ``RPN``.

        Args:
            anchors: of each of the L levels, R_l boxes.
            gt_instances: of each of the N images, with ``gt_boxes``.

        Returns:
            Of each image (R,) int8: 1 object, 0 background, -1 ignored or not sampled; and (R, 4) boxes, which mean
            something where the label is 1.
        """
        if self.exact:
            return super().label_and_sample_anchors(anchors, gt_instances)
        together = Boxes.cat(anchors)
        labels, boxes = [], []
        for image in gt_instances:
            # In want of memory on the GPU the matching is done on the CPU.
            overlaps = retry_if_cuda_oom(pairwise_iou)(image.gt_boxes, together)
            found = retry_if_cuda_oom(match)(overlaps, self.anchor_matcher)
            matched, image_labels = (tensor.to(together.device) for tensor in found)
            del overlaps
            if self.anchor_boundary_thresh >= 0:
                inside = together.inside_box(image.image_size, self.anchor_boundary_thresh)
                image_labels.masked_fill_(~inside, -1)
            labels.append(image_labels)
            boxes.append(boxes_of(image.gt_boxes, matched, together.tensor))
        drawn = sample(labels, background=0, size=self.batch_size_per_image, positive_fraction=self.positive_fraction)
        for image_labels, (positive, negative) in zip(labels, drawn, strict=True):
            image_labels.fill_(-1).index_fill_(0, positive, 1).index_fill_(0, negative, 0)
        return labels, boxes

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
            return self._losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        sizes = [len(level) for level in anchors]
        labels = [image.split(sizes) for image in gt_labels]
        boxes = [image.split(sizes) for image in gt_boxes]
        total: dict[str, Tensor] = {}
        scalars: dict[str, float] = {}
        for i, weight in enumerate(self.level_loss_weights):
            # What Detectron2 writes down of a level are counts of anchors: kept apart, and written as their sum.
            with EventStorage() as of_level:
                part = self._losses(
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

    def _losses(self, anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes) -> dict[str, Tensor]:
        """Return Detectron2's losses; unless exact, worked out for the sampled anchors only."""
        if self.exact:
            return super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        labels = torch.stack(gt_labels)
        masks = [*(labels == 1), labels >= 0]
        (*positive, sampled), (num_negative,) = find(masks, [(labels == 0).sum()])
        num_images, num_anchors = labels.shape
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", sum(len(rows) for rows in positive) / num_images)
        storage.put_scalar("rpn/num_neg_anchors", num_negative / num_images)
        together = Boxes.cat(anchors).tensor
        in_batch = cat([rows + image * num_anchors for image, rows in enumerate(positive)])
        localization = _dense_box_regression_loss(
            [Boxes(cat([together[rows] for rows in positive]))],
            self.box2box_transform,
            [cat(pred_anchor_deltas, dim=1).flatten(0, 1)[in_batch][None]],
            [cat([boxes[rows] for boxes, rows in zip(gt_boxes, positive, strict=True)])],
            ...,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        objectness = F.binary_cross_entropy_with_logits(
            cat(pred_objectness_logits, dim=1).flatten()[sampled],
            labels.flatten()[sampled].to(torch.float32),
            reduction="sum",
        )
        losses = {"loss_rpn_cls": objectness, "loss_rpn_loc": localization}
        normalizer = self.batch_size_per_image * num_images
        return {name: loss / normalizer * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Return the proposals of each image, best first: Detectron2's, decoded after they are picked.

        Args:
            anchors: of each of the L levels, R_l boxes.
            pred_objectness_logits: of each level, (N, R_l).
            pred_anchor_deltas: of each level, (N, R_l, 4).
            image_sizes: (height, width) of each of the N images.
        """
        if torch.jit.is_tracing():  # picking looks at sizes, which a trace has to leave open
            return super().predict_proposals(anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        with torch.no_grad():
            return select_proposals(
                anchors,
                pred_objectness_logits,
                pred_anchor_deltas,
                image_sizes,
                box2box_transform=self.box2box_transform,
                nms_thresh=self.nms_thresh,
                pre_nms_topk=self.pre_nms_topk[self.training],
                post_nms_topk=self.post_nms_topk[self.training],
                min_box_size=self.min_box_size,
                training=self.training,
                exact=self.exact,
            )
