"""Names of bottom-up pathways: ours have a prefix in Detectron2's registry, and need none in MODEL.FPN.BOTTOM_UP.

Other projects register names like ours (``build_timm_backbone`` is Detic's too), and a name that is registered twice
is an error of whichever is imported second.
"""

import logging
from collections.abc import Callable

from detectron2.modeling.backbone import BACKBONE_REGISTRY

from fpn_d2.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

PREFIX = "fpn_d2."
ENTRY = "build_fpn_backbone"  # the backbone of fpn_d2, which cannot be its own bottom-up pathway


def register_bottom_up(build: Callable) -> Callable:
    """Register the builder ``NAME`` in Detectron2's registry as ``fpn_d2.NAME``; used as a decorator."""
    BACKBONE_REGISTRY._do_register(PREFIX + build.__name__, build)
    return build


def known_bottom_ups() -> dict[str, Callable]:
    """Each value that MODEL.FPN.BOTTOM_UP may have, with the builder that it means; ours without the prefix.

    Where another project has registered a name of ours, the name means its builder, and ours keeps the prefix.
    """
    registered = {name: build for name, build in BACKBONE_REGISTRY if name != ENTRY}
    names = {name: name.removeprefix(PREFIX) for name in registered}
    return {name if short in registered else short: registered[name] for name, short in names.items()}


def find_bottom_up(name: str) -> Callable:
    """Return the builder that MODEL.FPN.BOTTOM_UP ``name`` means.

    Raises:
        UserError: none has that name.
    """
    known = known_bottom_ups()
    if name not in known and name in BACKBONE_REGISTRY and name != ENTRY:
        return BACKBONE_REGISTRY.get(name)  # ours, with the prefix
    if name not in known:
        raise UserError(
            f"MODEL.FPN.BOTTOM_UP is {name!r}{did_you_mean(name, known)}; expected a registered bottom-up pathway: "
            f"{', '.join(sorted(known))}"
        )
    if PREFIX + name in known:
        logger.warning(
            "MODEL.FPN.BOTTOM_UP %s is that of %s; the one of fpn_d2 is called %s here",
            name, known[name].__module__, PREFIX + name,
        )  # fmt: skip
    return known[name]
