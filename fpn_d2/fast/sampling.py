"""Matching of anchors and proposals with ground truth, and their sampling, for all images of a batch together.

Detectron2 does it image by image and waits for a GPU several times in each. Here the host waits once for the batch. The
rules are the same, and so are the random numbers: they are drawn in Detectron2's order, from as many candidates.
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .selection import find


def match(overlaps: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """Match as ``matcher`` does, without a look at the values from the host.

    That no overlap is negative or NaN, which ``matcher`` asserts, is so by the way in which ``pairwise_iou`` divides.

    Args:
        overlaps: (M, R) of M ground-truth boxes with R candidates, not negative.
        matcher: whose thresholds, labels and rule for low overlaps are used.

    Returns:
        (R,) int64: the ground-truth box that overlaps most, 0 where there is none.
        (R,) int8: the label, one of -1, 0, 1.
    """
    labels = torch.full(overlaps.shape[1:], matcher.labels[0], dtype=torch.int8, device=overlaps.device)
    if overlaps.numel() == 0:
        return torch.zeros_like(labels, dtype=torch.int64), labels
    most, matches = overlaps.max(dim=0)
    # The first and the last threshold are infinite.
    for lowest, label in zip(matcher.thresholds[1:-1], matcher.labels[1:], strict=True):
        labels.masked_fill_(most >= lowest, label)
    if matcher.allow_low_quality_matches:
        best = overlaps.amax(dim=1, keepdim=True)
        labels.masked_fill_((overlaps == best).any(dim=0), 1)
    return matches, labels


def sample(
    labels: Sequence[Tensor], *, background: int, size: int, positive_fraction: float
) -> list[tuple[Tensor, Tensor]]:
    """Draw what Detectron2's ``subsample_labels`` draws in one image after the other.

    Args:
        labels: of each image (R_i,): ``background``, -1 for what is ignored, else positive.
        background: the label of negatives.
        size: how many to draw in an image, at most.
        positive_fraction: the part of ``size`` that may be positive.

    Returns:
        Of each image the positions of the positives and of the negatives, int64, in the order in which they are drawn.
    """
    masks = [mask for image in labels for mask in ((image != -1) & (image != background), image == background)]
    found, _ = find(masks)
    drawn = []
    for positive, negative in zip(found[::2], found[1::2], strict=True):
        num_positive = min(len(positive), int(size * positive_fraction))
        num_negative = min(len(negative), size - num_positive)
        first = torch.randperm(len(positive), device=positive.device)[:num_positive]
        second = torch.randperm(len(negative), device=negative.device)[:num_negative]
        drawn.append((positive[first], negative[second]))
    return drawn


@torch.no_grad()
def sample_proposals(heads, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
    """Do what Detectron2's ``ROIHeads.label_and_sample_proposals`` does, the images of the batch together.

    Args:
        heads: a ``ROIHeads``, whose matcher, numbers and classes are used.
        proposals: of each image, with ``proposal_boxes`` and ``objectness_logits``.
        targets: of each image, with ``gt_boxes``, ``gt_classes`` and what else begins with ``gt_``.

    Returns:
        Of each image the sampled proposals, with ``gt_classes`` and, if it has objects, the other fields of the object
        that each is matched with.
    """
    if heads.proposal_append_gt:
        proposals = add_ground_truth_to_proposals(targets, proposals)
    matches, classes = [], []
    for image, target in zip(proposals, targets, strict=True):
        matched, labels = match(pairwise_iou(target.gt_boxes, image.proposal_boxes), heads.proposal_matcher)
        if len(target):
            wanted = target.gt_classes[matched]
            wanted = wanted.masked_fill(labels == 0, heads.num_classes).masked_fill(labels == -1, -1)
        else:
            wanted = torch.full_like(matched, heads.num_classes)
        matches.append(matched)
        classes.append(wanted)
    drawn = sample(
        classes,
        background=heads.num_classes,
        size=heads.batch_size_per_image,
        positive_fraction=heads.positive_fraction,
    )
    sampled = []
    for image, target, matched, wanted, rows in zip(proposals, targets, matches, classes, drawn, strict=True):
        picked = torch.cat(rows)
        image = image[picked]
        image.gt_classes = wanted[picked]
        if len(target):
            objects = matched[picked]
            for name, value in target.get_fields().items():
                if name.startswith("gt_") and not image.has(name):
                    image.set(name, value[objects])
        sampled.append(image)
    storage = get_event_storage()
    for name, column in (("fg", 0), ("bg", 1)):
        storage.put_scalar(f"roi_head/num_{name}_samples", sum(len(rows[column]) for rows in drawn) / len(drawn))
    return sampled


def boxes_of(objects: Boxes, matched: Tensor, candidates: Tensor) -> Tensor:
    """(R, 4): of each candidate the box of the object that it is matched with; zeros where there are no objects."""
    return objects.tensor[matched] if len(objects) else torch.zeros_like(candidates)
