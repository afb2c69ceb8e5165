"""A detector as one graph of plain tensors, from pixels to detections: what is exported.

Shape legend: N images of one batch, padded to one size; D detections at most of an image.
    images       (N, 3, H, W) uint8, in the channel order of INPUT.FORMAT, padded at the bottom and the right
    image_sizes  (N, 2) int64: height and width of each image within
    boxes        (N, D, 4) float32, (x0, y0, x1, y1) in pixels of the input, best first; behind ``counts`` zeros
    scores       (N, D) float32
    classes      (N, D) int64
    counts       (N,) int64: how many of the D there are
    masks        (N, D, 28, 28) float32: probability of each cell of the box; only if the detector has masks
    keypoint_maps  (N, D, K, 56, 56) float32: logits of its K keypoints in the cells of the box; only if it has them
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads
from torch import Tensor, nn

from fpn_d2.modeling.retinanet import TorchvisionRetinaNet

from .boxes import NOTHING, Anchors, by_anchor, clip, decode, highest, larger_than, rows_of
from .kinds import expect
from .nms import Nms, nms_mask
from .pooling import LevelPooling

Stages = dict[str, Tensor]
DETECTIONS = ("boxes", "scores", "classes", "counts")


class DetectorGraph(nn.Module):
    """What all detectors share: normalisation, padding and the last steps. Its parameters are the model's own.

    Attributes:
        with_stages: whether ``forward`` returns what led to the detections too, to be compared.
    """

    with_stages = False

    def __init__(self, model: nn.Module, nms: Nms = nms_mask):
        """Take over the parts of ``model``.

        Args:
            model: in evaluation mode.
            nms: see :mod:`.nms`.
        """
        super().__init__()
        self.backbone = model.backbone
        self.nms = nms
        self.divisor = model.backbone.size_divisibility
        self.square = getattr(model.backbone, "padding_constraints", {}).get("square_size", 0)
        self.register_buffer("pixel_mean", model.pixel_mean.detach().clone())
        self.register_buffer("pixel_std", model.pixel_std.detach().clone())

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Return what :attr:`output_names` names; see the head of this file."""
        found = self.stages(images, image_sizes)
        return tuple(found[name] for name in self.output_names)

    def stages(self, images: Tensor, image_sizes: Tensor) -> Stages:
        """Return the detections and what led to them.

        Beside the names at the head of this file: "input", the padded images; "pyramid.p2" and so on, the maps; and
        for an R-CNN "proposals.boxes" (N, P, 4) and "proposals.logits" (N, P), minus infinity for padding.
        """
        raise NotImplementedError

    @property
    def detections(self) -> tuple[str, ...]:
        """Names of the outputs that a user wants."""
        heads = {"mask_head": "masks", "keypoint_head": "keypoint_maps"}
        return (*DETECTIONS, *(name for head, name in heads.items() if getattr(self, head, None) is not None))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what :meth:`forward` returns: the detections and, ``with_stages``, what led to them."""
        if not self.with_stages:
            return self.detections
        proposals = ("proposals.boxes", "proposals.logits") if isinstance(self, RCNNGraph) else ()
        return (*self.detections, "input", *(f"pyramid.{name}" for name in self.backbone.output_shape()), *proposals)

    def normalised(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Normalise, and pad with zeros as the backbone asks for."""
        height, width = images.shape[-2:]
        x = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        inside = (row[:, None] < image_sizes[:, 0, None, None]) & (column < image_sizes[:, 1, None, None])
        x = torch.where(inside[:, None], x, torch.zeros_like(x))
        if self.square:
            x = F.pad(x, (0, self.square - width, 0, self.square - height))
        elif self.divisor > 1:
            # So written, the sizes of all maps come out as multiples of one number, which an exporter can compare.
            padded = [(side + self.divisor - 1) // self.divisor * self.divisor for side in (height, width)]
            x = F.pad(x, (0, padded[1] - width, 0, padded[0] - height))
        return x

    def best(self, scores: Tensor, boxes: Tensor, classes: Tensor, image_sizes: Tensor, most: int) -> dict[str, Tensor]:
        """Sort (N, k) detections, clip their boxes, leave out those without area, fill up with zeros."""
        scores, numbers = highest(scores, most)
        boxes, classes = clip(rows_of(boxes, numbers), image_sizes), classes.gather(1, numbers)
        scores = torch.where(larger_than(boxes, 0), scores, NOTHING)
        scores, numbers = scores.topk(most, dim=1)
        there = scores > NOTHING
        return {
            "boxes": torch.where(there[..., None], rows_of(boxes, numbers), 0.0),
            "scores": torch.where(there, scores, 0.0),
            "classes": torch.where(there, classes.gather(1, numbers), 0),
            "counts": there.sum(dim=1),
        }


class RCNNGraph(DetectorGraph):
    """Faster, Cascade, Mask and Keypoint R-CNN."""

    def __init__(self, model: GeneralizedRCNN, nms: Nms = nms_mask):
        """See :class:`DetectorGraph`."""
        super().__init__(model, nms)
        self.rpn = RPNGraph(model.proposal_generator, nms)
        heads = model.roi_heads
        cascade = isinstance(heads, CascadeROIHeads)
        self.box_in_features = list(heads.box_in_features)
        self.box_pooler = LevelPooling(heads.box_pooler)
        self.box_heads = nn.ModuleList(heads.box_head if cascade else [heads.box_head])
        self.box_predictors = nn.ModuleList(heads.box_predictor if cascade else [heads.box_predictor])
        for predictor in self.box_predictors:
            expect("the box predictor", predictor, "FastRCNNOutputLayers")
        last = self.box_predictors[-1]
        self.score_thresh, self.nms_thresh = last.test_score_thresh, last.test_nms_thresh
        self.most = last.test_topk_per_image
        self.mask_head = self.keypoint_head = None
        if heads.mask_on:
            expect("the mask head", heads.mask_head, "MaskRCNNConvUpsampleHead")
            self.mask_in_features = list(heads.mask_in_features)
            self.mask_pooler = LevelPooling(heads.mask_pooler)
            self.mask_head = heads.mask_head
        if heads.keypoint_on:
            expect("the keypoint head", heads.keypoint_head, "KRCNNConvDeconvUpsampleHead")
            self.keypoint_in_features = list(heads.keypoint_in_features)
            self.keypoint_pooler = LevelPooling(heads.keypoint_pooler)
            self.keypoint_head = heads.keypoint_head

    def stages(self, images: Tensor, image_sizes: Tensor) -> Stages:
        """See :class:`DetectorGraph`."""
        x = self.normalised(images, image_sizes)
        maps = self.backbone(x)
        proposals, logits = self.rpn(maps, image_sizes)
        boxes, scores = self._boxes_and_scores([maps[name] for name in self.box_in_features], proposals, image_sizes)
        scores = torch.where((logits > NOTHING)[..., None], scores, NOTHING)
        found = self._detections(boxes, scores, image_sizes)
        if self.mask_head is not None:
            own = [maps[name] for name in self.mask_in_features]
            found["masks"] = self._of_detections(own, found, self.mask_pooler, self._masks)
        if self.keypoint_head is not None:
            own = [maps[name] for name in self.keypoint_in_features]
            layers = self.keypoint_head.layers
            found["keypoint_maps"] = self._of_detections(own, found, self.keypoint_pooler, lambda x, _: layers(x))
        found |= {"input": x, "proposals.boxes": proposals, "proposals.logits": logits}
        return found | {f"pyramid.{name}": level_map for name, level_map in maps.items()}

    def _boxes_and_scores(self, maps: list[Tensor], proposals: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(N, P, 4) proposals -> (N, P, K * 4 or 4) boxes and (N, P, K) probabilities, the means of the stages."""
        n, p = proposals.shape[:2]
        images = torch.arange(n, device=proposals.device)[:, None].expand(n, p).flatten()
        total = None
        for stage, (head, predictor) in enumerate(zip(self.box_heads, self.box_predictors, strict=True)):
            if stage:
                proposals = clip(boxes, image_sizes)  # noqa: F821 (of the stage before)
            logits, deltas = predictor(head(self.box_pooler(maps, proposals.flatten(0, 1), images)))
            sigmoid = getattr(predictor, "use_sigmoid_ce", False)  # Detectron2's main branch
            probabilities = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
            total = probabilities if total is None else total + probabilities
            boxes = decode(predictor.box2box_transform, deltas.view(n, p, deltas.shape[1]), proposals)
        scores = total if len(self.box_heads) == 1 else total * (1.0 / len(self.box_heads))
        finite = torch.isfinite(scores).all(dim=1, keepdim=True)
        scores = torch.where(finite, scores, NOTHING)[:, :-1]
        return boxes, scores.view(n, p, scores.shape[1])

    def _detections(self, boxes: Tensor, scores: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Drop low scores, suppress each class by itself, keep the best."""
        n, p, num_classes = scores.shape
        per_box = boxes.shape[2] // 4
        finite = torch.isfinite(boxes).all(dim=2, keepdim=True)  # a box that is not loses its proposal, as there
        scores = torch.where(finite, scores, NOTHING)
        boxes = torch.where(finite, boxes, 0.0).view(n, p * per_box, 4)
        scores = torch.where(scores > self.score_thresh, scores, NOTHING)
        boxes = clip(boxes, image_sizes)
        by_class = scores.transpose(1, 2)  # (N, K, P)
        if per_box == 1:
            kept = self.nms(boxes, by_class, self.nms_thresh)
        else:
            own = boxes.view(n, p, per_box, 4).transpose(1, 2).flatten(0, 1)  # (N * K, P, 4)
            kept = self.nms(own, by_class.flatten(0, 1)[:, None], self.nms_thresh).view_as(by_class)
        scores = torch.where(kept.transpose(1, 2), scores, NOTHING).flatten(1)
        most = self.most if self.most >= 0 else p * num_classes
        best, numbers = highest(scores, most)
        classes = numbers % num_classes
        rows = torch.div(numbers, num_classes, rounding_mode="floor")
        found = rows_of(boxes, rows if per_box == 1 else rows * per_box + classes)
        return self.best(best, found, classes, image_sizes, most)

    def _of_detections(
        self,
        maps: list[Tensor],
        found: dict[str, Tensor],
        pooler: LevelPooling,
        head: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """What ``head`` makes of the pooled maps and the classes of the detections that are there; zeros of padding."""
        n, most = found["scores"].shape
        numbers = torch.arange(n * most, device=found["counts"].device)
        rows = numbers[numbers % most < found["counts"].repeat_interleave(most)]
        # One more than there are: no engine has to run the head on nothing.
        rows = torch.cat([rows, numbers[-1:] + 1])
        boxes = F.pad(found["boxes"].flatten(0, 1), (0, 0, 0, 1))[rows]
        images = torch.div(rows, most, rounding_mode="floor").clamp(max=n - 1)
        own = head(pooler(maps, boxes, images), F.pad(found["classes"].flatten(), (0, 1))[rows])
        places = own.new_zeros((n * most + 1, *own.shape[1:])).index_copy(0, rows, own)
        return places[:-1].view(n, most, *own.shape[1:])

    def _masks(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """Of each detection the mask of its class."""
        logits = self.mask_head.layers(pooled)
        height, width = logits.shape[-2:]
        classes = classes if logits.shape[1] > 1 else torch.zeros_like(classes)
        return logits.gather(1, classes[:, None, None, None].expand(-1, 1, height, width))[:, 0].sigmoid()


class RPNGraph(nn.Module):
    """Proposals of a fixed number: (N, P, 4) and (N, P) logits, which are minus infinity for padding."""

    def __init__(self, rpn: RPN, nms: Nms):
        """Take over the head and the numbers of ``rpn``."""
        super().__init__()
        self.in_features = list(rpn.in_features)
        self.head = rpn.rpn_head
        self.anchors = Anchors(rpn.anchor_generator)
        self.transform = rpn.box2box_transform
        self.nms, self.nms_thresh = nms, rpn.nms_thresh
        self.pre_nms_topk, self.post_nms_topk = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
        self.min_box_size = rpn.min_box_size

    def forward(self, features: dict[str, Tensor], image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the proposals, best first, of the pyramid's maps."""
        maps = [features[name] for name in self.in_features]
        k = self.pre_nms_topk
        boxes, scores = [], []
        for level, (logits, deltas) in enumerate(zip(*self.head(maps), strict=True)):
            top, numbers = highest(by_anchor(logits, 1)[..., 0], k)
            anchors = self.anchors(level, numbers, maps)
            boxes.append(decode(self.transform, rows_of(by_anchor(deltas, 4), numbers), anchors))
            scores.append(top)
        all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
        usable = torch.isfinite(all_boxes).all(dim=2) & torch.isfinite(all_scores)
        all_boxes = clip(torch.where(usable[..., None], all_boxes, 0.0), image_sizes)
        usable = usable & larger_than(all_boxes, self.min_box_size)
        # The boxes of a level are sorted: their rank is a score that is positive and the same in every engine.
        rank = torch.arange(k, 0, -1, device=all_boxes.device, dtype=all_boxes.dtype).repeat(len(maps))
        ranks = torch.where(usable, rank, 0.0).view(-1, 1, k)
        kept = self.nms(all_boxes.view(-1, k, 4), ranks, self.nms_thresh).view_as(usable)
        logits, numbers = torch.where(kept & usable, all_scores, NOTHING).topk(
            min(self.post_nms_topk, k * len(maps)), dim=1
        )
        proposals = torch.where((logits > NOTHING)[..., None], rows_of(all_boxes, numbers), 0.0)
        return proposals, logits


class RetinaNetGraph(DetectorGraph):
    """RetinaNet."""

    def __init__(self, model: RetinaNet, nms: Nms = nms_mask):
        """See :class:`DetectorGraph`."""
        super().__init__(model, nms)
        self.in_features = list(model.head_in_features)
        self.head = model.head
        self.num_classes = model.num_classes
        self.anchors = Anchors(model.anchor_generator)
        self.transform = model.box2box_transform
        self.score_thresh, self.nms_thresh = model.test_score_thresh, model.test_nms_thresh
        self.candidates, self.most = model.test_topk_candidates, model.max_detections_per_image
        self.clip_first = isinstance(model, TorchvisionRetinaNet)

    def stages(self, images: Tensor, image_sizes: Tensor) -> Stages:
        """See :class:`DetectorGraph`."""
        x = self.normalised(images, image_sizes)
        features = self.backbone(x)
        maps = [features[name] for name in self.in_features]
        boxes, scores, classes = [], [], []
        for level, (logits, deltas) in enumerate(zip(*self.head(maps), strict=True)):
            # The best of all anchors and classes; a sigmoid keeps the order.
            top, numbers = highest(by_anchor(logits, self.num_classes).flatten(1), self.candidates)
            anchor_numbers = torch.div(numbers, self.num_classes, rounding_mode="floor")
            anchors = self.anchors(level, anchor_numbers, maps)
            boxes.append(decode(self.transform, rows_of(by_anchor(deltas, 4), anchor_numbers), anchors))
            scores.append(top.sigmoid())
            classes.append(numbers % self.num_classes)
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in (boxes, scores, classes))
        usable = (scores > self.score_thresh) & torch.isfinite(boxes).all(dim=2)
        boxes = torch.where(usable[..., None], boxes, 0.0)
        if self.clip_first:
            boxes = clip(boxes, image_sizes)
        own = torch.arange(self.num_classes, device=classes.device)[:, None] == classes[:, None]  # (N, K, k)
        kept = self.nms(boxes, torch.where(own & usable[:, None], scores[:, None], NOTHING), self.nms_thresh)
        scores = torch.where(kept.any(dim=1), scores, NOTHING)
        found = self.best(scores, boxes, classes, image_sizes, self.most) | {"input": x}
        return found | {f"pyramid.{name}": level_map for name, level_map in features.items()}


def graph_of(model: nn.Module, nms: Nms = nms_mask) -> DetectorGraph:
    """Make the graph of a detector, with its parameters.

    Args:
        model: a ``GeneralizedRCNN`` or ``RetinaNet`` with a pyramid, Detectron2's own or ours, in evaluation mode.
        nms: see :mod:`.nms`.

    Raises:
        UserError: a part of it cannot be exported; says which and why.
    """
    expect("the meta-architecture", model, "GeneralizedRCNN", "RetinaNet", "FPNRetinaNet", "TorchvisionRetinaNet")
    if isinstance(model, RetinaNet):
        expect("the head", model.head, "RetinaNetHead")
        return RetinaNetGraph(model, nms).eval()
    expect("the proposal generator", model.proposal_generator, "RPN", "FPNRPN")
    heads = ("StandardROIHeads", "CascadeROIHeads", "FPNROIHeads", "FPNCascadeROIHeads")
    expect("the RoI heads", model.roi_heads, *heads)
    return RCNNGraph(model, nms).eval()
