"""Feature Pyramid Networks as plug-ins for Detectron2.

Importing it registers every component: those that look for them by name find them, see `fpn_d2._on_first_use`.
"""

import importlib
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from fpn_d2 import _on_first_use
from fpn_d2.config_names import config_file

if TYPE_CHECKING:
    from fpn_d2 import modeling
    from fpn_d2.config import add_fpn_d2_config, get_cfg
    from fpn_d2.inference import Predictor, load, optimize_for_inference
    from fpn_d2.modeling.swap import swap

__all__ = [
    "Predictor",
    "add_fpn_d2_config",
    "config_file",
    "get_cfg",
    "load",
    "modeling",
    "optimize_for_inference",
    "swap",
]

_HOME = {
    "Predictor": "fpn_d2.inference",
    "add_fpn_d2_config": "fpn_d2.config",
    "get_cfg": "fpn_d2.config",
    "load": "fpn_d2.inference",
    "optimize_for_inference": "fpn_d2.inference",
    "swap": "fpn_d2.modeling.swap",
}


def __getattr__(name: str) -> object:
    """A name at its first use, or a module of this package that nobody has imported yet."""
    if name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and PathFinder.find_spec(f"{__name__}.{name}", __path__):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_on_first_use.watch()
