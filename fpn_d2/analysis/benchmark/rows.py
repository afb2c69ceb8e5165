"""The rows of the table of benchmarks: what each measures, under which settings."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fpn_d2.engine import UserError

from .data import evaluation, loading
from .detector import inference, training, training_memory
from .engines import engines
from .parts import neck, pooling, proposals

# With it nothing is compiled, and nothing compiled is taken from the cache.
NO_COMPILER = {"CXX": "no-compiler-of-this-name"}


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: in commands and of its file.
        what: it measures, in words.
        measure: called with a `Timing` and the settings; returns lines, see `benchmark_line.line`.
        settings: everything else that it is called with.
        variables: of the environment of its process.
        unit: of what is measured: "s", or "MB" of memory.
        most_rounds: measured at most, where calls take many seconds; there is one of warm-up then.
    """

    name: str
    what: str
    measure: Callable[..., list[dict]]
    settings: Mapping[str, object]
    variables: Mapping[str, str] = field(default_factory=dict)
    unit: str = "s"
    most_rounds: int | None = None


def _rows() -> list[Row]:
    rows = []
    for backward, way in ((False, "forward"), (True, "forward and backward")):
        for rois in (1000, 2000, 4000):
            name = f"pooling{'-backward' if backward else ''}-{rois}"
            settings = {"rois": rois, "backward": backward, "size": (800, 1088), "channels": 256}
            text, most = f"pooling of {rois} RoIs, 800 x 1088, {way}", 5 if backward else None
            rows.append(Row(name, text, pooling, settings, most_rounds=most))
    for dtype in ("float32", "bfloat16"):
        settings = {"dtype": dtype, "size": (800, 1088)}
        rows.append(Row(f"neck-{dtype}", f"neck, 800 x 1088, {dtype}", neck, settings))
    sizes = [((480, 640), "480x640", "480 x 640"), ((800, 1067), "800x1067", "800 x 1067")]
    for size, short, long in sizes:
        rows.append(Row(f"proposals-{short}", f"selection of proposals at test, {long}", proposals, {"size": size}))
    for kind, text, dtype, variables in (
        ("", "inference, float32", "float32", {}),
        ("no-compiler-", "inference, float32, without a compiler", "float32", NO_COMPILER),
        ("bfloat16-", "inference, bfloat16", "bfloat16", {}),
    ):
        for size, short, long in sizes:
            settings = {"size": size, "dtype": dtype}
            rows.append(Row(f"inference-{kind}{short}", f"{text}, {long}", inference, settings, variables))
    step = {"size": (480, 640), "batch": 2}
    for dtype in ("float32", "bfloat16"):
        text = f"training step, {dtype}, 2 images of 480 x 640"
        rows.append(Row(f"training-{dtype}", text, training, {"dtype": dtype, **step}))
    text = "peak memory of training steps, 2 images of 480 x 640"
    rows.append(Row("training-memory", text, training_memory, step, unit="MB", most_rounds=3))
    settings, text = {"images": 16, "size": (480, 640), "short_side": 800}, "reading, resizing and flipping images"
    for kind, where, variables in (("", "one core", {}), ("-no-compiler", "one core, without a compiler", NO_COMPILER)):
        rows.append(Row(f"loading{kind}", f"{text}, 480 x 640 to 800, {where}", loading, settings, variables))
    for size, short, long in sizes:
        rows.append(Row(f"engine-{short}", f"inference beside other engines, {long}", engines, {"size": size}))
    settings = {"images": 1000, "classes": 80, "detections": 100}
    rows.append(Row("evaluation", "COCO's figures of 1000 images, 80 classes", evaluation, settings, most_rounds=5))
    return rows


ROWS = {row.name: row for row in _rows()}


def choose_rows(patterns: Sequence[str] | None) -> list[Row]:
    """The rows that one of ``patterns`` names, as "loading" or "inference-*"; None: all.

    Raises:
        UserError: a pattern names none.
    """
    if patterns is None:
        return list(ROWS.values())
    for pattern in patterns:
        if not fnmatch.filter(ROWS, pattern):
            raise UserError(f"there is no row {pattern!r}; there are {', '.join(ROWS)}")
    return [row for name, row in ROWS.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
