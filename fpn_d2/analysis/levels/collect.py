"""Objects, proposals and detections of a data set, from a model that runs over it."""

import os
import tempfile

import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from fpn_d2.analysis.errors.detections import Objects, Scored, read, take
from fpn_d2.inference import Predictor
from fpn_d2.inference.json_lines import JsonLines, line_of
from fpn_d2.inference.predict import category_ids_of
from fpn_d2.inference.sources import annotated
from fpn_d2.inference.stream import Result


class ProposalRecorder:
    """Within this context, keeps what the RPN of a model gave for the last batch."""

    def __init__(self, predictor: Predictor):
        self._rpn = getattr(predictor.model, "proposal_generator", None)
        self.last: list[Instances] = []

    def __enter__(self) -> "ProposalRecorder":
        self._handle = None if self._rpn is None else self._rpn.register_forward_hook(self._keep)
        return self

    def __exit__(self, *exception) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _keep(self, module, args, output) -> None:
        self.last = output[0]


def collect(
    predictor: Predictor, annotations: str, images: str, most: int | None = None, progress: bool = True
) -> tuple[Scored, Objects | None]:
    """Run a model over a data set.

    Args:
        predictor: the model; images are shown whole and one by one.
        annotations: COCO json.
        images: folder of its images.
        most: of the images, so many, spread evenly; None: all. The others count as if they were not there.
        progress: whether to show a bar.

    Returns:
        The data set with the detections, and the proposals as objects of class 0; None for a model without an RPN.
    """
    named, categories = annotated(annotations, images)
    ids = category_ids_of(predictor, categories, annotations)
    if most is not None and most < len(named):
        named = [named[i] for i in np.linspace(0, len(named) - 1, most).round().astype(int)]
    order = {item.image_id: number for number, item in enumerate(named)}
    with tempfile.TemporaryDirectory() as folder, ProposalRecorder(predictor) as recorder:
        path = os.path.join(folder, "lines.jsonl")
        lines, kept = JsonLines(path), []
        for number, item in enumerate(tqdm(named, unit=" images", disable=not progress, dynamic_ncols=True)):
            prepared = predictor.prepare(item.image)
            (instances,) = predictor.detect([prepared])
            lines.write(line_of(Result(item, instances), predictor.class_names, ids))
            if recorder.last:
                kept.append(_in_image(recorder.last[0], prepared.size, number))
        lines.close()
        scored = read(annotations, path)
    return _only(scored, named, annotations, order), _stacked(kept) if kept else None


def _in_image(proposals: Instances, size: tuple[int, int], number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image number, boxes in pixels of the image of ``size``, and scores."""
    height, width = proposals.image_size
    box = proposals.proposal_boxes.tensor.float().cpu().numpy().astype(float)
    box *= np.array([size[1] / width, size[0] / height] * 2)
    return np.full(len(box), number), box, proposals.objectness_logits.float().cpu().numpy().astype(float)


def _stacked(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Objects:
    image, box, score = (np.concatenate(part) for part in zip(*parts, strict=True))
    objects = Objects(image, np.zeros(len(image), np.int64), box, score, np.zeros(len(image), bool))
    return take(objects, np.lexsort((-score, image)))


def _only(scored: Scored, named: list, annotations: str, order: dict) -> Scored:
    """The data set cut down to the images that were shown, in their order."""
    all_items, _ = annotated(annotations, ".")
    number = np.array([order.get(item.image_id, -1) for item in all_items], np.int64)

    def cut(objects: Objects) -> Objects:
        kept = take(objects, number[objects.image] >= 0)
        kept.image = number[kept.image]
        return take(kept, np.lexsort((-kept.score, kept.image)))

    places = np.argsort(np.where(number < 0, len(number), number), kind="stable")[: len(named)]
    return Scored(
        [scored.files[place] for place in places],
        scored.sizes[places],
        scored.class_names,
        cut(scored.truth),
        cut(scored.found),
    )
