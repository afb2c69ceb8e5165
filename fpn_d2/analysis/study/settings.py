"""The settings of the study: which scenes, which recipe, what is measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fpn_d2.config_names import own_folder


@dataclass(frozen=True)
class Setting:
    """All that the variants of one study have in common.

    Attributes:
        configs: folder of the variants; its fpn.yaml is the recipe of all.
        scenes: arguments of :func:`fpn_d2.data.scenes.make_scenes`, "train" and "val" among them.
        edges: object sizes in pixels at which one range of the tables ends and the next begins.
        reference: variant that training times and memory are divided by; None: neither is measured.
        rates: learning rates of which each variant gets the best; none: that of the recipe.
        recall_at: numbers of proposals per image whose average recall is measured.
        order: the variants whose rows come first.
        image_pyramid: variants that are tested once more on images of several sizes, as TEST.AUG.MIN_SIZES has them;
            the first seed alone, as it takes longer than the training.
        keep_maps: whether the bottom-up pathway is frozen, so that its maps can be kept in files.
    """

    configs: Path
    scenes: Mapping[str, object]
    edges: tuple[float, ...]
    reference: str | None = None
    rates: tuple[float, ...] = ()
    recall_at: tuple[int, ...] = ()
    image_pyramid: tuple[str, ...] = ()
    keep_maps: bool = False
    order: tuple[str, ...] = ()


_CONFIGS = own_folder() / "study"
SETTINGS = {
    # Anchors and canonical size of the paper, and scenes for them: by its rule objects below 112 pixels are on P2, to
    # 224 on P3 and above on P4; anchors begin with 32 pixels on P2.
    "paper": Setting(
        configs=_CONFIGS / "paper",
        scenes={"train": 600, "val": 200, "image_size": 448, "min_size": 28.0, "max_size": 400.0, "max_objects": 6},
        edges=(56, 112, 224),
        rates=(0.001, 0.002, 0.004),
        recall_at=(100, 1000),
        image_pyramid=("fpn", "c4"),
        keep_maps=True,
        order=("fpn", "no_top_down", "no_lateral", "only_p2", "c4", "c5"),
    ),
    # P2 to P4 get objects of one octave each and P5 half an octave, the edges being those of the recipe.
    "small_objects": Setting(
        configs=_CONFIGS / "small_objects",
        scenes={
            "train": 1000, "val": 200, "image_size": 128, "min_size": 8.0, "max_size": 90.0, "max_objects": 8,
            "own_colour": 1.0,
        },
        edges=(16, 32, 64),
        reference="c4",
        order=("fpn", "no_top_down", "no_lateral", "only_p2", "c4", "c5", "image_pyramid"),
    ),
}  # fmt: skip
