"""Running trained models: optimisation for inference."""

from .optimize import optimize_for_inference

__all__ = ["optimize_for_inference"]
