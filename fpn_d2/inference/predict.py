"""What ``fpn-d2 predict`` does: sources -> predictor -> JSON lines, COCO json, pictures."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from fpn_d2.errors import UserError
from fpn_d2.files import writable_folder, write_atomically

from .json_lines import JsonLines, line_of, write_coco
from .pictures import PictureWriter
from .predictor import Predictor
from .sources import Item, annotated, check, count, items
from .stream import Result, detect

LINES, COCO, PICTURES, SETTINGS = "predictions.jsonl", "predictions.json", "pictures", "settings.json"


@dataclass
class Summary:
    """What a run did.

    Attributes:
        images: predicted in this run.
        before: done by earlier runs and passed over.
        errors: images of this run that could not be read.
        stopped: whether it was interrupted.
        lines: the file of lines.
        coco: the COCO json; None if there is none.
    """

    images: int = 0
    before: int = 0
    errors: int = 0
    stopped: bool = False
    lines: str = ""
    coco: str | None = None


def predict(
    predictor: Predictor,
    sources: Sequence[str],
    output: str,
    *,
    annotations: str | None = None,
    coco: bool = True,
    pictures: bool = False,
    picture_score: float = 0.5,
    workers: int = 2,
    max_images: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Predict on images, folders, globs, lists, videos and cameras.

    Results are appended to ``predictions.jsonl`` as they come, so that the same call goes on where a stopped one was;
    the form of its lines is in `fpn_d2.inference.json_lines`. An image that cannot be read has a line with an "error",
    is told on stderr, and is tried again by the next call. Memory does not grow with the number of images, but for 8
    bytes for each that is done already.

    Args:
        predictor: the detector.
        sources: see `fpn_d2.inference.sources.items`; with ``annotations`` the folder of their images.
        output: the folder for all files; made if it is not there.
        annotations: COCO annotation file: its images are predicted on, and its ids stand in the results.
        coco: whether to write ``predictions.json`` at the end, a COCO data set whose annotations have scores.
        pictures: whether to write annotated images and videos into ``pictures``.
        picture_score: detections of at least this score are drawn.
        workers: threads that decode.
        max_images: stop after so many.
        overwrite: whether to begin anew, where the folder has results of other settings too.
        progress: whether to show a bar.

    Returns:
        What was done.

    Raises:
        UserError: a source is missing, or the folder holds results of other settings.
    """
    if workers < 0:
        raise UserError(f"{workers} workers were asked for; expected 0 or more")
    if annotations is None:
        check(sources)
        categories = [
            {"id": i, "name": name} for i, name in zip(predictor.category_ids, predictor.class_names, strict=True)
        ]
        ids = predictor.category_ids
        named = None
    else:
        if len(sources) != 1:
            raise UserError(f"with annotations the source is the folder of their images; got {len(sources)} sources")
        named, categories = annotated(annotations, sources[0])
        ids = category_ids_of(predictor, categories, annotations)
    writable_folder(output)
    path = os.path.join(output, LINES)
    _settle(predictor, annotations, output, overwrite)
    drawn = PictureWriter(os.path.join(output, PICTURES), predictor, picture_score) if pictures else None
    lines = JsonLines(path, redo=lambda video: drawn is not None and not drawn.has_video(video))
    summary = Summary(before=len(lines), lines=path)
    with contextlib.ExitStack() as stack:
        stack.callback(lines.close)
        if drawn is not None:
            stack.callback(drawn.give_up)
        total = len(named) if named is not None else count(sources)
        todo = items(sources, lines.holds) if named is None else (i for i in named if not lines.holds(i.name))
        bar = stack.enter_context(
            tqdm(
                total=total,
                initial=min(len(lines), total or 0),
                unit=" images",
                disable=not progress,
                dynamic_ncols=True,
            )
        )
        try:
            for result in _limited(predictor, todo, workers, max_images):
                if result.error is not None:
                    summary.errors += 1
                    bar.write(f"error: {result.error}", file=sys.stderr)
                elif drawn is not None:
                    drawn.write(result)
                lines.write(line_of(result, predictor.class_names, ids))
                summary.images += result.error is None
                bar.update()
            else:
                if drawn is not None and (max_images is None or summary.images + summary.errors < max_images):
                    drawn.finish_video()
        except KeyboardInterrupt:
            summary.stopped = True
    if coco and not summary.stopped:
        summary.coco = os.path.join(output, COCO)
        write_coco(path, summary.coco, categories)
    return summary


def _limited(predictor: Predictor, todo: Iterator[Item], workers: int, most: int | None) -> Iterator[Result]:
    results = detect(predictor, todo, workers)
    with contextlib.closing(results):
        for number, result in enumerate(results, start=1):
            yield result
            if number == most:
                return


def category_ids_of(predictor: Predictor, categories: list[dict], annotations: str) -> tuple[int, ...]:
    """The category ids of an annotation file in the order of the model's classes, matched by name.

    Raises:
        UserError: the file does not have the model's classes.
    """
    by_name = {one["name"]: one["id"] for one in categories}
    missing = [name for name in predictor.class_names if name not in by_name]
    if not missing:
        return tuple(by_name[name] for name in predictor.class_names)
    nameless = all(name.isdigit() for name in predictor.class_names)
    if nameless and len(categories) == len(predictor.class_names):
        return tuple(sorted(one["id"] for one in categories))  # as Detectron2 numbers classes
    raise UserError(
        f"the model's classes {', '.join(missing[:5])} are not among the categories of {annotations} "
        f"({', '.join(list(by_name)[:10])}): name the classes as the file does (--classes)"
    )


def _settle(predictor: Predictor, annotations: str | None, output: str, overwrite: bool) -> None:
    """See to it that all lines of the file come from the same model and settings."""
    weights = os.path.abspath(predictor.cfg.MODEL.WEIGHTS)
    size = os.path.getsize(weights) if os.path.isfile(weights) else None
    settings = {
        "weights": weights,
        "bytes": size,
        "classes": list(predictor.class_names),
        "min_score": predictor.min_score,
        "tiling": None if predictor.tiling is None else dataclasses.asdict(predictor.tiling),
        "resize": [predictor.cfg.INPUT.MIN_SIZE_TEST, predictor.cfg.INPUT.MAX_SIZE_TEST],
        "annotations": None if annotations is None else os.path.abspath(annotations),
    }
    lines, file = os.path.join(output, LINES), os.path.join(output, SETTINGS)
    if overwrite and os.path.exists(lines):
        os.remove(lines)
    if os.path.exists(lines) and os.path.getsize(lines):
        before = _read_settings(file)
        different = [key for key in settings if before.get(key) != settings[key]]
        if different:
            raise UserError(
                f"{output} holds predictions of other settings ("
                + ", ".join(f"{key} {before.get(key)!r} there, {settings[key]!r} now" for key in different)
                + "): choose another --output, or begin anew with --overwrite"
            )
    write_atomically(file, json.dumps(settings, indent=2) + "\n")


def _read_settings(file: str) -> dict:
    try:
        with open(file, encoding="utf-8") as f:
            settings = json.load(f)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
