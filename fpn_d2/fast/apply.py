"""The one switch between Detectron2's bits and speed: ``MODEL.NUMERICS``."""

import torch
from detectron2.config import CfgNode
from torch import nn

from .convolution import use_fast_convolutions
from .linear import use_onednn

NUMERICS = ("fast", "exact")


def is_fast(cfg: CfgNode) -> bool:
    """Read ``cfg.MODEL.NUMERICS``.

    Raises:
        ValueError: it is neither "fast" nor "exact".
    """
    if cfg.MODEL.NUMERICS not in NUMERICS:
        raise ValueError(f"MODEL.NUMERICS is {cfg.MODEL.NUMERICS!r}; expected one of {', '.join(NUMERICS)}")
    return cfg.MODEL.NUMERICS == "fast"


def speed_up(module: nn.Module, device: str = "cpu") -> nn.Module:
    """Replace, in place, operations of ``module`` by faster ones that differ by float rounding, in training too.

    Frozen normalisations are folded into convolutions, fully connected layers run through oneDNN and, on a CPU,
    maps are channels-last and 3x3 convolutions take fewer products. Parameters keep their names, values and gradients.

    Args:
        module: a backbone or a head.
        device: where it will run.

    Returns:
        ``module``.
    """
    use_fast_convolutions(module)
    use_onednn(module)
    if torch.device(device).type == "cpu":
        lay_channels_last(module)
    return module


def lay_channels_last(module: nn.Module) -> nn.Module:
    """Make the weights of ``module`` channels-last, in place, so that the maps become so too.

    Not where there is a group norm: PyTorch's backward of it is many times slower on channels-last maps.
    """
    if not any(isinstance(child, nn.GroupNorm) for child in module.modules()):
        module.to(memory_format=torch.channels_last)
    return module
