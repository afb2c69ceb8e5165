"""A user's own data: registration from a configuration, checks, the mapper, and synthetic scenes to try things on."""

from .coco_format import check_others, class_names, register_from_config
from .mapper import TrainingMapper

__all__ = ["TrainingMapper", "check_others", "class_names", "register_from_config"]
