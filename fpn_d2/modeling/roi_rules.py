"""Rules for the pyramid levels of a RoI, by the name in MODEL.ROI_LEVEL_ASSIGN.NAME: one registry, one contract."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from fpn_d2.errors import UserError, did_you_mean

from .extractors import AllConcat, AllMax, AllSum, GRoIE, ROIExtractor, Soft
from .level_assign import CanonicalLevelAssigner, FinestLevelAssigner

ROI_RULE_REGISTRY = Registry("ROI_RULE")
ROI_RULE_REGISTRY.__doc__ = """
Registry of what says from which levels a RoI is pooled, by the name in ``MODEL.ROI_LEVEL_ASSIGN.NAME``.

A registered class has ``from_config(cfg, levels, channels)``, which returns the arguments of its constructor. An
instance is called with the boxes of a batch and returns a level index for each, as :class:`CanonicalLevelAssigner`; or
it is an :class:`ROIExtractor`, which combines what is pooled from several levels.
"""
for _name, _rule in {
    "canonical": CanonicalLevelAssigner,
    "finest": FinestLevelAssigner,
    "soft": Soft,
    "all_max": AllMax,
    "all_sum": AllSum,
    "all_concat": AllConcat,
    "groie": GRoIE,
}.items():
    ROI_RULE_REGISTRY._do_register(_name, _rule)


def find_rule(name: str) -> type:
    """Return the rule called ``name`` (MODEL.ROI_LEVEL_ASSIGN.NAME).

    Raises:
        UserError: there is none, or it cannot be built from a configuration.
    """
    if name not in ROI_RULE_REGISTRY:
        known = sorted(key for key, _ in ROI_RULE_REGISTRY)
        raise UserError(
            f"MODEL.ROI_LEVEL_ASSIGN.NAME is {name!r}{did_you_mean(str(name), known)}; known rules: {', '.join(known)}"
        )
    rule = ROI_RULE_REGISTRY.get(name)
    if not isinstance(rule, type) or not hasattr(rule, "from_config"):
        raise UserError(
            f"MODEL.ROI_LEVEL_ASSIGN.NAME {name}: expected a class with from_config(cfg, levels, channels), which "
            f"returns the arguments of its constructor, got {rule!r}"
        )
    return rule


def combines_levels(cfg: CfgNode) -> bool:
    """Whether the rule of ``cfg`` is an extractor, not one that gives each RoI one level."""
    return issubclass(find_rule(cfg.MODEL.ROI_LEVEL_ASSIGN.NAME), ROIExtractor)


def build_rule(cfg: CfgNode, levels: Sequence[int], channels: int) -> Callable:
    """Build the rule of ``cfg.MODEL.ROI_LEVEL_ASSIGN``.

    Args:
        cfg: the configuration.
        levels: the absolute levels that are pooled, ascending.
        channels: of each map.
    """
    rule = find_rule(cfg.MODEL.ROI_LEVEL_ASSIGN.NAME)
    return rule(**rule.from_config(cfg, levels, channels))


def extracted_channels(cfg: CfgNode, levels: Sequence[int], channels: int) -> int:
    """Channels that the heads see of RoIs that are pooled from maps of ``channels``, under ``cfg``."""
    if not combines_levels(cfg):
        return channels
    # On "meta" it draws no random numbers and takes no memory.
    with torch.device("meta"):
        return build_rule(cfg, levels, channels).out_channels
