"""Necks: pure modules that turn bottom-up maps into a pyramid. One file each, found by name in NECK_REGISTRY."""

from .bifpn import BiFPN
from .build import NECK_REGISTRY, Neck, build_neck
from .fpn import FPN
from .image_pyramid import ImagePyramid
from .nasfpn import NASFPN
from .pafpn import PAFPN
from .simple_pyramid import SimpleFeaturePyramid

__all__ = [
    "FPN",
    "NASFPN",
    "NECK_REGISTRY",
    "PAFPN",
    "BiFPN",
    "ImagePyramid",
    "Neck",
    "SimpleFeaturePyramid",
    "build_neck",
]
