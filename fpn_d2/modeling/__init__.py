"""The three stops that we own: backbone (bottom-up and neck), level assignment, pooling. Importing registers them."""

from .backbone import PyramidBackbone, build_fpn_backbone
from .level_assign import LEVEL_ASSIGN_REGISTRY, CanonicalLevelAssigner, canonical_levels
from .necks import FPN, NECK_REGISTRY, Neck, build_neck
from .poolers import PyramidROIPooler, build_pooler
from .roi_heads import FPNCascadeROIHeads, FPNROIHeads

__all__ = [
    "FPN",
    "LEVEL_ASSIGN_REGISTRY",
    "NECK_REGISTRY",
    "CanonicalLevelAssigner",
    "FPNCascadeROIHeads",
    "FPNROIHeads",
    "Neck",
    "PyramidBackbone",
    "PyramidROIPooler",
    "build_fpn_backbone",
    "build_neck",
    "build_pooler",
    "canonical_levels",
]
