"""Running trained models: optimisation for inference, prediction on images, folders and videos."""

from .load import load
from .optimize import optimize_for_inference
from .predictor import Predictor
from .tiles import Tiling

__all__ = ["Predictor", "Tiling", "load", "optimize_for_inference"]
