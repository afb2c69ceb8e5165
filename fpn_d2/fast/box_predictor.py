"""Detectron2's box predictor with fewer waits for a GPU: same layers, same losses, same detections."""

import torch
from detectron2.layers import cat, cross_entropy
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .selection import FiniteBoxes, clip_boxes, find, nms_by_class


class FPNBoxPredictor(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` for which the host seldom waits for a GPU.

    At inference once a batch and once an image, and not six times an image; in training twice, and not eight times.
    """

    @classmethod
    def taking_over(cls, predictor: FastRCNNOutputLayers) -> FastRCNNOutputLayers:
        """Return one with the layers of ``predictor``; ``predictor`` itself if it computes something else."""
        if type(predictor) is not FastRCNNOutputLayers or len(predictor.box2box_transform.weights) != 4:
            return predictor
        new = cls.__new__(cls)
        new.__dict__ = predictor.__dict__
        return new

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_box_reg``, and log the accuracies that Detectron2 logs.

        Args:
            predictions: (R, K + 1) scores and (R, 4 K) or (R, 4) deltas, of the proposals of all images.
            proposals: of each image, with ``proposal_boxes``, ``gt_classes`` and, if it has objects, ``gt_boxes``.
        """
        if not sum(len(image) for image in proposals):
            return super().losses(predictions, proposals)
        scores, deltas = predictions
        classes = cat([image.gt_classes for image in proposals])
        boxes = cat([image.proposal_boxes.tensor for image in proposals])
        # Without objects all are background, whose boxes are not read.
        targets = [image.gt_boxes if image.has("gt_boxes") else image.proposal_boxes for image in proposals]
        foreground = self._log_accuracies(scores, classes)
        if getattr(self, "use_sigmoid_ce", False):  # Detectron2's main branch
            loss_cls = self.sigmoid_cross_entropy_loss(scores, classes)
        else:
            loss_cls = cross_entropy(scores, classes, reduction="mean")
        losses = {
            "loss_cls": loss_cls,
            "loss_box_reg": self.box_reg_loss(boxes, cat([t.tensor for t in targets]), deltas, classes, foreground),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _log_accuracies(self, scores: Tensor, classes: Tensor) -> Tensor:
        """Return the rows with an object."""
        background = scores.shape[1] - 1
        predicted = scores.argmax(dim=1)
        right, mask = predicted == classes, self._is_object(classes)
        (foreground,), (num_right, num_right_objects, num_missed) = find(
            [mask], [right.sum(), (right & mask).sum(), ((predicted == background) & mask).sum()]
        )
        storage = get_event_storage()
        storage.put_scalar("fast_rcnn/cls_accuracy", num_right / len(classes))
        if len(foreground):
            storage.put_scalar("fast_rcnn/fg_cls_accuracy", num_right_objects / len(foreground))
            storage.put_scalar("fast_rcnn/false_negative", num_missed / len(foreground))
        return foreground

    def _is_object(self, classes: Tensor) -> Tensor:
        return (classes >= 0) & (classes < self.num_classes)

    def box_reg_loss(
        self,
        proposal_boxes: Tensor,
        gt_boxes: Tensor,
        pred_deltas: Tensor,
        gt_classes: Tensor,
        foreground: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the boxes of objects, divided by the number of all proposals.

        Args:
            proposal_boxes: (R, 4).
            gt_boxes: (R, 4); those of background are not read.
            pred_deltas: (R, 4 K) or (R, 4).
            gt_classes: (R,).
            foreground: the rows with an object; None: found here.
        """
        if foreground is None:
            (foreground,), _ = find([self._is_object(gt_classes)])
        if pred_deltas.shape[1] == 4:
            deltas = pred_deltas[foreground]
        else:
            deltas = pred_deltas.view(-1, self.num_classes, 4)[foreground, gt_classes[foreground]]
        loss = _dense_box_regression_loss(
            [Boxes(proposal_boxes[foreground])],
            self.box2box_transform,
            [deltas[None]],
            [gt_boxes[foreground]],
            ...,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return loss / max(gt_classes.numel(), 1.0)

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return the detections of each image, best first, and the rows of the proposals that they come from."""
        if torch.jit.is_tracing():
            return super().inference(predictions, proposals)
        return select_detections(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [image.image_size for image in proposals],
            score_thresh=self.test_score_thresh,
            nms_thresh=self.test_nms_thresh,
            topk_per_image=self.test_topk_per_image,
        )


def select_detections(
    boxes: list[Tensor],
    scores: list[Tensor],
    image_sizes: list[tuple[int, int]],
    *,
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Do what Detectron2's ``fast_rcnn_inference`` does: the same bits, clipping only what is picked.

    Args:
        boxes: of each image (R_i, 4 K) or (R_i, 4), in pixels of the network's input.
        scores: of each image (R_i, K + 1), the background last.
        image_sizes: (height, width) of each image.
        score_thresh: detections score more than this.
        nms_thresh: overlap above which the detection of the same class with the lower score is dropped.
        topk_per_image: the best so many are kept; negative: all.

    Returns:
        Of each image the detections, best first, with ``pred_boxes``, ``scores`` and ``pred_classes``; and the rows
        that they come from, (D_i,) int64. A row with a number that is not finite gives none. (Detectron2 leaves such
        rows out when it counts the others.)
    """
    masks = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        finite = torch.isfinite(image_boxes).all(dim=1) & torch.isfinite(image_scores).all(dim=1)
        masks.append((image_scores[:, :-1] > score_thresh) & finite[:, None])
    found, _ = find(masks)
    results, rows_kept = [], []
    for image_boxes, image_scores, image_size, picked in zip(boxes, scores, image_sizes, found, strict=True):
        num_classes = image_scores.shape[1] - 1
        rows, classes = picked // num_classes, picked % num_classes
        per_class = image_boxes.view(len(image_boxes), image_boxes.shape[1] // 4, 4)
        candidates = per_class[rows, classes if per_class.shape[1] > 1 else 0].float()
        candidates = clip_boxes(candidates, image_size)
        best = image_scores[rows, classes]
        most = topk_per_image if topk_per_image >= 0 else None
        keep = nms_by_class(candidates, best, classes, nms_thresh, most)
        result = Instances(image_size)
        result.pred_boxes = FiniteBoxes(candidates[keep])
        result.scores = best[keep]
        result.pred_classes = classes[keep]
        results.append(result)
        rows_kept.append(rows[keep])
    return results, rows_kept
