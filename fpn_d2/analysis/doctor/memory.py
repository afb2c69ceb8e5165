"""What memory a training step takes, from the shapes of its tensors alone: nothing is computed."""

import math
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from fpn_d2.analysis.errors.detections import Scored
from fpn_d2.modeling import without_timm_weights

from .config_advice import Advice

_STATES = {"SGD": 1, "Adam": 2, "AdamW": 2}  # of an optimizer, each as large as the weights that are trained
# Of activations in lower precision: norms and losses stay in float32.
_LOWER_PRECISION = 0.6
_FLOAT = 4  # bytes
_PADDED = 32  # pixels that sides are rounded up to
# Of the memory that the estimate may be. On CPUs, five steps that were measured took 1.2 to 1.7 times their estimate.
_SHARE_OF_GPU, _SHARE_OF_CPU = 0.9, 0.5
_MATCHING = 4  # matrices of objects times anchors that matching holds at a time
_FOCAL = 6  # matrices of anchors times classes that the focal loss keeps


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step.

    Attributes:
        fixed: weights, gradients and the optimizer's state.
        per_image: what is kept of an image from the forward pass for the backward pass.
        passing: what is needed for a moment beyond.
        size: height and width of the images, in pixels.
    """

    fixed: float
    per_image: float
    passing: float
    size: tuple[int, int]

    def total(self, images: int) -> float:
        """Bytes for so many images in one process."""
        return self.fixed + images * self.per_image + self.passing

    def images(self, room: float) -> int:
        """How many images fit into so many bytes."""
        return max(0, int((room - self.fixed - self.passing) // max(self.per_image, 1)))


def training_memory(cfg: CfgNode, size: tuple[int, int], objects: int) -> TrainingMemory | None:
    """Estimate the memory of a training step.

    The backbone and the networks of the heads run on tensors without content, and what autograd would keep of them is
    added up; what libraries ask for besides is not known. The zoo's batches are padded to between 800 x 1344 and
    1344 x 1344 pixels; the peaks that it publishes are from 1 times the estimate for two such images of the smaller
    size to 1.25 times that of the larger.

    Args:
        cfg: the configuration.
        size: height and width of the images, padded, in pixels.
        objects: in the fullest image.

    Returns:
        The estimate; None for a model whose parts are not known here.
    """
    if not all(re.fullmatch(r"p\d+", name) for name in _anchor_levels(cfg)):
        return None
    cfg = without_timm_weights(cfg)
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.NUMERICS = "meta", "exact"
    try:
        with torch.device("meta"):
            model = build_model(cfg).train()
        kept, largest = _kept(model, cfg, size)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in model.parameters())
    fixed = _FLOAT * (weights + trained * (1 + _STATES.get(cfg.SOLVER.OPTIMIZER, 2)))
    share = _LOWER_PRECISION if cfg.SOLVER.AMP.ENABLED else 1.0
    anchors = _anchors(cfg, size)
    per_image = share * kept
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        per_image += _FLOAT * _FOCAL * anchors * cfg.MODEL.RETINANET.NUM_CLASSES
    return TrainingMemory(fixed, per_image, max(2 * share * largest, _FLOAT * _MATCHING * objects * anchors), size)


def _kept(model: nn.Module, cfg: CfgNode, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes that autograd keeps of one image, and those of the largest tensor among them."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # held, so that no storage takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = _forward(model, cfg, size)
    del outputs
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    return sum(sizes), max(sizes, default=0)


def _forward(model: nn.Module, cfg: CfgNode, size: tuple[int, int]) -> list:
    """The outputs of all networks for one image."""
    features = model.backbone(torch.empty(1, 3, *size, device="meta"))
    outputs: list = [features]
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        return [*outputs, model.head([features[name] for name in model.head_in_features])]
    if getattr(model, "proposal_generator", None) is not None:
        outputs.append(model.proposal_generator.rpn_head([features[name] for name in cfg.MODEL.RPN.IN_FEATURES]))
    if getattr(model, "sem_seg_head", None) is not None:
        outputs.append(model.sem_seg_head.layers(features))
    heads = getattr(model, "roi_heads", None)
    if heads is None:
        return outputs
    rois = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    some = max(1, int(rois * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION))
    for name, resolution, number in (
        ("box_head", cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, rois),
        ("mask_head", cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION, some),
        ("keypoint_head", cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION, some),
    ):
        head = getattr(heads, name, None)
        for one in head if isinstance(head, nn.ModuleList) else filter(None, [head]):
            channels = next(p for p in one.parameters() if p.dim() == 4 or p.dim() == 2)
            width = channels.shape[1] if channels.dim() == 4 else channels.shape[1] // resolution**2
            pooled = torch.empty(number, width, resolution, resolution, device="meta", requires_grad=True)
            outputs.append(one.layers(pooled) if name != "box_head" and hasattr(one, "layers") else one(pooled))
    return outputs


def _anchor_levels(cfg: CfgNode) -> list[str]:
    retina = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    return list(cfg.MODEL.RETINANET.IN_FEATURES if retina else cfg.MODEL.RPN.IN_FEATURES)


def _anchors(cfg: CfgNode, size: tuple[int, int]) -> int:
    """About how many anchors an image of ``size`` has."""
    sizes, ratios = cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    count = 0.0
    for place, name in enumerate(_anchor_levels(cfg)):
        each = len(sizes[place % len(sizes)]) * len(ratios[place % len(ratios)])
        count += each * size[0] * size[1] / 4.0 ** int(name[1:])
    return int(count)


def memory_advice(cfg: CfgNode, data: Scored) -> list[Advice]:
    """What a step of the configuration takes on this data, and a smaller batch where that is more than there is."""
    if not len(data.files):
        return []
    size = _padded(cfg, data.sizes)
    objects = int(np.bincount(data.truth.image, minlength=1).max())
    memory = training_memory(cfg, size, objects)
    if memory is None:
        return []
    room, processes, where = _room(cfg)
    batch = cfg.SOLVER.IMS_PER_BATCH
    each = max(1, math.ceil(batch / processes))
    reason = (
        f"a step with {each} images of {size[0]} x {size[1]} pixels takes about {_gb(memory.total(each))}: "
        f"{_gb(memory.fixed)} for weights, gradients and optimizer, {_gb(memory.per_image)} for each image"
        + ("" if cfg.MODEL.DEVICE.startswith("cuda") else "; on a CPU it can be two thirds more")
    )
    if memory.total(each) < room:
        return [Advice("SOLVER.IMS_PER_BATCH", batch, None, reason)]
    fits = max(1, memory.images(room)) * processes
    gain = "it fits; SOLVER.BASE_LR in proportion (SGD)" if fits < batch else ""
    return [Advice("SOLVER.IMS_PER_BATCH", batch, fits if fits < batch else None, f"{reason}; {where}", gain)]


def _padded(cfg: CfgNode, sizes: np.ndarray) -> tuple[int, int]:
    """Height and width of the largest images of a batch, padded: the highest and the widest may be in one."""
    shorter = max(cfg.INPUT.MIN_SIZE_TRAIN)
    scales = np.ones(len(sizes))
    if shorter > 0:
        scales = np.minimum(shorter / sizes.min(1), cfg.INPUT.MAX_SIZE_TRAIN / sizes.max(1))
    height, width = (np.ceil((sizes * scales[:, None]).max(0) / _PADDED) * _PADDED).astype(int).tolist()
    return height, width


def _room(cfg: CfgNode) -> tuple[float, int, str]:
    """Bytes that the estimate for a process may be, how many processes train, and what there is in words."""
    if cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
        return _SHARE_OF_GPU * room, torch.cuda.device_count(), f"the GPU has {_gb(room)}"
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    return _SHARE_OF_CPU * room, 1, f"this machine has {_gb(room)}"


def _gb(count: float) -> str:
    value = count / 2**30
    return f"{value:.1f} GB" if value >= 1 else f"{value:.2f} GB"
