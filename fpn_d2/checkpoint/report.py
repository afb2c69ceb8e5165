"""How much of a model a weight file filled, part by part, and whether that will do."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

logger = logging.getLogger(__name__)

# Final layers with one output, or one box, per class. RetinaNet's own bbox_pred does not depend on the classes.
_PER_CLASS = re.compile(
    r"(^roi_heads\.(.*\.)?(cls_score|bbox_pred|predictor)|^head\.cls_score|^sem_seg_head\.predictor)\.(weight|bias)$"
)
# Classifiers of whole images, at the end of bottom-up pathways trained on ImageNet: no detector uses them.
_CLASSIFIER = re.compile(r"(^|\.)(fc|fc1000|linear|classifier)\.")


@dataclass
class PartReport:
    """What became of the tensors of one part of the model. Names are those of the model."""

    total: int = 0
    missing: list[str] = field(default_factory=list)
    other_shape: list[tuple[str, tuple, tuple]] = field(default_factory=list)  # name, in the file (or ()), in the model
    unused: list[str] = field(default_factory=list)  # in the file, not in the model
    extra_layers: list[str] = field(default_factory=list)  # layers of those in ``unused`` that the model lacks

    @property
    def loaded(self) -> int:
        return self.total - len(self.missing) - len(self.other_shape)


def part_of(name: str) -> str:
    """Part of the model to which the tensor ``name`` belongs.

    Example:
        >>> part_of("backbone.bottom_up.stem.conv1.weight"), part_of("roi_heads.box_head.fc1.bias")
        ('bottom_up', 'box_head')
    """
    first, *rest = name.split(".")
    if first == "backbone" and len(rest) > 1:
        if rest[0] == "bottom_up":
            return "bottom_up"
        return "neck" if rest[0].startswith(("fpn_", "top_block", "neck")) else "backbone"
    if first == "roi_heads" and len(rest) > 1:
        return rest[0]
    return "rpn" if first == "proposal_generator" else first


def report_of(model: nn.Module, incompatible: _IncompatibleKeys, short_names: bool = False) -> dict[str, PartReport]:
    """Sort what did not fit by the part of the model.

    Args:
        model: The model, after loading.
        incompatible: What fvcore's checkpointer found.
        short_names: Whether the file's names were matched to the ends of the model's, as for Caffe2 and ImageNet.
    """
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if _is_weight(name)}
    layers = {name for name, _ in model.named_modules()}
    parts: dict[str, PartReport] = {}

    def part(name: str) -> PartReport:
        return parts.setdefault(part_of(name), PartReport())

    for name in shapes:
        part(name).total += 1
    for name, in_file, in_model in incompatible.incorrect_shapes:
        part(name).other_shape.append((name, tuple(in_file), tuple(in_model)))
    misshapen = {name for name, _, _ in incompatible.incorrect_shapes}
    for name in incompatible.missing_keys:
        if _is_weight(name) and name not in misshapen:
            part(name).missing.append(name)
    for name in filter(_is_weight, incompatible.unexpected_keys):
        full = _full_name(name, shapes) if short_names else name
        if full in part(full).missing:
            # The matching of short names leaves out a tensor of another shape on both sides.
            part(full).missing.remove(full)
            part(full).other_shape.append((full, (), shapes[full]))
            continue
        part(full).unused.append(full)
        layer = full.rpartition(".")[0]
        if layer not in layers and not _CLASSIFIER.search(full):
            part(full).extra_layers.append(layer)
    return parts


def _is_weight(name: str) -> bool:
    # BatchNorm's counter is absent from many files and weighs nothing.
    return not name.endswith("num_batches_tracked")


def _full_name(name: str, model_names: Iterable[str]) -> str:
    """Where a tensor with a short name ("res4.22.conv1.weight") would be in the model, by its longest known start."""
    inner = name.split(".")
    for depth in range(len(inner) - 1, 0, -1):
        start = f".{'.'.join(inner[:depth])}."
        for candidate in model_names:
            position = f".{candidate}".find(start)
            if position >= 0:
                return candidate[:position] + name
    return name


def log_report(report: dict[str, PartReport], file: str) -> None:
    """Log one line with the number of tensors loaded, in total and by part, and a line for each kind of gap."""
    total = sum(part.total for part in report.values())
    loaded = sum(part.loaded for part in report.values())
    by_part = ", ".join(f"{name} {part.loaded}/{part.total}" for name, part in report.items() if part.total)
    logger.info("Loaded %d of %d tensors of the model from %s: %s", loaded, total, file, by_part)
    for name, part in report.items():
        for tensor, in_file, in_model in part.other_shape:
            logger.warning("%s", _shapes(tensor, in_file, in_model) + ": it keeps its random start")
        if part.missing:
            logger.warning("%s: %d tensors are not in the file and keep their random start: %s", name,
                           len(part.missing), _shown(part.missing))
        if part.unused:
            logger.warning("%s: %d tensors of the file are not used: %s", name, len(part.unused), _shown(part.unused))


def judge(report: dict[str, PartReport], partial_weights: str, whole: bool = False) -> str | None:
    """Decide whether a model filled like ``report`` may be used.

    Args:
        report: As from `report_of`.
        partial_weights: "auto", "allow" or "refuse"; see MODEL.PARTIAL_WEIGHTS.
        whole: Whether "auto" asks for the whole model, as an evaluation does.

    Returns:
        What is wrong with the file, or None.
    """
    if partial_weights == "allow":
        return None
    total = sum(part.total for part in report.values())
    loaded = sum(part.loaded for part in report.values())
    if loaded == 0:
        return "none of its tensors belongs to this model"
    if partial_weights == "refuse":
        unused = [name for part in report.values() for name in part.unused]
        if loaded < total:
            return f"it fills only {loaded} of {total} tensors of the model, and MODEL.PARTIAL_WEIGHTS is refuse"
        if unused:
            return f"it holds {len(unused)} tensors more than the model ({_shown(unused)})"
    if whole and loaded < total:
        return f"it fills only {loaded} of {total} tensors of the model, and evaluating or resuming needs all"
    return next(filter(None, (_mismatch(name, part) for name, part in report.items())), None)


def _mismatch(name: str, part: PartReport) -> str | None:
    """What is neither wholly there, nor wholly absent, nor different by the number of classes alone."""
    for tensor, in_file, in_model in part.other_shape:
        if not (_PER_CLASS.search(tensor) and (not in_file or in_file[1:] == in_model[1:])):
            return _shapes(tensor, in_file, in_model)
    if part.missing and (part.loaded or part.other_shape):
        return f"it fills only {part.loaded} of {part.total} tensors of {name}; it lacks {_shown(part.missing)}"
    if part.total and part.extra_layers:
        return f"its {name} has layers that the model lacks ({_shown(sorted(set(part.extra_layers)))})"
    return None


def _shapes(tensor: str, in_file: tuple, in_model: tuple) -> str:
    return f"{tensor} is {in_file or 'of another shape'} in the file and {in_model} in the model"


def _shown(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
