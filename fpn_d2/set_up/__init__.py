"""Installs what pip cannot install with fpn_d2: torch, torchvision, OpenCV and Detectron2, each where it is missing.

One code for two callers: ``fpn-d2 install-detectron2``, for the environment that it runs in, and ``bootstrap/``, for
``.venv``. It knows the standard library alone, and nothing else of this package.
"""

from .current import install_missing

__all__ = ["install_missing"]
