"""MODEL.FPN.TOP_BLOCK "auto": what makes the levels above the last bottom-up map, from what the detector reads."""

import re
from collections.abc import Iterator

from detectron2.config import CfgNode

from fpn_d2.errors import UserError

# Top block for 0, 1 and 2 levels on top, by the section of MODEL that reads them: from C5 as in RetinaNet's paper and
# Detectron2's builder for it, or from P5 as in the code of FCOS and what is built on it (CondInst, BlendMask,
# CenterNet2, Detic).
_FROM_C5 = ("p6p7_c5", "p6p7_c5", "p6p7_c5")
_FROM_P5 = ("none", "p6_p5", "p6p7_p5")
_KNOWN = {"RETINANET": _FROM_C5, "TENSORMASK": _FROM_C5}
_KNOWN |= dict.fromkeys(("FCOS", "CENTERNET", "MEINST"), _FROM_P5)


def top_block_of(cfg: CfgNode, last: int) -> str:
    """Read ``cfg.MODEL.FPN.TOP_BLOCK``; find out what "auto" is.

    A section of MODEL counts that names pyramid levels in its IN_FEATURES and belongs to the meta-architecture, the
    proposal generator or the RoI heads: Detectron2 and others give all sections defaults, used or not.

    Args:
        cfg: the configuration.
        last: the coarsest level that the neck has without a top block.

    Raises:
        UserError: it is "auto", and the sections want different ones or two levels that may come from C5 or P5.
    """
    name = cfg.MODEL.FPN.TOP_BLOCK
    if name != "auto":
        return name
    above = {section: max(0, max(levels) - last) for section, levels in _sections_in_use(cfg)}
    number = max(above.values(), default=0)
    known = {_KNOWN[section] for section in above if section in _KNOWN}
    if number <= 2 and len(known) == 1:
        return known.pop()[number]
    if number <= 1 and not known:
        return "maxpool"
    sections = ", ".join(f"MODEL.{section}" for section, levels in above.items() if levels == number)
    raise UserError(
        f"MODEL.FPN.TOP_BLOCK is auto, and {sections} asks for p{last + number}, {number} levels above p{last}, which "
        "can be made in two ways: set MODEL.FPN.TOP_BLOCK to p6p7_p5 (by convolutions on the last output, as FCOS and "
        "CenterNet2) or p6p7_c5 (on the last bottom-up map, as RetinaNet), and MODEL.FPN.BOTTOM_UP, if that is no "
        "ResNet, to the builder of the bottom-up pathway alone; fpn_d2.swap(cfg) sets both where the stock builder's "
        "name is still in MODEL.BACKBONE.NAME"
    )


def _sections_in_use(cfg: CfgNode) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of each section of MODEL that is used, without underscores, and the pyramid levels it reads."""
    model = cfg.MODEL
    names = (model.META_ARCHITECTURE, model.PROPOSAL_GENERATOR.NAME, model.ROI_HEADS.NAME)
    in_use = [_plain(name) for name in names]
    for section, value in model.items():
        if not isinstance(value, CfgNode) or not any(_plain(section) in name for name in in_use):
            continue
        levels = [level for names in _in_features(value) for level in map(_level, names) if level is not None]
        if levels:
            yield _plain(section), levels


def _plain(name: str) -> str:
    return name.upper().replace("_", "")


def _in_features(node: CfgNode) -> Iterator[list[str]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _in_features(value)
        elif key.endswith("IN_FEATURES") and isinstance(value, list | tuple):
            yield value


def _level(name: object) -> int | None:
    match = re.fullmatch(r"p(\d+)", str(name))
    return int(match[1]) if match else None
