"""Predictions as JSON lines, one an image, appended as they come: what a stopped run goes on from, and COCO json of it.

    {"file": "a.jpg", "width": 640, "height": 480, "detections": [
        {"bbox": [x, y, width, height], "score": 0.98, "category_id": 4, "category": "zebra"}, ...]}
    {"file": "broken.jpg", "error": "broken.jpg cannot be read as an image (...)"}

Boxes are in pixels of the upright image. A detection of a model with masks has "segmentation", COCO's compressed RLE;
of one with keypoints "keypoints", [x, y, score, x, y, score, ...]. Lines of frames have "video", "frame" and "time" in
seconds; those of images that an annotation file named, "image_id".
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import Instances

from fpn_d2.errors import UserError
from fpn_d2.files import UNFINISHED, writing

from .stream import Result


def line_of(result: Result, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> dict:
    """The line of one image, see above."""
    item = result.item
    line: dict = {"file": item.name}
    if item.image_id is not None:
        line["image_id"] = item.image_id
    if item.video is not None:
        line |= {"video": item.video.name, "frame": item.frame}
        if item.video.fps > 0:
            line["time"] = round(item.frame / item.video.fps, 3)
    if result.error is not None:
        return {**line, "error": result.error}
    height, width = result.instances.image_size
    found = detections_of(result.instances, class_names, category_ids)
    return {**line, "width": width, "height": height, "detections": found}


def detections_of(instances: Instances, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> list[dict]:
    """"detections" of a line, see above."""
    boxes = instances.pred_boxes.tensor.double().numpy()
    found = []
    for row, (box, score, label) in enumerate(
        zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist(), strict=True)
    ):
        x1, y1, x2, y2 = (round(float(v), 2) for v in box)
        one = {
            "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
            "score": round(score, 5),
            "category_id": category_ids[label],
            "category": class_names[label],
        }
        if instances.has("pred_masks"):
            rle = mask_util.encode(np.asfortranarray(instances.pred_masks[row].numpy().astype(np.uint8)))
            one["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        if instances.has("pred_keypoints"):
            one["keypoints"] = [round(float(v), 3) for v in instances.pred_keypoints[row].flatten().tolist()]
        found.append(one)
    return found


class JsonLines:
    """The file of lines: knows which images it holds, and takes more.

    An image costs 8 bytes of memory. Images with an error count as not done: they are tried again by the next run.
    """

    def __init__(self, path: str, redo: Callable[[str], bool] = lambda video: False):
        """
        Args:
            path: the file; made if it is not there. An unfinished last line, of a run that was killed, is cut off.
            redo: tells for a video at the end of the file whether it has to be begun again, since it was not finished
                and what is made of it cannot go on in the middle. Its lines are then cut off.

        Raises:
            UserError: the file holds something else.
        """
        self.path = path
        self._done, self.errors_before = _read(path, redo)
        self._file: IO = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __len__(self) -> int:
        """Images that the file held when it was opened."""
        return len(self._done)

    def holds(self, name: str) -> bool:
        """Whether there was a line, without an error, of this image when the file was opened."""
        code = _code(name)
        place = np.searchsorted(self._done, code)
        return bool(place < len(self._done) and self._done[place] == code)

    def write(self, line: dict) -> None:
        """Append a line; it is in the file when this returns.

        Raises:
            UserError: it cannot be written.
        """
        with writing(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: str) -> Iterator[dict]:
    """The lines of a file, one after the other."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _read(path: str, redo: Callable[[str], bool]) -> tuple[np.ndarray, int]:
    """Codes of the images that are done, sorted, and how many lines have errors; cuts off what has to be done again."""
    if not os.path.exists(path):
        return np.empty(0, np.uint64), 0
    codes, video, video_start, video_codes = _Codes(), None, 0, 0
    end = errors = 0
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
                name = line["file"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} holds something else than predictions: choose another --output") from None
            if line.get("video") != video:
                video, video_start, video_codes = line.get("video"), end, len(codes)
            end += len(raw)
            if "error" in line:
                errors += 1
            else:
                codes.append(_code(name))
    if video is not None and redo(video):
        end = video_start
        codes.cut(video_codes)
    os.truncate(path, end)
    return codes.sorted(), errors


class _Codes:
    """A growing array of 64-bit codes."""

    def __init__(self):
        self._values, self._count = np.empty(1024, np.uint64), 0

    def __len__(self) -> int:
        return self._count

    def append(self, value: np.uint64) -> None:
        if self._count == len(self._values):
            self._values = np.resize(self._values, 2 * self._count)
        self._values[self._count] = value
        self._count += 1

    def cut(self, count: int) -> None:
        self._count = count

    def sorted(self) -> np.ndarray:
        return np.unique(self._values[: self._count])


def _code(name: str) -> np.uint64:
    """64 bits of the name: two of a million names share them once in 37 million runs."""
    data = name.encode("utf-8", "surrogateescape")
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), np.uint64)[0]


def write_coco(lines: str, path: str, categories: list[dict]) -> None:
    """Make COCO json of a file of lines, piece by piece.

    Args:
        lines: the file of lines.
        path: the json: a whole data set, "images", "annotations" with "score", and "categories". Ids of images are
            those of the annotation file, where one named them, and else 1, 2, ...
        categories: of COCO json.
    """
    with writing(path), open(path + UNFINISHED, "w", encoding="utf-8") as file:
        file.write('{"info": {"description": "predictions of fpn_d2"},\n"images": [')
        for place, (image_id, line) in enumerate(_good(lines)):
            image = {"id": image_id, "file_name": line["file"], "width": line["width"], "height": line["height"]}
            file.write(("," if place else "") + "\n" + json.dumps(image))
        file.write('\n],\n"annotations": [')
        number = 0
        for image_id, line in _good(lines):
            for one in line["detections"]:
                number += 1
                width, height = one["bbox"][2:]
                area = float(mask_util.area(one["segmentation"])) if "segmentation" in one else width * height
                entry = {"id": number, "image_id": image_id, "category_id": one["category_id"], "bbox": one["bbox"]}
                entry |= {"area": round(area, 2), "iscrowd": 0, "score": one["score"]}
                entry |= {key: one[key] for key in ("segmentation", "keypoints") if key in one}
                file.write(("," if number > 1 else "") + "\n" + json.dumps(entry))
        file.write('\n],\n"categories": ' + json.dumps(categories) + "}\n")
    os.replace(path + UNFINISHED, path)


def _good(lines: str) -> Iterator[tuple[int | str, dict]]:
    number = 0
    for line in read_lines(lines):
        if "error" not in line:
            number += 1
            yield line.get("image_id", number), line
