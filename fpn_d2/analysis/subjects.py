"""Two models to compare: their configurations, the same weights in both, and batches of random images."""

import logging
import os
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import nn

from fpn_d2.checkpoint.contents import classes_in
from fpn_d2.checkpoint.reading import read_checkpoint
from fpn_d2.config_names import find_config
from fpn_d2.engine import ReportingCheckpointer, UserError, load_config, prepare_data
from fpn_d2.engine.device import on_this_machine
from fpn_d2.engine.numbers import missing_maps_are_told
from fpn_d2.engine.prepare import WITH_CLASSES, num_classes_left_open
from fpn_d2.modeling import without_timm_weights

_SEED = 0
_BOXES = 8  # objects of a random image
_PROPOSALS = 1000  # of a model that is given its proposals
# What the last norm of a residual block is multiplied by, see _calm.
_RESIDUAL = 0.1


@dataclass
class Model:
    """One column of the comparison.

    Attributes:
        label: "A" or "B".
        config: as it was asked for.
        path: of the YAML file.
        cfg: what it says.
        network: in evaluation mode.
        runner: what infers: ``network``, or its copy out of `optimize_for_inference`.
        not_loaded: names in the model that got no weights, or others, from where they should have come from.
        not_used: names that were there and that the model has no place for.
    """

    label: str
    config: str
    path: str
    cfg: CfgNode
    network: nn.Module
    runner: nn.Module | None = None
    not_loaded: list[str] = field(default_factory=list)
    not_used: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.runner = self.runner or self.network


def read_config(
    config: str, opts: list[str], device: str, *, data: bool = False, weights: str = ""
) -> tuple[str, CfgNode]:
    """Find and read a configuration.

    Args:
        config: a path, or a name in Detectron2's model zoo or, with "configs/" before it, of ours.
        opts: KEY value pairs on top.
        device: "cpu", "cuda" or "" for MODEL.DEVICE, which becomes the CPU where there is no GPU.
        data: register the data sets of DATASETS.TEST, of which the number of classes is taken where it is left open.
        weights: a checkpoint of ours, of which it is taken without ``data``.

    Returns:
        The path of the file, and the configuration.

    Raises:
        UserError: there is no such file, something in it is wrong, or a GPU was asked for and there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"the device {device} was asked for, but there is no GPU that PyTorch can use: take cpu")
    path = str(find_config(config, zoo_first=True))
    opts = [*opts, *(["MODEL.DEVICE", device] if device else [])]
    cfg = load_config(path, opts)
    if data:
        prepare_data(cfg, path, opts, train=False)
    elif os.path.isfile(weights) and (classes := classes_in(read_checkpoint(weights)).get("thing_classes")):
        for section in num_classes_left_open(path, opts):
            cfg.MODEL[section].NUM_CLASSES = len(classes)
    return path, on_this_machine(cfg)


def number_of_classes(cfg: CfgNode) -> list[str]:
    """KEY value pairs with which another process reads the same number of classes, which data may have given."""
    return [part for key in WITH_CLASSES for part in (f"MODEL.{key}.NUM_CLASSES", str(cfg.MODEL[key].NUM_CLASSES))]


def build_pair(configs: tuple[tuple[str, str, CfgNode], tuple[str, str, CfgNode]], weights: str) -> tuple[Model, Model]:
    """Build both models with the same weights.

    Args:
        configs: for each what was asked for, its path, its configuration.
        weights: a checkpoint for both, in any format that Detectron2 reads; empty: random weights, drawn for the first
            and copied to the second.

    Raises:
        UserError: the checkpoint cannot be read, or fills nothing of a model.
    """
    a, b = (build_one(label, *config, weights) for label, config in zip("AB", configs, strict=True))
    if not weights:
        _copy_weights(a.network, b)
    return a, b


def build_one(label: str, config: str, path: str, cfg: CfgNode, weights: str) -> Model:
    """Build a model with the weights of a checkpoint, or with random ones; see :func:`build_pair`."""
    torch.manual_seed(_SEED)
    with missing_maps_are_told(cfg):
        model = Model(label, config, path, cfg, build_model(without_timm_weights(cfg)).eval())
    if weights:
        _load(model, weights)
    else:
        _calm(model.network)
    return model


def optimized(network: nn.Module, dtype: str) -> nn.Module:
    """A copy of ``network`` out of `fpn_d2.inference.optimize_for_inference`, in the data type of that name."""
    from fpn_d2.inference import optimize_for_inference

    return optimize_for_inference(network, getattr(torch, dtype))


class _Recorder(ReportingCheckpointer):
    """Keeps what did not fit rather than refusing it: it is part of what is compared."""

    incompatible = None

    def _log_incompatible_keys(self, incompatible) -> None:
        self.incompatible = incompatible


def _load(model: Model, weights: str) -> None:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # one line per name that does not match: the report has them
    try:
        recorder = _Recorder(model.network)
        recorder.load(weights)
    finally:
        logging.disable(level)
    if recorder.incompatible is not None:
        misshapen = [name for name, *_ in recorder.incompatible.incorrect_shapes]
        model.not_loaded = sorted({*recorder.incompatible.missing_keys, *misshapen})
        model.not_used = sorted(recorder.incompatible.unexpected_keys)
    if len(set(model.not_loaded) & set(dict(model.network.named_parameters()))) == len(
        list(model.network.named_parameters())
    ):
        raise UserError(f"{weights} fills nothing of model {model.label} ({model.config}): not one name matches")


def _copy_weights(source: nn.Module, target: Model) -> None:
    theirs, own = source.state_dict(), target.network.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
    target.network.load_state_dict(fitting, strict=False)
    target.not_loaded = sorted(set(own) - set(fitting))
    target.not_used = sorted(set(theirs) - set(fitting))


@torch.no_grad()
def _calm(network: nn.Module) -> None:
    """Keep random weights within numbers as trained ones make them.

    A residual block with a frozen norm doubles the variance of random maps, and after 16 or 33 of them the boxes of
    the RPN leave the image: hardly a proposal is left for the heads to work on. With what each block adds scaled down,
    there are as many as with trained weights.
    """
    for block in network.modules():
        if isinstance(block, BasicBlock | BottleneckBlock):
            norm = getattr(block, "conv3", block.conv2).norm
            if isinstance(norm, FrozenBatchNorm2d | nn.modules.batchnorm._BatchNorm) and norm.weight is not None:
                norm.weight.mul_(_RESIDUAL)


def random_batch(cfg: CfgNode, number: int, size: tuple[int, int], seed: int = _SEED) -> list[dict]:
    """Images of noise with everything that the model of ``cfg`` may ask for: objects, masks, keypoints, proposals.

    Args:
        cfg: the model's configuration.
        number: of images.
        size: (height, width) in pixels.
        seed: same seed and number, same images.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    batch = []
    for _ in range(number):
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        item = {"image": image, "height": height, "width": width}
        item["instances"] = _random_objects(cfg, size, generator)
        item["sem_seg"] = torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, size, generator=generator)
        add_proposals(item, generator)
        batch.append(item)
    return batch


def add_proposals(item: dict, generator: torch.Generator) -> None:
    """Give an image random proposals, for models that have no RPN."""
    size = tuple(item["image"].shape[1:])
    boxes, logits = Boxes(_random_boxes(_PROPOSALS, size, generator)), torch.linspace(5, -5, _PROPOSALS)
    item["proposals"] = Instances(size, proposal_boxes=boxes, objectness_logits=logits)


def _random_objects(cfg: CfgNode, size: tuple[int, int], generator: torch.Generator) -> Instances:
    key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
    boxes = _random_boxes(_BOXES, size, generator)
    classes = torch.randint(cfg.MODEL[key].NUM_CLASSES, (_BOXES,), generator=generator)
    objects = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        objects.gt_masks = PolygonMasks([[corners] for corners in boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()])
    elif cfg.MODEL.MASK_ON:
        masks = torch.zeros(_BOXES, *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        objects.gt_masks = BitMasks(masks)
    if cfg.MODEL.KEYPOINT_ON:
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        where = torch.rand(_BOXES, number, 2, generator=generator)
        points = torch.full((_BOXES, number, 3), 2.0)  # 2: visible
        points[..., :2] = boxes[:, None, :2] + where * (boxes[:, None, 2:] - boxes[:, None, :2])
        objects.gt_keypoints = Keypoints(points)
    return objects


def _random_boxes(number: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """(number, 4) boxes in the image, their sides an eighth of its to all of it, in equal steps of the logarithm."""
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    sides = extent * 8 ** -torch.rand(number, 1, generator=generator)
    start = torch.rand(number, 2, generator=generator) * (extent - sides)
    return torch.cat([start, start + sides], dim=1)
