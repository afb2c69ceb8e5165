"""RetinaNet with faster operations, and as torchvision runs it, which cuts boxes at the border before suppression."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Instances
from torch import nn

from fpn_d2.fast.apply import numerics, speed_up


@META_ARCH_REGISTRY.register()
class FPNRetinaNet(RetinaNet):
    """Detectron2's ``RetinaNet`` whose head takes faster operations too, where they are asked for."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read what ``RetinaNet`` reads."""
        args = super().from_config(cfg)
        speed_up(args["head"], numerics(cfg))
        return args


@META_ARCH_REGISTRY.register()
class TorchvisionRetinaNet(FPNRetinaNet):
    """Detectron2's ``RetinaNet`` with torchvision's two differences, for detectors that were trained there.

    Boxes are clipped to the image before non-maximum suppression, not behind it. And the head's norm may be GN, which
    v0.6 of Detectron2 cannot build.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read what ``RetinaNet`` reads; the head is built anew where its norm is GN."""
        if cfg.MODEL.RETINANET.NORM != "GN":
            return super().from_config(cfg)
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.RETINANET.NORM = ""
        args = super().from_config(plain)
        shapes = args["backbone"].output_shape()
        head_args = RetinaNetHead.from_config(plain, [shapes[name] for name in args["head_in_features"]])
        args["head"] = RetinaNetHead(**head_args | {"norm": _group_norm})
        speed_up(args["head"], numerics(cfg))
        return args

    def _decode_per_level_predictions(self, *args, **kwargs) -> Instances:
        found = super()._decode_per_level_predictions(*args, **kwargs)
        found.pred_boxes.clip(found.image_size)
        return found


def _group_norm(channels: int) -> nn.GroupNorm:
    # Detectron2 v0.6 asks for the norm of a single channel, to see what it is.
    return nn.GroupNorm(min(32, channels), channels)
