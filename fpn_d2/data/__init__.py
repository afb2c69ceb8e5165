"""A user's own data: registration from a configuration, checks, the mapper, and synthetic scenes to try things on."""

from .coco_format import class_names, register_from_config
from .mapper import TrainingMapper

__all__ = ["TrainingMapper", "class_names", "register_from_config"]
