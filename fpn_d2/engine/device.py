"""The device that a model is trained and evaluated on."""

import logging

import torch
from detectron2.config import CfgNode

from fpn_d2.errors import UserError

logger = logging.getLogger(__name__)


def known_device(name: str, key: str = "MODEL.DEVICE") -> torch.device:
    """The device of that name, whether this machine has it or not.

    Args:
        name: As "cpu", "cuda" or "cuda:1".
        key: Where the name was given, for the message.

    Raises:
        UserError: PyTorch knows no such device.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise UserError(f"{key} is {name!r}; it must be cpu, cuda or cuda:N ({text})") from None


def on_this_machine(cfg: CfgNode, *, warn: bool = True) -> CfgNode:
    """The configuration to run here: a copy in which MODEL.DEVICE is "cpu" where it names a GPU and there is none.

    Args:
        cfg: What was asked for.
        warn: Whether to say so.

    Raises:
        UserError: MODEL.DEVICE is no device.
    """
    settled = cfg.clone()
    if known_device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        if warn:
            logger.warning("No GPU here: MODEL.DEVICE %s becomes cpu", cfg.MODEL.DEVICE)
        settled.defrost()
        settled.MODEL.DEVICE = "cpu"
        if cfg.is_frozen():
            settled.freeze()
    return settled
