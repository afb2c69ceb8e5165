"""Published results of Detectron2's model zoo and of mmdetection, as data with their sources: nothing is measured here.

What a source does not say is None or missing. The two were measured on other machines than yours and with other
versions: they stand beside measurements, not among them.
"""

import functools
import json
import re
from pathlib import Path

_FOLDER = Path(__file__).parent
# How the two projects write the same bottom-up pathway and schedule.
_BACKBONES = {"R_50": "r50", "R_101": "r101", "X_101_32x8d": "x101_32x8d"}
_EPOCHS = {"1x": (12,), "2x": (24,), "3x": (36,)}


@functools.lru_cache(maxsize=2)
def _read(name: str) -> dict:
    return json.loads((_FOLDER / name).read_text(encoding="utf-8"))


def zoo_baselines() -> dict:
    """Detectron2's MODEL_ZOO.md: "source", "measured_on" and "rows", each with the name of its "config".

    AP, AR and PQ are in percent, times in seconds, memory in GB.
    """
    return _read("zoo_baselines.json")


def mmdet_baselines() -> dict:
    """The metafiles of mmdetection's FPN baselines, in the same form; "source" names one for each "family"."""
    return _read("mmdet_baselines.json")


def zoo_row(config: str) -> dict | None:
    """The published row of a config, or None.

    Args:
        config: a path or a name of the model zoo; its last folder and its name count, so that a file of this package
            gets the row of the file of the same name in the zoo, whose twin it is.
    """
    path = Path(config)
    name = f"{path.parent.name}/{path.stem}"
    return next((row for row in zoo_baselines()["rows"] if row["config"] == name), None)


def mmdet_rows(config: str) -> list[dict]:
    """What mmdetection publishes for the same detector, bottom-up pathway and schedule; [] where it does not."""
    name = Path(config).stem
    found = re.fullmatch(r"((?:faster|mask|cascade|cascade_mask)_rcnn|retinanet)_(\w+)_FPN_([123]x)", name)
    if not found or found[2] not in _BACKBONES:
        return []
    kind = f"{found[1]}_{_BACKBONES[found[2]]}_"
    return [
        row
        for row in mmdet_baselines()["rows"]
        if row["config"].startswith(kind) and row["epochs"] in _EPOCHS[found[3]]
    ]
