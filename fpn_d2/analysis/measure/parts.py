"""Parameters and multiply-adds of a detector, part by part: bottom-up, neck, RPN, pooling, heads."""

import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor, nn

from .complexity import count_macs, count_parameters

PARTS = ("bottom-up", "neck", "RPN", "pooling", "heads", "other")


def split(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each part of a detector of Detectron2 or of torchvision; pooling lies within "heads".

    A backbone without a pyramid is all bottom-up pathway; a one-stage head is "heads".
    """
    backbone = getattr(model, "backbone", None)
    bottom_up = getattr(backbone, "bottom_up", getattr(backbone, "body", backbone))
    rpn = getattr(model, "proposal_generator", getattr(model, "rpn", None))
    heads = [getattr(model, name, None) for name in ("roi_heads", "head", "sem_seg_head")]
    parts = {"bottom-up": [bottom_up], "neck": [backbone], "RPN": [rpn], "heads": heads}
    return {name: [module for module in modules if module is not None] for name, modules in parts.items()}


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each of ``PARTS`` and in "total"; an extractor's own count as pooling."""
    modules = split(model)
    counts = {name: count_parameters(*modules[name]) for name in modules}
    counts["neck"] -= counts["bottom-up"]
    counts["pooling"] = count_parameters(*poolers(model).values())
    counts["heads"] -= counts["pooling"]
    return _with_rest(counts, count_parameters(model))


def macs_by_part(model: nn.Module, batch: list) -> dict[str, float]:
    """Multiply-adds of each of ``PARTS`` in one inference on ``batch``, and in "total".

    Convolutions, matrix products and attention are counted in what the model computes. RoIAlign is none of these; its
    count is that of its definition, whatever way it is computed: four multiply-adds for each sample and channel.

    Args:
        model: in evaluation mode.
        batch: what it is called with.
    """
    modules, pools = split(model), poolers(model)
    calls: dict[nn.Module, list[tuple[tuple, dict]]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(module, []).append((args, kwargs))

    watched = {part for parts in modules.values() for part in parts} | set(pools.values())
    samples = _SampleCounter(pools.values())
    handles = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in watched]
    try:
        with torch.no_grad(), samples:
            total = count_macs(lambda: model(batch))
    finally:
        for handle in handles:
            handle.remove()

    def macs(parts: list[nn.Module]) -> float:
        runs = [(part, args, kwargs) for part in parts for args, kwargs in calls.get(part, [])]
        with torch.no_grad():
            return count_macs(lambda: [part(*args, **kwargs) for part, args, kwargs in runs])

    counts = {name: macs(modules[name]) for name in modules}
    counts["neck"] -= counts["bottom-up"]
    counts["pooling"] = macs(list(pools.values()))
    counts["heads"] -= counts["pooling"]
    counts["pooling"] += samples.macs
    return _with_rest(counts, total + samples.macs)


def _with_rest(counts: dict[str, float], total: float) -> dict[str, float]:
    """All of ``PARTS`` in their order, with what belongs to none of them and the total."""
    counts["other"] = total - sum(counts.values())
    return {part: counts[part] for part in PARTS} | {"total": total}


def poolers(model: nn.Module) -> dict[str, nn.Module]:
    """What pools RoIs from maps, by name: Detectron2's, ours and torchvision's."""
    kinds = ("MultiScaleRoIAlign",)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ROIPooler) or type(module).__name__ in kinds
    }


class _SampleCounter:
    """While it is entered: the multiply-adds that RoIAlign takes by definition, of all RoIs that are pooled."""

    def __init__(self, pools):
        self.macs = 0.0
        self._pools = list(pools)
        self._handles: list = []

    def __enter__(self) -> "_SampleCounter":
        for pool in self._pools:
            if isinstance(pool, ROIPooler) and not hasattr(pool, "extractor"):
                self._handles.append(pool.register_forward_pre_hook(self._pooled_by_level))
            elif isinstance(pool, ROIPooler):  # pools a RoI from several levels, each by an operation of its own
                for level in pool.level_poolers:
                    self._handles.append(level.register_forward_pre_hook(self._pooled_on_one_level))
            else:
                self._handles.append(pool.register_forward_hook(self._pooled_by_torchvision))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _pooled_by_level(self, pool: ROIPooler, args: tuple) -> None:
        maps, box_lists = args
        boxes = torch.cat([boxes.tensor for boxes in box_lists])
        if len(boxes) == 0:
            return
        if hasattr(pool, "assigner"):
            level_indices = pool.assigner(box_lists)
        elif len(pool.level_poolers) == 1:
            level_indices = torch.zeros(len(boxes), dtype=torch.long)
        else:
            level_indices = assign_boxes_to_levels(
                [Boxes(boxes)], pool.min_level, pool.max_level, pool.canonical_box_size, pool.canonical_level
            )
        for level_index, operation in enumerate(pool.level_poolers):
            rows = level_indices.to(boxes.device) == level_index
            self._add(boxes[rows], operation.spatial_scale, operation, maps[level_index].shape[1])

    def _pooled_on_one_level(self, operation: nn.Module, args: tuple) -> None:
        level_map, rois = args
        self._add(rois[:, 1:], operation.spatial_scale, operation, level_map.shape[1])

    def _pooled_by_torchvision(self, pool: nn.Module, args: tuple, output: Tensor) -> None:
        maps, box_lists = list(args[0].values()), args[1]
        boxes = torch.cat(box_lists)
        level_indices = pool.map_levels(box_lists) if len(pool.scales) > 1 else torch.zeros(len(boxes))
        for level_index, scale in enumerate(pool.scales):
            self._add(boxes[level_indices == level_index], scale, pool, maps[level_index].shape[1])

    def _add(self, boxes: Tensor, scale: float, operation: nn.Module, channels: int) -> None:
        height, width = operation.output_size
        ratio = getattr(operation, "sampling_ratio", None)
        if ratio is None:  # RoIPool takes maxima
            return
        if ratio > 0:
            samples = float(len(boxes) * ratio * ratio)
        else:
            sides = (boxes[:, 2:4] - boxes[:, :2]).double() * scale
            across, down = (sides[:, 0] / width).ceil().clamp(min=1), (sides[:, 1] / height).ceil().clamp(min=1)
            samples = float((across * down).sum())
        self.macs += 4 * samples * height * width * channels
