"""Selection of detections that suppresses in compiled code, and clips only the boxes that it picks, on a CPU."""

import torch
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .guard import Fast, are_plain, is_itself
from .nms import batched_nms

# Functions of Detectron2's that are done here: where one is another by now, it runs.
_DONE_HERE = ("fast_rcnn_inference", "fast_rcnn_inference_single_image", "batched_nms")
_ORIGINALS = [getattr(fast_rcnn, name) for name in _DONE_HERE]


class FastBoxPredictor(Fast):
    """Detectron2's ``FastRCNNOutputLayers``."""

    REPLACES = ("inference",)

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return the detections of each image, best first, and the rows of the proposals that they come from.

        Args:
            predictions: (R, K + 1) scores and (R, 4 K) or (R, 4) deltas, of the proposals of all images.
            proposals: of each image, R_i of them.
        """
        originals = [getattr(fast_rcnn, name) for name in _DONE_HERE]
        if not (is_itself(self) and are_plain(*predictions) and originals == _ORIGINALS):
            return super().inference(predictions, proposals)
        boxes, scores = self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals)
        sizes = [image.image_size for image in proposals]
        thresholds = (self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image)
        found = [select_detections(*image, *thresholds) for image in zip(boxes, scores, sizes, strict=True)]
        return [detections for detections, _ in found], [rows for _, rows in found]


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, Tensor]:
    """Do what Detectron2's ``fast_rcnn_inference_single_image`` does, to the bit.

    Args:
        boxes: (R, 4 K) or (R, 4), in pixels of the network's input.
        scores: (R, K + 1), the background last.
        image_size: (height, width) in pixels.
        score_thresh: detections score more than this.
        nms_thresh: overlap above which the detection of the same class with the lower score is dropped.
        topk_per_image: the best so many are kept; negative: all.

    Returns:
        The detections, best first, with ``pred_boxes``, ``scores`` and ``pred_classes``; and the rows that they come
        from, (D,) int64, counted without those that hold a number that is not finite.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    if not finite.all():
        boxes, scores = boxes[finite], scores[finite]
    scores = scores[:, :-1]
    rows, classes = (scores > score_thresh).nonzero().unbind(dim=1)
    per_class = boxes.view(len(boxes), boxes.shape[1] // 4, 4)
    picked = Boxes(per_class[rows, classes if per_class.shape[1] > 1 else 0])
    picked.clip(image_size)
    best = scores[rows, classes]
    most = topk_per_image if topk_per_image >= 0 else None
    keep = batched_nms(picked.tensor.float(), best, classes, nms_thresh, most)
    result = Instances(image_size)
    result.pred_boxes = picked[keep]
    result.scores = best[keep]
    result.pred_classes = classes[keep]
    return result, rows[keep]
