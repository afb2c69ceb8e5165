"""From a configuration of Detectron2, or of a project that builds on it, to the same model with our parts."""

import logging
from typing import NamedTuple

from detectron2.config import CfgNode

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


class Stock(NamedTuple):
    """What a builder of a whole pyramid is made of: values of MODEL.FPN.BOTTOM_UP and MODEL.FPN.TOP_BLOCK.

    A bottom-up pathway without a builder of its own is named by that of the whole: its pathway is then taken out. The
    top block may be a key of MODEL that has the number of levels, all from convolutions on P5.
    """

    bottom_up: str
    top_block: str


_RESNET = "build_resnet_backbone"
_FCOS = "FCOS.TOP_LEVELS"
STOCK_PYRAMIDS = {
    # Detectron2
    "build_resnet_fpn_backbone": Stock(_RESNET, "maxpool"),
    "build_retinanet_resnet_fpn_backbone": Stock(_RESNET, "p6p7_c5"),
    # AdelaiDet, centermask2, vovnet-detectron2
    "build_fcos_resnet_fpn_backbone": Stock(_RESNET, _FCOS),
    "build_fcos_vovnet_fpn_backbone": Stock("build_vovnet_backbone", _FCOS),
    "build_fcos_mobilenetv2_fpn_backbone": Stock("build_mnv2_backbone", _FCOS),
    "build_fcos_dla_fpn_backbone": Stock("build_fcos_dla_fpn_backbone", _FCOS),
    "build_vovnet_fpn_backbone": Stock("build_vovnet_backbone", "maxpool"),
    "build_mobilenetv2_fpn_backbone": Stock("build_mnv2_backbone", "maxpool"),
    # CenterNet2, Detic
    "build_p67_resnet_fpn_backbone": Stock(_RESNET, "p6p7_p5"),
    "build_p35_resnet_fpn_backbone": Stock(_RESNET, "none"),
    "build_p67_res2net_fpn_backbone": Stock("build_res2net_backbone", "p6p7_p5"),
    "build_p67_timm_fpn_backbone": Stock("build_timm_backbone", "p6p7_p5"),
    "build_p35_timm_fpn_backbone": Stock("build_timm_backbone", "none"),
    "build_swintransformer_fpn_backbone": Stock("build_swintransformer_backbone", "p6p7_p5"),
    "build_retinanet_dla_fpn_backbone": Stock("build_dla_backbone", "p6p7_c5"),
    "build_dla_fpn3_backbone": Stock("build_dla_fpn3_backbone", "none"),
    "build_dla_fpn5_backbone": Stock("build_dla_fpn5_backbone", "p6p7_c5"),
    # SwinT_detectron2
    "build_swint_fpn_backbone": Stock("build_swint_backbone", "maxpool"),
    "build_retinanet_swint_fpn_backbone": Stock("build_swint_backbone", "FPN.TOP_LEVELS"),
}
_TOP_BLOCK_OF_LEVELS = {0: "none", 1: "p6_p5", 2: "p6p7_p5"}
META_ARCHITECTURES = {"RetinaNet": "FPNRetinaNet"}
PROPOSAL_GENERATORS = {"RPN": "FPNRPN"}
ROI_HEADS = {"StandardROIHeads": "FPNROIHeads", "CascadeROIHeads": "FPNCascadeROIHeads"}
# Branches that Detectron2's RoI heads have, switched on by these keys of MODEL.
BRANCHES = ("MASK_ON", "KEYPOINT_ON")


def swap(cfg: CfgNode) -> None:
    """Put our backbone, RPN, heads and RetinaNet in the place of stock ones in ``cfg``: the model stays the same.

    It sets MODEL.BACKBONE.NAME, MODEL.FPN.BOTTOM_UP, MODEL.FPN.TOP_BLOCK and, where they are Detectron2's own, the
    names of meta-architecture, proposal generator and RoI heads. Those of other projects stay, and work with our
    backbone.
    Parameters keep their names, so that checkpoints of the stock model load. Keys that ``cfg`` lacks are added. Call it
    when ``cfg`` is complete; called twice, it changes nothing more.

    Args:
        cfg: names a builder of :data:`STOCK_PYRAMIDS` in MODEL.BACKBONE.NAME, or has been swapped; changed in place.

    Raises:
        UserError: it is frozen, or its backbone is not a pyramid that we can stand in for; ``cfg`` is then as it was.
    """
    if cfg.is_frozen():
        raise UserError(
            "fpn_d2.swap was given a frozen configuration: call cfg.defrost() first, or swap before freeze()"
        )
    name = cfg.MODEL.BACKBONE.NAME
    stock = None if name == "build_fpn_backbone" else _stock_pyramid(cfg)
    add_fpn_d2_config(cfg)
    model = cfg.MODEL
    if stock is not None:
        model.BACKBONE.NAME = "build_fpn_backbone"
        model.FPN.BOTTOM_UP, model.FPN.TOP_BLOCK = stock
        logger.info("%s: build_fpn_backbone, MODEL.FPN.BOTTOM_UP %s, MODEL.FPN.TOP_BLOCK %s", name, *stock)
    heads = {} if _has_heads_of_its_own(cfg) else ROI_HEADS
    for node, key, names in (
        (model, "META_ARCHITECTURE", META_ARCHITECTURES),
        (model.PROPOSAL_GENERATOR, "NAME", PROPOSAL_GENERATORS),
        (model.ROI_HEADS, "NAME", heads),
    ):
        if node[key] in names:
            logger.info("%s: %s", node[key], names[node[key]])
            node[key] = names[node[key]]


def _stock_pyramid(cfg: CfgNode) -> Stock:
    name = cfg.MODEL.BACKBONE.NAME
    if name in STOCK_PYRAMIDS:
        bottom_up, top_block = STOCK_PYRAMIDS[name]
        if name == "build_fcos_resnet_fpn_backbone":
            bottom_up = _adelaidets_resnet(cfg)
        if "." in top_block:
            section, key = top_block.split(".")
            levels = cfg.MODEL.get(section, {}).get(key)
            if levels not in _TOP_BLOCK_OF_LEVELS:
                raise UserError(f"MODEL.{top_block} is {levels!r}; expected 0, 1 or 2 levels on top of P5")
            top_block = _TOP_BLOCK_OF_LEVELS[levels]
        return Stock(bottom_up, top_block)
    if "bifpn" in name:
        raise UserError(
            f"MODEL.BACKBONE.NAME is {name}, a BiFPN whose parameters are not those of ours, so that its checkpoints "
            "do not load: to train ours, set MODEL.BACKBONE.NAME to build_fpn_backbone, MODEL.FPN.NECK to BiFPN, "
            "MODEL.FPN.BOTTOM_UP to the builder of its bottom-up pathway, and MODEL.FPN.OUT_CHANNELS, NORM, REPEATS "
            "and TOP_BLOCK to what it has"
        )
    raise UserError(
        f"MODEL.BACKBONE.NAME is {name}, no feature pyramid that fpn_d2.swap knows"
        f"{did_you_mean(name, STOCK_PYRAMIDS)}: for ours, set it to build_fpn_backbone, "
        "MODEL.FPN.BOTTOM_UP to the builder of its bottom-up pathway, "
        "MODEL.FPN.IN_FEATURES to the maps of that and MODEL.FPN.TOP_BLOCK to what makes the levels above them"
    )


def _adelaidets_resnet(cfg: CfgNode) -> str:
    """Which bottom-up pathway ``build_fcos_resnet_fpn_backbone`` of AdelaiDet or centermask2 takes."""
    if cfg.MODEL.BACKBONE.get("ANTI_ALIAS"):
        return "build_resnet_lpf_backbone"
    if cfg.MODEL.RESNETS.get("DEFORM_INTERVAL", 1) > 1:
        return "build_resnet_interval_backbone"
    return "build_mnv2_backbone" if cfg.MODEL.get("MOBILENET") else _RESNET


def _has_heads_of_its_own(cfg: CfgNode) -> bool:
    """Whether StandardROIHeads may mean another project's: few-shot-object-detection's have this key."""
    return "OUTPUT_LAYER" in cfg.MODEL.ROI_HEADS


def refuse_lost_branches(cfg: CfgNode) -> None:
    """Refuse heads of ours for a configuration that switches on a branch which they do not have.

    Raises:
        UserError: MODEL has a key ``..._ON`` that is True and not one of Detectron2's, e.g. DensePose's.
    """
    name = cfg.MODEL.ROI_HEADS.NAME
    lost = [key for key, on in cfg.MODEL.items() if key.endswith("_ON") and on is True and key not in BRANCHES]
    if lost and name in ROI_HEADS.values():
        keys = ", ".join(f"MODEL.{key}" for key in lost)
        raise UserError(
            f"{keys} is True, a branch that MODEL.ROI_HEADS.NAME {name} does not have and would drop in silence: set "
            "MODEL.ROI_HEADS.NAME to the heads of the project that has it (DensePoseROIHeads for DensePose), which "
            "work with MODEL.BACKBONE.NAME build_fpn_backbone too, or the key to False"
        )
