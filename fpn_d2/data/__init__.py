"""A user's own data: registration from a configuration, checks, the mapper, and synthetic scenes to try things on."""

from fpn_d2 import _requirements

_requirements.check(_requirements.OPENCV)

from .coco_format import check_others, class_names, register_from_config  # noqa: E402
from .mapper import TrainingMapper  # noqa: E402

__all__ = ["TrainingMapper", "check_others", "class_names", "register_from_config"]
