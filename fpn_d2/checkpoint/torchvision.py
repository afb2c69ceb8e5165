"""Weights of torchvision's detectors with a ResNet and FPN, brought to Detectron2's names, classes and anchors.

Each kind of model has a configuration in configs/torchvision with which our model computes what torchvision's computes.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from fpn_d2.errors import UserError, not_found

from .reading import check_weight_file_name, read_weights, write_checkpoint

# Detectron2 adds this to the variances of FrozenBN and BN.
_EPS = 1e-5
# torchvision's COCO models have an output for each category id up to 90, of which 80 stand for something, and one for
# the background in front. RetinaNet has that one too, but no target for it: it is left out.
_COCO_OUTPUTS = 91
_COCO_IDS = sorted(category["id"] for category in COCO_CATEGORIES if category["isthing"])
# RetinaNet's anchors of a cell: shapes and sizes.
_SHAPES, _SIZES = 3, 3
# Blocks of the last three stages, and whether they are bottlenecks -> depth of the ResNet.
_DEPTHS = {
    ((2, 2, 2), False): 18,
    ((4, 6, 3), False): 34,
    ((4, 6, 3), True): 50,
    ((4, 23, 3), True): 101,
    ((8, 36, 3), True): 152,
}

# Names of files written before torchvision 0.13 -> names since.
_RENAMED = [
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
    (r"(head\.\w+_head\.conv)\.(\d+)\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
    (r"(roi_heads\.mask_head)\.mask_fcn(\d)\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
]


@dataclass(frozen=True)
class TorchvisionModel:
    """What a weight file of torchvision's belongs to.

    Attributes:
        name: torchvision's function that builds the model.
        config: path of the configuration, from the top of this repository.
        options: pairs KEY VALUE that the file needs beside it.
        classes: number of classes, without the background.
    """

    name: str
    config: str
    options: tuple[str, ...]
    classes: int


_CONFIGS = {
    "fasterrcnn_resnet50_fpn": "faster_rcnn_R_50_FPN.yaml",
    "fasterrcnn_resnet50_fpn_v2": "faster_rcnn_R_50_FPN_v2.yaml",
    "maskrcnn_resnet50_fpn": "mask_rcnn_R_50_FPN.yaml",
    "maskrcnn_resnet50_fpn_v2": "mask_rcnn_R_50_FPN_v2.yaml",
    "retinanet_resnet50_fpn": "retinanet_R_50_FPN.yaml",
    "retinanet_resnet50_fpn_v2": "retinanet_R_50_FPN_v2.yaml",
}


def is_torchvision(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a detector of torchvision's with an FPN."""
    names = [name.removeprefix("module.") for name in names]
    return any(name.startswith("backbone.body.") for name in names) and any(
        name.startswith("backbone.fpn.") for name in names
    )


def convert_torchvision(
    state_dict: Mapping[str, Tensor], *, all_classes: bool = False, batch_norm_eps: float | None = None
) -> tuple[dict[str, Tensor], TorchvisionModel]:
    """Convert the weights of a detector of torchvision's.

    Args:
        state_dict: of one of the models in configs/torchvision, also in the names of torchvision before 0.13.
        all_classes: keep all 90 outputs of a model with 91. Otherwise such a model is taken for COCO's, and the 80
            categories that exist are kept, in Detectron2's order.
        batch_norm_eps: what the ResNet was run with. None: 0 for frozen norms (no num_batches_tracked in the file) of
            the first versions, as torchvision runs its published weights, and 1e-5 for all others.

    Returns:
        The weights by Detectron2's names, and what they belong to.

    Raises:
        UserError: these are not the weights of such a model.
    """
    weights = {name.removeprefix("module."): value for name, value in state_dict.items()}
    name = _recognise(weights)
    for pattern, replacement in _RENAMED:
        weights = {re.sub(f"^{pattern}$", replacement, key): value for key, value in weights.items()}
    one_stage, newer = name.startswith("retinanet"), name.endswith("_v2")
    if batch_norm_eps is None:
        frozen = not newer and "backbone.body.bn1.num_batches_tracked" not in weights
        batch_norm_eps = 0.0 if frozen else _EPS
    key = "head.classification_head.cls_logits.bias" if one_stage else "roi_heads.box_predictor.cls_score.bias"
    outputs = weights[key].shape[0]
    if one_stage:
        outputs = _per_anchor(weights[key]).shape[1]
    kept = list(range(1, outputs))
    if outputs == _COCO_OUTPUTS and not all_classes:
        kept = _COCO_IDS

    converted: dict[str, Tensor] = {}
    unknown = []
    for key, value in weights.items():
        if key.endswith("num_batches_tracked"):  # a count that nothing here reads, and frozen norms lack
            continue
        new = _new_name(key, one_stage, newer)
        if new is None:
            unknown.append(key)
            continue
        if key.startswith("backbone.body.") and key.endswith("running_var"):
            value = value + (batch_norm_eps - _EPS)
        converted[new] = _reordered(new, value, kept, one_stage)
    if unknown:
        raise UserError(
            f"this looks like torchvision's {name}, but holds {len(unknown)} tensors that it has not: "
            f"{', '.join(unknown[:4])}; expected one of {', '.join(_CONFIGS)}"
        )
    if one_stage and newer:  # Detectron2's convolutions have a bias even where a norm follows
        for key in [key for key in converted if re.fullmatch(r"head\.\w+_subnet\.(0|3|6|9)\.weight", key)]:
            converted.setdefault(key.replace("weight", "bias"), torch.zeros(converted[key].shape[0]))
    options = _resnet_options(weights)
    if len(kept) != 80:
        options += (f"MODEL.{'RETINANET' if one_stage else 'ROI_HEADS'}.NUM_CLASSES", str(len(kept)))
    return converted, TorchvisionModel(name, f"configs/torchvision/{_CONFIGS[name]}", options, len(kept))


def _recognise(weights: Mapping[str, Tensor]) -> str:
    """torchvision's name of the model.

    Raises:
        UserError: it is none that can be converted.
    """
    supported = f"expected one of {', '.join(_CONFIGS)}"
    if not is_torchvision(weights):
        if "layer1.0.conv1.weight" in weights:
            raise UserError(
                f"these are the weights of an image classifier; {supported}. Detectron2's "
                "tools/convert-torchvision-to-d2.py converts a classifier to start a training from"
            )
        if any(name.startswith(("backbone.bottom_up.", "proposal_generator.")) for name in weights):
            raise UserError("these weights have Detectron2's names already: use the file as it is")
        raise UserError(f"these are not the weights of a detector of torchvision's ({_some(weights)}); {supported}")
    if "backbone.body.layer1.0.conv1.weight" not in weights:
        raise UserError(f"this detector's backbone is no ResNet ({_some(weights)}); {supported}")
    names = set(weights)
    if any(name.startswith("roi_heads.keypoint") for name in names):
        raise UserError(f"these are the weights of a Keypoint R-CNN, which is not converted; {supported}")
    if "roi_heads.box_predictor.cls_score.bias" in names:
        kind = "maskrcnn" if "roi_heads.mask_predictor.mask_fcn_logits.weight" in names else "fasterrcnn"
        newer = "backbone.fpn.inner_blocks.0.1.weight" in names
    elif {"head.classification_head.cls_logits.bias", "head.regression_head.bbox_reg.bias"} <= names and not any(
        "bbox_ctrness" in name
        for name in names  # FCOS
    ):
        kind = "retinanet"
        newer = "head.classification_head.conv.0.1.weight" in names
    else:
        raise UserError(f"this detector's heads are not known here; {supported}")
    return f"{kind}_resnet50_fpn" + ("_v2" if newer else "")


def _some(weights: Mapping[str, Tensor]) -> str:
    return f"{len(weights)} tensors, such as {next(iter(weights), 'none')}"


def _resnet_options(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    blocks = []
    for stage in (2, 3, 4):
        found = [re.match(rf"backbone\.body\.layer{stage}\.(\d+)\.", name) for name in weights]
        blocks.append(1 + max((int(match[1]) for match in found if match), default=-1))
    bottleneck = "backbone.body.layer1.0.conv3.weight" in weights
    depth = _DEPTHS.get((tuple(blocks), bottleneck))
    if depth is None:
        raise UserError(f"stages of {blocks} blocks are those of no ResNet that Detectron2 has (18, 34, 50, 101, 152)")
    options = () if depth == 50 else ("MODEL.RESNETS.DEPTH", str(depth))
    return options if bottleneck else (*options, "MODEL.RESNETS.RES2_OUT_CHANNELS", "64")


def _new_name(name: str, one_stage: bool, newer: bool) -> str | None:
    """Detectron2's name for a tensor with torchvision's ``name``; None where there is none."""
    finest = 3 if one_stage else 2
    per_layer = 3 if newer else 2  # convolution, norm if any, ReLU
    rules = [
        (r"backbone\.body\.conv1", "backbone.bottom_up.stem.conv1"),
        (r"backbone\.body\.bn1", "backbone.bottom_up.stem.conv1.norm"),
        (
            r"backbone\.body\.layer(\d)\.(\d+)\.(conv|bn)(\d)",
            lambda m: f"{_block(m)}.conv{m[4]}" + (".norm" if m[3] == "bn" else ""),
        ),
        (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.0", lambda m: f"{_block(m)}.shortcut"),
        (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.1", lambda m: f"{_block(m)}.shortcut.norm"),
        (
            r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.([01])",
            lambda m: f"backbone.fpn_{'lateral' if m[1] == 'inner' else 'output'}{finest + int(m[2])}{_norm(m[3])}",
        ),
        (r"backbone\.fpn\.extra_blocks\.(p6|p7)", r"backbone.top_block.\1"),
    ]
    if one_stage:
        rules += [
            (
                r"head\.(classification|regression)_head\.conv\.(\d)\.([01])",
                lambda m: (
                    f"head.{'cls' if m[1] == 'classification' else 'bbox'}_subnet.{int(m[2]) * per_layer + int(m[3])}"
                ),
            ),
            (r"head\.classification_head\.cls_logits", "head.cls_score"),
            (r"head\.regression_head\.bbox_reg", "head.bbox_pred"),
        ]
    else:
        rules += [
            # One convolution in the RPN's head has another name than several.
            (
                r"rpn\.head\.conv\.(\d)\.0",
                lambda m: "proposal_generator.rpn_head.conv" + (f".conv{m[1]}" if newer else ""),
            ),
            (r"rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
            (r"rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
            (r"roi_heads\.box_head\.fc6", "roi_heads.box_head.fc1"),
            (r"roi_heads\.box_head\.fc7", "roi_heads.box_head.fc2"),
            (r"roi_heads\.box_head\.([0-3])\.([01])", lambda m: f"roi_heads.box_head.conv{int(m[1]) + 1}{_norm(m[2])}"),
            (r"roi_heads\.box_head\.5", "roi_heads.box_head.fc1"),
            (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)", r"roi_heads.box_predictor.\1"),
            (
                r"roi_heads\.mask_head\.(\d)\.([01])",
                lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}{_norm(m[2])}",
            ),
            (r"roi_heads\.mask_predictor\.conv5_mask", "roi_heads.mask_head.deconv"),
            (r"roi_heads\.mask_predictor\.mask_fcn_logits", "roi_heads.mask_head.predictor"),
        ]
    layer, _, what = name.rpartition(".")
    for pattern, replacement in rules:
        if re.fullmatch(pattern, layer):
            return f"{re.sub(f'^{pattern}$', replacement, layer)}.{what}"
    return None


def _block(match: re.Match) -> str:
    return f"backbone.bottom_up.res{int(match[1]) + 1}.{match[2]}"


def _norm(index: str) -> str:
    """torchvision numbers a convolution 0 and its norm 1; Detectron2's norm is a child of the convolution."""
    return ".norm" if index == "1" else ""


def _reordered(name: str, value: Tensor, kept: list[int], one_stage: bool) -> Tensor:
    """Bring outputs per class and per anchor into Detectron2's order. ``kept``: outputs of the classes, in order."""
    layer = name.rpartition(".")[0]
    if layer == "roi_heads.box_predictor.cls_score":  # the background is last here, first there
        return value[[*kept, 0]]
    if layer == "roi_heads.box_predictor.bbox_pred":  # and has no box here
        return value.unflatten(0, (-1, 4))[kept].flatten(0, 1)
    if layer == "roi_heads.mask_head.predictor":
        return value[kept]
    if one_stage and layer in ("head.cls_score", "head.bbox_pred"):
        # A cell's anchors are sizes of each shape there, shapes of each size here.
        by_anchor = _per_anchor(value)
        if layer == "head.cls_score":
            by_anchor = by_anchor[:, kept]
        return by_anchor.unflatten(0, (_SHAPES, _SIZES)).transpose(0, 1).flatten(0, 2).contiguous()
    return value


def _per_anchor(value: Tensor) -> Tensor:
    """(A * n, ...) -> (A, n, ...) for the outputs of RetinaNet's head."""
    if value.shape[0] % (_SHAPES * _SIZES):
        raise UserError(
            f"a head with {value.shape[0]} outputs does not have 9 anchors a cell, as torchvision's RetinaNet has: "
            "3 shapes of 3 sizes"
        )
    return value.unflatten(0, (_SHAPES * _SIZES, -1))


def convert_file(
    source: str, target: str, *, all_classes: bool = False, batch_norm_eps: float | None = None
) -> TorchvisionModel:
    """Convert a file that holds a state dictionary, or a dictionary with one under "model".

    Args:
        source: such a file.
        target: the file to write, ending in .pth or .safetensors; for MODEL.WEIGHTS. It appears whole or not at all.
        all_classes, batch_norm_eps: see :func:`convert_torchvision`.

    Raises:
        UserError: the source cannot be read or is something else, or the target has another ending.
    """
    check_weight_file_name(target)
    if not os.path.isfile(source):
        raise UserError(f"no weight file {source}: {not_found(source)}")
    loaded = read_weights(source)
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{source} holds no dictionary of tensors; expected what torch.save(model.state_dict()) writes")
    try:
        weights, model = convert_torchvision(loaded, all_classes=all_classes, batch_norm_eps=batch_norm_eps)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    write_checkpoint({"model": weights, "__author__": f"torchvision {model.name}"}, target)
    return model
