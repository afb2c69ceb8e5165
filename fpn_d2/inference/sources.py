"""Where images come from: files, folders, globs, lists, annotation files, videos, cameras; one after the other."""

import codecs
import functools
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from fpn_d2.data.image_files import name_problem
from fpn_d2.data.json_stream import read_records
from fpn_d2.errors import UserError, not_found, shown

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
LIST_ENDING = ".txt"
CAMERA = "camera:"
# Entries of one folder that are put in order; those of a larger one come as the file system has them, so that memory
# does not grow with it.
_SORTED = 100_000


@dataclass(frozen=True)
class Video:
    """The video or camera that a frame is of.

    Attributes:
        name: its path, or "camera:N".
        fps: frames per second; 0.0 if it does not say.
        live: whether it is a camera.
    """

    name: str
    fps: float
    live: bool = False


@dataclass(frozen=True)
class Item:
    """One image to come.

    Attributes:
        name: what it is called in the results: its path, for frames with ``#`` and their number from 0.
        image: its path, or the pixels of a frame: uint8, (H, W, 3), BGR.
        image_id: in the annotations that named it.
        video: for frames.
        frame: number of the frame, from 0.
        error: why there is no image.
    """

    name: str
    image: str | np.ndarray | None = None
    image_id: int | str | None = None
    video: Video | None = None
    frame: int | None = None
    error: str | None = None


def items(sources: Iterable[str], skip: Callable[[str], bool] = lambda name: False) -> Iterator[Item]:
    """The images of all sources, in order.

    Args:
        sources: each a file, a folder (with the folders in it; images and videos), a glob with ``*``, ``?`` or ``[``, a
            ``.txt`` file with one source a line, a video, or "camera:0".
        skip: tells for a name whether it is done already; a frame that is done is not decoded.

    Yields:
        The images that are to be done. A source that is not there, or an unreadable video, is an `Item` with an error.
    """
    for source in sources:
        for name in expand(source):
            if name.startswith(CAMERA) or name.lower().endswith(VIDEO_ENDINGS):
                yield from frames(name, skip)
            elif not skip(name):
                yield Item(name, image=name)


def expand(source: str) -> Iterator[str]:
    """The images and videos that one source stands for: paths, and "camera:N" as it is."""
    if source.startswith(CAMERA):
        yield source
        return
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        yield from _folder(path)
    elif os.path.isfile(path):
        yield from _list(path) if path.lower().endswith(LIST_ENDING) else [path]
    elif glob.has_magic(path):
        found = False
        for match in _in_order(glob.iglob(path, recursive=True)):
            if os.path.isdir(match):
                continue
            found = True
            yield match
        if not found:
            yield path  # said to be missing when it is read
    else:
        yield path


def check(sources: Iterable[str]) -> None:
    """Find what is wrong with the sources themselves before anything is loaded.

    Raises:
        UserError: one is no file, folder, glob that matches or camera.
    """
    sources = list(sources)
    if not sources:
        raise UserError("there is nothing to predict on: name images, folders, globs, lists, videos or camera:0")
    for source in sources:
        path = os.path.expanduser(source)
        if source.startswith(CAMERA):
            if not source.removeprefix(CAMERA).isdigit():
                raise UserError(f"{source} is no camera; write camera:0 for the first")
        elif not os.path.exists(path):
            if not glob.has_magic(path):
                raise UserError(f"no image, folder or video {source}: {not_found(path)}")
            if next(glob.iglob(path, recursive=True), None) is None:
                raise UserError(f"nothing matches {source}, looked for in {os.getcwd()}")


def count(sources: Iterable[str]) -> int | None:
    """How many images the sources hold, without a list of them; None where that cannot be known."""
    total = 0
    for source in sources:
        for name in expand(source):
            if name.startswith(CAMERA):
                return None
            if not name.lower().endswith(VIDEO_ENDINGS):
                total += 1
                continue
            capture = cv2.VideoCapture(name)
            frames_said = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            capture.release()
            total += max(frames_said, 0)
    return total


def annotated(annotations: str, folder: str) -> tuple[list[Item], list[dict]]:
    """The images that a COCO annotation file names, with their ids.

    Args:
        annotations: a json file with "images" and "categories".
        folder: where its ``file_name`` begin.

    Returns:
        The images, and the categories.

    Raises:
        UserError: the file is missing or of another kind.
    """
    path = os.path.expanduser(annotations)
    if not os.path.isfile(path):
        raise UserError(f"no annotations {annotations}: {not_found(path)}")
    if not os.path.isdir(os.path.expanduser(folder)):
        raise UserError(f"with annotations the source is the folder of their images; there is no folder {folder}")
    try:
        images, categories = [], []
        for key, index, value in read_records(path):
            if key == "images" and index is not None:
                images.append(_annotated(value, os.path.expanduser(folder)))
            elif key == "categories" and index is not None:
                categories.append({"id": value["id"], "name": str(value["name"])})
    except (ValueError, KeyError, TypeError) as error:
        said = shown(str(error), 200)
        raise UserError(f"{annotations} is no COCO json with images and categories ({said})") from None
    if not images or not categories:
        raise UserError(f"{annotations} is no COCO json with images and categories")
    return images, categories


def _annotated(record: dict, folder: str) -> Item:
    problem = name_problem(record["file_name"], folder)
    if problem:
        return Item(shown(str(record["file_name"]), 300), image_id=record["id"], error=problem[1])
    name = os.path.join(folder, record["file_name"])
    return Item(name, image=name, image_id=record["id"])


def frames(name: str, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Item]:
    """The frames of a video file or a camera; one `Item` with an error if it cannot be opened."""
    live = name.startswith(CAMERA)
    if not live and not os.path.isfile(name):
        yield Item(name, error=f"there is no video {name}")
        return
    capture = cv2.VideoCapture(int(name.removeprefix(CAMERA)) if live else name)
    try:
        if not capture.isOpened():
            yield Item(name, error="no camera with this number can be opened" if live else "cannot be read as a video")
            return
        video = Video(name, max(float(capture.get(cv2.CAP_PROP_FPS)), 0.0), live)
        number = 0
        for number in itertools.count():
            if not capture.grab():
                break
            frame_name = f"{name}#{number}"
            if skip(frame_name):
                continue
            there, pixels = capture.retrieve()
            if there:
                yield Item(frame_name, image=pixels, video=video, frame=number)
            else:
                yield Item(frame_name, video=video, frame=number, error="the frame cannot be decoded")
        if number == 0:
            yield Item(name, error="the camera gives no images" if live else "the video has no frames")
    finally:
        capture.release()


def _folder(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    for name in _in_order(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _folder(path, (*above, real))
        elif name.lower().endswith(_image_endings() + VIDEO_ENDINGS):
            yield path


def _in_order(names: Iterator[str]) -> Iterator[str]:
    first = list(itertools.islice(names, _SORTED + 1))
    if len(first) <= _SORTED:
        first.sort()
    yield from first
    yield from names


def _list(path: str) -> Iterator[str]:
    """The sources in a file, one a line; a relative path counts from here, or else from the folder of the list."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            text = line.removeprefix(codecs.BOM_UTF8 if number == 0 else b"").decode("utf-8", "surrogateescape").strip()
            if not text or text.startswith("#"):
                continue
            beside = os.path.join(os.path.dirname(path), os.path.expanduser(text))
            named = text if text.startswith(CAMERA) or os.path.exists(os.path.expanduser(text)) else beside
            if os.path.isfile(named) and named.lower().endswith(LIST_ENDING):
                continue  # a list in a list could hold itself
            yield from expand(named if os.path.exists(named) or text.startswith(CAMERA) else text)


@functools.lru_cache
def _image_endings() -> tuple[str, ...]:
    """Endings of the image files that Pillow reads."""
    others = ("PDF", "EPS", "MPEG")  # nobody keeps photographs in those
    known = Image.registered_extensions()
    return tuple(sorted(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in others))

