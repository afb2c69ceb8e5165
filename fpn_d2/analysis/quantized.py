"""An exported detector in 8-bit integers: calibrated on a data set, and its AP beside that in float32 on another."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fpn_d2.errors import UserError
from fpn_d2.evaluation.coco_results import evaluate_predictions
from fpn_d2.inference import Predictor
from fpn_d2.inference.export import Exported, export_quantized
from fpn_d2.inference.export.engines import Engine, engine_of_compiled
from fpn_d2.inference.predict import category_ids_of
from fpn_d2.inference.sources import Item, annotated

DataSet = tuple[str, str]  # a COCO annotation file, and the folder of its images


@dataclass
class Quantized:
    """What came out.

    Attributes:
        exported: the file.
        images: how many it was calibrated on.
        before, after: AP in percent in float32 and in int8, both by OpenVINO; None: not asked for.
        kept: how many layers with weights are left in float32, and how many there are.
    """

    exported: Exported
    images: int
    before: float | None
    after: float | None
    kept: tuple[int, int]


def export_int8(
    predictor: Predictor,
    output: str,
    calibrate: DataSet,
    verify: DataSet | None = None,
    *,
    images: int = 300,
    max_drop: float = 0.3,
    progress: bool | None = None,
) -> Quantized:
    """Write a detector for OpenVINO in 8-bit integers.

    Args:
        predictor: see `export_detector`.
        output: folder to write to.
        calibrate: data set whose images are shown to NNCF; its boxes are not looked at.
        verify: data set to evaluate on; layers that cost more than ``max_drop`` are left in float32. None: neither.
        images: to calibrate with, at most, evenly drawn.
        max_drop: points of AP that int8 may be below float32 on ``verify``.
        progress: show a progress bar; None: where stderr is a terminal.

    Raises:
        UserError: a data set cannot be read or has no images, the model's classes are not in it, or NNCF or OpenVINO
            is not installed.
    """
    hidden = None if progress is None else not progress
    items = _images(calibrate)
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, min(images, len(items))).round().astype(int)]
    truth = None if verify is None else _Truth(predictor, verify)
    with tqdm(total=0, unit=" images", desc="quantising", disable=hidden) as bar:

        def inputs_of(item: Item) -> dict[str, np.ndarray]:
            bar.update()
            return network_input(predictor, item)

        def validate(compiled, some: Sequence[Item]) -> float:
            run = engine_of_compiled(compiled)

            def counted(batch: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
                bar.update()
                return run(batch, sizes)

            return truth.ap(counted, some)

        check = {} if truth is None else {"check_items": truth.items, "validate": validate, "max_drop": max_drop}
        exported, figures, kept = export_quantized(predictor, output, chosen, inputs_of, **check)
    return Quantized(exported, len(chosen), *figures, kept)


def network_input(predictor: Predictor, item: Item) -> dict[str, np.ndarray]:
    """An image as an exported detector takes it, at the network's size."""
    (view,) = predictor.prepare(item.image).views
    return {"images": view.tensor[None].numpy(), "image_sizes": np.array([view.tensor.shape[1:]], np.int64)}


class _Truth:
    """A data set to evaluate on, whole or some images of it."""

    def __init__(self, predictor: Predictor, data_set: DataSet):
        annotations, folder = data_set
        self.predictor = predictor
        self.items, categories = _images(data_set), annotated(annotations, folder)[1]
        self.truth = json.loads(Path(annotations).expanduser().read_text(encoding="utf-8-sig"))
        if not self.truth.get("annotations"):
            raise UserError(f"{annotations} has no annotations to evaluate against")
        self.ids = category_ids_of(predictor, categories, annotations)

    def ap(self, run: Engine, items: Sequence[Item]) -> float:
        """AP in percent of an engine on some of the images."""
        found = [one for item in items for one in self._results(run, item)]
        ids = {item.image_id for item in items}
        part = self.truth | {
            name: [one for one in self.truth[name] if one[key] in ids]
            for name, key in (("images", "id"), ("annotations", "image_id"))
        }
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("truth.json", "found.json")]
            for path, content in zip(paths, (part, found), strict=True):
                path.write_text(json.dumps(content))
            return evaluate_predictions(*map(str, paths))["AP"]

    def _results(self, run: Engine, item: Item) -> list[dict]:
        prepared = self.predictor.prepare(item.image)
        (view,) = prepared.views
        size = view.tensor.shape[1:]
        out = run(view.tensor[None].numpy(), np.array([size], np.int64))
        count = out["counts"][0]
        boxes = out["boxes"][0, :count] * np.tile(np.divide(prepared.size, size)[::-1], 2)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {"image_id": item.image_id, "bbox": box.tolist(), "score": float(score), "category_id": self.ids[number]}
            for box, score, number in zip(boxes, out["scores"][0], out["classes"][0], strict=False)
        ]


def _images(data_set: DataSet) -> list[Item]:
    items, _ = annotated(*data_set)
    if not items:
        raise UserError(f"{data_set[0]} names no images")
    for item in items:
        if not Path(item.image).is_file():
            raise UserError(f"there is no image {item.image}, which {data_set[0]} names")
    return items


def text(found: Quantized) -> str:
    """The outcome in a line or two."""
    kept, layers = found.kept
    lines = [f"calibrated on {found.images} images; {kept} of {layers} layers stay in float32"]
    if found.after is None:
        lines.append("its AP was not looked at: name a data set with --verify")
    else:
        lines.append(f"AP {found.before:.2f} in float32, {found.after:.2f} in int8 ({found.after - found.before:+.2f})")
    return "\n".join(lines)
