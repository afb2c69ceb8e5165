"""Numbers of a configuration that fit neither the model nor each other, and that would be trained with in silence."""

import contextlib
import math
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode

from fpn_d2.errors import UserError

_ANCHOR_GENERATORS = ("DefaultAnchorGenerator", "RotatedAnchorGenerator", "TorchvisionAnchorGenerator")
_WITH_RPN = ("GeneralizedRCNN", "ProposalNetwork", "PanopticFPN")
_RPNS = ("RPN", "RRPN", "FPNRPN")
_RETINANETS = ("RetinaNet", "FPNRetinaNet", "TorchvisionRetinaNet")
# Of the training, a warm-up that leaves less than this is told of.
_LEAST_AFTER_WARMUP = 0.5


def check_numbers(cfg: CfgNode) -> None:
    """Check anchors against the levels that they are for, and the sizes of images.

    Raises:
        UserError: Says what was expected.
    """
    levels = _levels_with_anchors(cfg)
    if levels:
        _check_anchors(cfg, levels)
    _check_image_sizes(cfg)


@contextlib.contextmanager
def missing_maps_are_told(cfg: CfgNode) -> Iterator[None]:
    """Within this context a model is built, in which Detectron2 looks up maps of the backbone by name.

    Raises:
        UserError: RPN, RetinaNet or RoI heads read a map that the backbone does not give.
    """
    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else None
        for section in ("RPN", "RETINANET", "ROI_HEADS"):
            names = list(cfg.MODEL[section].IN_FEATURES)
            if name in names:
                raise UserError(
                    f"MODEL.{section}.IN_FEATURES is {names}, but the backbone gives no {name}: leave it out there and "
                    "in MODEL.ANCHOR_GENERATOR.SIZES, or have the backbone give it (levels above P5 by "
                    "MODEL.FPN.TOP_BLOCK)"
                ) from error
        raise


def short_schedule(cfg: CfgNode) -> str:
    """What to say of a schedule that warms up for most of it; "" if there is nothing to say."""
    warmup, total = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if total - warmup >= _LEAST_AFTER_WARMUP * total or cfg.SOLVER.WARMUP_FACTOR >= 1:
        return ""
    return (
        f"SOLVER.WARMUP_ITERS is {warmup} and SOLVER.MAX_ITER {total}: the learning rate hardly comes to "
        f"SOLVER.BASE_LR, so that next to nothing is learnt; set SOLVER.WARMUP_ITERS to {total // 10} or less"
    )


def _levels_with_anchors(cfg: CfgNode) -> list[str]:
    """Names of the maps that have anchors, in Detectron2's models and ours; empty for models that we do not know."""
    model = cfg.MODEL
    if model.ANCHOR_GENERATOR.NAME not in _ANCHOR_GENERATORS:
        return []
    if model.META_ARCHITECTURE in _RETINANETS:
        return list(model.RETINANET.IN_FEATURES)
    if model.META_ARCHITECTURE in _WITH_RPN and model.PROPOSAL_GENERATOR.NAME in _RPNS:
        return list(model.RPN.IN_FEATURES)
    return []


def _check_anchors(cfg: CfgNode, levels: list[str]) -> None:
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    sizes, ratios = anchors.SIZES, anchors.ASPECT_RATIOS
    if sizes and not _is_list(sizes[0]) and len(levels) > 1:
        each = ", ".join(f"[{size}]" for size in sizes)
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.SIZES is the one list {_shown(sizes)}, all of which each of the {_words(levels)} "
            f"would get: write [{each}] for one size a level, or [{_shown(sizes)}] if that is meant"
        )
    sizes = _one_a_level(sizes, "MODEL.ANCHOR_GENERATOR.SIZES", levels)
    ratios = _one_a_level(ratios, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", levels)
    numbers = [len(a) * len(b) for a, b in zip(sizes, ratios, strict=True)]
    if len(set(numbers)) > 1:
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS make {numbers} anchors a cell on the {_words(levels)}: "
            "expected the same number on each, since one head looks at all of them"
        )


def _one_a_level(lists: Sequence, key: str, levels: list[str]) -> list[Sequence]:
    if not lists or not _is_list(lists[0]):
        lists = [lists]
    if len(lists) not in (1, len(levels)):
        raise UserError(
            f"{key} has {len(lists)} lists for {_words(levels)}: expected one for each level, or a single one for all"
        )
    for one in lists:
        if not _is_list(one) or not one or not all(_is_positive(number) for number in one):
            raise UserError(f"{key} has {_shown(one)} among its lists; expected numbers greater than 0")
    return list(lists) * (len(levels) if len(lists) == 1 else 1)


def _check_image_sizes(cfg: CfgNode) -> None:
    """Refuse sizes that no image can get. MIN_SIZE_TEST 0 stands for images as they are, as Detectron2 has it."""
    train, test = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST
    train = list(train) if _is_list(train) else [train]
    if not train or min(train) < 1:
        raise UserError(f"INPUT.MIN_SIZE_TRAIN is {_shown(train)}; expected shorter sides of at least 1 pixel")
    if test < 0:
        raise UserError(f"INPUT.MIN_SIZE_TEST is {test}; expected pixels, or 0 for images as they are")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(train) != 2:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN has {len(train)} sizes; with INPUT.MIN_SIZE_TRAIN_SAMPLING range, expected the "
            "least and the greatest"
        )
    for key, shorter in (("TRAIN", max(train)), ("TEST", test)):
        longer = cfg.INPUT[f"MAX_SIZE_{key}"]
        if shorter > 0 and longer < shorter:
            raise UserError(
                f"INPUT.MAX_SIZE_{key} is {longer}, less than INPUT.MIN_SIZE_{key} {shorter}: no image can have a "
                f"shorter side of {shorter} then; set INPUT.MAX_SIZE_{key} to {shorter} or more"
            )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _shown(value: object) -> str:
    return str(list(value)) if _is_list(value) else str(value)


def _words(levels: list[str]) -> str:
    """As "5 levels p2 to p6", or "1 level p4"."""
    if len(levels) == 1:
        return f"1 level {levels[0]}"
    names = f"{levels[0]} to {levels[-1]}" if len(levels) > 2 else " and ".join(levels)
    return f"{len(levels)} levels {names}"
