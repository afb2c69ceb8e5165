"""A bottom-up pathway and a neck, together one Detectron2 backbone."""

import logging

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from fpn_d2.fast.apply import is_fast, speed_up

from .bottom_up.checkpointing import checkpoint_stages
from .bottom_up.timm_backbone import TimmBackbone
from .bottom_up.vit import ViTBackbone
from .necks import Neck, build_neck

logger = logging.getLogger(__name__)


class PyramidBackbone(Backbone):
    """image -> bottom-up pathway -> neck -> pyramid.

    The children of the neck are registered here under their own names, beside ``bottom_up``, so that parameters have
    the names that they have in Detectron2's ``FPN`` and its checkpoints load with no key missing or unexpected.
    """

    def __init__(self, bottom_up: Backbone, neck: Neck):
        """Join the two.

        Args:
            bottom_up: takes images (N, 3, H, W), returns a dictionary of maps.
            neck: takes that dictionary; built for ``bottom_up.output_shape()``.

        Raises:
            ValueError: the neck holds parameters or buffers outside its child modules, or a child is called
                ``bottom_up``.
        """
        super().__init__()
        own = [name for name, _ in [*neck.named_parameters(recurse=False), *neck.named_buffers(recurse=False)]]
        if own:
            raise ValueError(f"{type(neck).__name__} holds {', '.join(own)} itself; put parameters in child modules")
        # Neck first, as in Detectron2: optimizers number their state in this order.
        for name, child in neck.named_children():
            if name == "bottom_up":
                raise ValueError(f"a child of {type(neck).__name__} is called bottom_up; that name is taken")
            self.add_module(name, child)
        self.bottom_up = bottom_up
        self._neck = (neck,)  # in a tuple, so that it is not registered a second time

    def __setattr__(self, name: str, value: object) -> None:
        """Hand a child that replaces one of the neck's to the neck too, which is what runs it."""
        super().__setattr__(name, value)
        neck = self.__dict__.get("_neck", (None,))[0]
        if neck is not None and name in neck._modules and (value is None or isinstance(value, nn.Module)):
            setattr(neck, name, value)

    @property
    def neck(self) -> Neck:
        """The neck; its child modules are this module's own."""
        return self._neck[0]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the pyramid ``{"p2": (N, C, H/4, W/4), ...}`` of the images ``x`` (N, 3, H, W)."""
        return self.neck.pyramid(self.bottom_up, x)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """Switch to training or evaluation mode, the neck itself included."""
        self.neck.training = mode
        return super().train(mode)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level."""
        return self.neck.output_shape()

    @property
    def size_divisibility(self) -> int:
        """Image sides are padded to a multiple of this many pixels: what the neck or the pathway asks for."""
        return max(self.neck.size_divisibility, self.bottom_up.size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What the bottom-up pathway asks for on Detectron2's main branch (a square input for some ViTs)."""
        constraints = dict(getattr(self.bottom_up, "padding_constraints", {}))
        if "size_divisibility" in constraints:
            constraints["size_divisibility"] = max(constraints["size_divisibility"], self.size_divisibility)
        return constraints


@BACKBONE_REGISTRY.register()
def build_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """Build the bottom-up pathway ``cfg.MODEL.FPN.BOTTOM_UP`` with the neck ``cfg.MODEL.FPN.NECK``.

    Args:
        cfg: Detectron2's configuration with the keys of :func:`fpn_d2.add_fpn_d2_config`.
        input_shape: channels of the images.

    Raises:
        ValueError: no such bottom-up pathway or neck, or the two do not fit.
    """
    name = cfg.MODEL.FPN.BOTTOM_UP
    if name not in BACKBONE_REGISTRY or name == "build_fpn_backbone":
        known = ", ".join(sorted(key for key, _ in BACKBONE_REGISTRY if key != "build_fpn_backbone"))
        raise ValueError(f"MODEL.FPN.BOTTOM_UP is {name!r}; expected a registered bottom-up pathway: {known}")
    bottom_up = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING and not isinstance(bottom_up, TimmBackbone | ViTBackbone):
        checkpoint_stages(bottom_up)  # those of timm do it themselves
    _warn_of_unused(cfg, bottom_up)
    backbone = PyramidBackbone(bottom_up, build_neck(cfg, bottom_up.output_shape()))
    return speed_up(backbone, cfg.MODEL.DEVICE) if is_fast(cfg) else backbone


def _warn_of_unused(cfg: CfgNode, bottom_up: Backbone) -> None:
    shapes = bottom_up.output_shape()
    read = [shapes[name].stride for name in cfg.MODEL.FPN.IN_FEATURES if name in shapes]
    unused = [name for name, shape in shapes.items() if read and shape.stride > max(read)]
    if unused:
        logger.warning(
            f"The bottom-up pathway computes {', '.join(unused)}, which MODEL.FPN.IN_FEATURES does not name: time is "
            "lost, and training on several GPUs stops at parameters without gradients. Leave them out of the pathway's "
            "OUT_FEATURES (MODEL.RESNETS.OUT_FEATURES for a ResNet)"
        )
