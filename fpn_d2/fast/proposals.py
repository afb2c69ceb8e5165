"""Selection of proposals that decodes only the anchors that it keeps, and suppresses in compiled code, on a CPU.

Shape legend: N images, L levels, A_l anchors on level l, k of them kept per level.
"""

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import rpn as detectron2_rpn
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .guard import Fast, are_plain, inherits, is_itself, is_original
from .nms import batched_nms

_SELECT = detectron2_rpn.find_top_rpn_proposals


class FastRPN(Fast):
    """Detectron2's ``RPN``."""

    REPLACES = ("predict_proposals",)

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
        arguments = (anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        understood = (
            is_itself(self)
            and are_plain(*pred_objectness_logits, *pred_anchor_deltas)
            and type(self.box2box_transform) is Box2BoxTransform
            and is_original(Box2BoxTransform, "apply_deltas")
            and inherits(self, RPN, "_decode_proposals")
            and is_original(RPN, "_decode_proposals")
            and detectron2_rpn.find_top_rpn_proposals is _SELECT
        )
        if not understood:
            return super().predict_proposals(*arguments)
        with torch.no_grad():
            return select_proposals(
                *arguments,
                box2box_transform=self.box2box_transform,
                nms_thresh=self.nms_thresh,
                pre_nms_topk=self.pre_nms_topk[self.training],
                post_nms_topk=self.post_nms_topk[self.training],
                min_box_size=self.min_box_size,
                training=self.training,
            )


def select_proposals(
    anchors: list[Boxes],
    logits: list[Tensor],
    deltas: list[Tensor],
    image_sizes: list[tuple[int, int]],
    *,
    box2box_transform: Box2BoxTransform,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Return what Detectron2's RPN returns, after decoding k boxes per level in place of all of them.

    Decoding a box reads nothing but its own anchor, so that picking first gives the same bits.

    Args:
        anchors: of each level, A_l boxes in pixels of the network's input.
        logits: of each level, (N, A_l) objectness.
        deltas: of each level, (N, A_l, 4) for ``box2box_transform``.
        image_sizes: (height, width) of each image.
        box2box_transform: decodes deltas.
        nms_thresh: as in Detectron2's ``find_top_rpn_proposals``; so are the other four.
        pre_nms_topk: k.
        post_nms_topk: see there.
        min_box_size: see there.
        training: see there.

    Raises:
        FloatingPointError: in training, a box or score is not finite.
    """
    boxes, scores = [], []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
        top, index = top_scores(level_logits, pre_nms_topk)
        picked = level_deltas.gather(1, index[..., None].expand(-1, -1, level_deltas.shape[-1]))
        cells = level_anchors.tensor[index]
        decoded = box2box_transform.apply_deltas(picked.flatten(0, 1), cells.flatten(0, 1))
        boxes.append(decoded.view(cells.shape))
        scores.append(top)
    levels = torch.cat([torch.full(s.shape[1:], i, dtype=torch.int64) for i, s in enumerate(scores)])
    all_boxes, all_scores, results = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), []
    for image_boxes, image_scores, image_size in zip(all_boxes, all_scores, image_sizes, strict=True):
        rows = torch.isfinite(image_boxes).all(dim=1) & torch.isfinite(image_scores)
        if training and not rows.all():
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        candidates = Boxes(image_boxes[rows])
        candidates.clip(image_size)
        rows, large = rows.nonzero()[:, 0], candidates.nonempty(threshold=min_box_size)
        if not large.all():
            candidates, rows = candidates[large], rows[large]
        best = image_scores[rows]
        keep = batched_nms(candidates.tensor.float(), best, levels[rows], nms_thresh, post_nms_topk)
        result = Instances(image_size)
        result.proposal_boxes = candidates[keep]
        result.objectness_logits = best[keep]
        results.append(result)
    return results


def top_scores(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of each row, highest first, and of equal ones the first first: the order of a stable sort.

    Args:
        logits: (N, A).
        k: how many; all if there are fewer.

    Returns:
        Values and indices, each (N, min(k, A)).
    """
    k = min(k, logits.shape[1])
    if k == logits.shape[1]:
        return logits.sort(dim=1, descending=True, stable=True)
    values, indices = [], []
    for row in logits:
        # The k-th best of the best of each part: at least k are as high. Looking for it in 4 k numbers, not in all.
        width = max(1, len(row) // (4 * k))
        parts = row[: len(row) // width * width].view(width, -1).amax(dim=0)
        lowest = parts.topk(k).values[-1]
        # Not `row >= lowest`: a NaN counts as the largest, here as in a sort.
        candidates = (~(row < lowest)).nonzero()[:, 0]
        ordered, order = row[candidates].sort(descending=True, stable=True)
        values.append(ordered[:k])
        indices.append(candidates[order[:k]])
    return torch.stack(values), torch.stack(indices)
