"""The three stops that we own: backbone (bottom-up and neck), level assignment, pooling. Importing registers them."""


from .anchors import TorchvisionAnchorGenerator
from .backbone import build_fpn_backbone
from .bottom_up import (
    HybridResNetViT,
    RegNetBackbone,
    TimmBackbone,
    ViTBackbone,
    expected_preprocessing,
    without_timm_weights,
)
from .extractors import ROIExtractor
from .level_assign import CanonicalLevelAssigner, canonical_levels
from .necks import FPN, NASFPN, NECK_REGISTRY, PAFPN, BiFPN, ImagePyramid, Neck, SimpleFeaturePyramid, build_neck
from .poolers import CombiningROIPooler, PyramidROIPooler, build_pooler
from .retinanet import FPNRetinaNet, TorchvisionRetinaNet
from .roi_heads import FPNCascadeROIHeads, FPNROIHeads
from .roi_rules import ROI_RULE_REGISTRY
from .rpn import FPNRPN

__all__ = [
    "FPN",
    "FPNRPN",
    "NASFPN",
    "NECK_REGISTRY",
    "PAFPN",
    "ROI_RULE_REGISTRY",
    "BiFPN",
    "CanonicalLevelAssigner",
    "CombiningROIPooler",
    "FPNCascadeROIHeads",
    "FPNROIHeads",
    "FPNRetinaNet",
    "HybridResNetViT",
    "ImagePyramid",
    "Neck",
    "PyramidROIPooler",
    "ROIExtractor",
    "RegNetBackbone",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "TorchvisionAnchorGenerator",
    "TorchvisionRetinaNet",
    "ViTBackbone",
    "build_fpn_backbone",
    "build_neck",
    "build_pooler",
    "canonical_levels",
    "expected_preprocessing",
    "without_timm_weights",
]
