"""Necks: pure modules that turn bottom-up maps into a pyramid. One file each, found by name in NECK_REGISTRY."""

from .build import NECK_REGISTRY, Neck, build_neck
from .fpn import FPN

__all__ = ["FPN", "NECK_REGISTRY", "Neck", "build_neck"]
