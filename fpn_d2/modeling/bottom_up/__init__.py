"""Bottom-up pathways that Detectron2 lacks or has no name for, found in its BACKBONE_REGISTRY. timm is optional."""

from .detectron2_own import RegNetBackbone
from .hybrid import HybridResNetViT
from .timm_backbone import TimmBackbone
from .timm_weights import expected_preprocessing, without_timm_weights
from .vit import ViTBackbone

__all__ = [
    "HybridResNetViT",
    "RegNetBackbone",
    "TimmBackbone",
    "ViTBackbone",
    "expected_preprocessing",
    "without_timm_weights",
]
