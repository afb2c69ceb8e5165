"""Feature Pyramid Networks as plug-ins for Detectron2. Importing it registers every component."""

from fpn_d2 import _requirements

_requirements.check()  # first: what follows would fail on a missing one with a less helpful message

from fpn_d2 import modeling  # noqa: E402
from fpn_d2.config import add_fpn_d2_config, get_cfg  # noqa: E402
from fpn_d2.inference import Predictor, load, optimize_for_inference  # noqa: E402
from fpn_d2.modeling.swap import swap  # noqa: E402

__all__ = ["Predictor", "add_fpn_d2_config", "get_cfg", "load", "modeling", "optimize_for_inference", "swap"]
