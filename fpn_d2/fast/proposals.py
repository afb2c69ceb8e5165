"""Selection of proposals that decodes only the anchors that it keeps.

Shape legend: N images, L levels, A_l anchors on level l, k of them kept per level.
"""

import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .selection import clip_boxes, find, nms_by_class


def select_proposals(
    anchors: list[Boxes],
    logits: list[Tensor],
    deltas: list[Tensor],
    image_sizes: list[tuple[int, int]],
    *,
    box2box_transform,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
    exact: bool = False,
) -> list[Instances]:
    """Return what Detectron2's RPN returns, after decoding k boxes per level in place of all of them.

    Decoding a box reads nothing but its own anchor, so that picking first gives the same bits.

    Args:
        anchors: of each level, A_l boxes in pixels of the network's input.
        logits: of each level, (N, A_l) objectness.
        deltas: of each level, (N, A_l, 4) for ``box2box_transform``.
        image_sizes: (height, width) of each image.
        box2box_transform: decodes deltas.
        nms_thresh: as in :func:`find_top_rpn_proposals`; so are the other four.
        pre_nms_topk: k.
        post_nms_topk: see there.
        min_box_size: see there.
        training: see there.
        exact: filter and suppress by :func:`find_top_rpn_proposals` itself, which makes the host wait for a GPU up to
            seven times an image; otherwise by :func:`_filter_and_suppress`, once a batch and once an image.

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
    if exact:
        return find_top_rpn_proposals(
            boxes, scores, image_sizes, nms_thresh, pre_nms_topk, post_nms_topk, min_box_size, training
        )
    return _filter_and_suppress(boxes, scores, image_sizes, nms_thresh, post_nms_topk, min_box_size, training)


def _filter_and_suppress(
    boxes: list[Tensor],
    scores: list[Tensor],
    image_sizes: list[tuple[int, int]],
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Clip boxes, drop those that are too small or not finite, and suppress, each level by itself.

    Args:
        boxes: of each level (N, k, 4), best first.
        scores: of each level (N, k).
        image_sizes, nms_thresh, post_nms_topk, min_box_size, training: see :func:`select_proposals`.
    """
    levels = torch.cat([torch.full(s.shape[1:], i, dtype=torch.int64, device=s.device) for i, s in enumerate(scores)])
    all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
    finite = torch.isfinite(all_boxes).all(dim=2) & torch.isfinite(all_scores)
    clipped = [Boxes(clip_boxes(image, size)) for image, size in zip(all_boxes, image_sizes, strict=True)]
    usable = [image.nonempty(min_box_size) & mask for image, mask in zip(clipped, finite, strict=True)]
    found, (num_infinite,) = find(usable, [(~finite).sum()])
    if training and num_infinite:
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
    results = []
    for image_boxes, image_scores, image_size, rows in zip(clipped, all_scores, image_sizes, found, strict=True):
        if len(rows) == len(levels):
            candidates, best, groups = image_boxes.tensor, image_scores, levels
        else:
            candidates, best, groups = image_boxes.tensor[rows], image_scores[rows], levels[rows]
        keep = nms_by_class(candidates, best, groups, nms_thresh, most=post_nms_topk)
        result = Instances(image_size)
        result.proposal_boxes = Boxes(candidates[keep])
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
    if k == logits.shape[1] or logits.device.type != "cpu":
        # Elsewhere than on a CPU a threshold would have to travel to the host; ties are then in any order.
        return logits.sort(dim=1, descending=True, stable=True) if k == logits.shape[1] else logits.topk(k, dim=1)
    values, indices = [], []
    for row in logits:
        lowest = row.topk(k).values[-1]
        # Not `row >= lowest`: a NaN counts as the largest, here as in a sort.
        candidates = (~(row < lowest)).nonzero()[:, 0]
        ordered, order = row[candidates].sort(descending=True, stable=True)
        values.append(ordered[:k])
        indices.append(candidates[order[:k]])
    return torch.stack(values), torch.stack(indices)
