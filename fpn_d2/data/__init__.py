"""A user's own data: registration from a configuration, checks, the mapper, and synthetic scenes to try things on."""

from .coco_format import class_names, register_from_config
from .mapper import TrainingMapper, build_mapper

__all__ = ["TrainingMapper", "build_mapper", "class_names", "register_from_config"]
