"""What an image file holds, from its header or, on request, from every pixel: before anything trains on it."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import stat
import struct
import warnings
from collections.abc import Iterable, Iterator

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fpn_d2.errors import shown, shown_value

from .image_loading import EIGHT_BIT_MODES, read_image, reads_as_16_bits

_EXIF_ORIENTATION = 0x0112
_EXIF_QUARTER_TURNS = (5, 6, 7, 8)
# Pixel modes of Pillow's that say more than grey or colour; see `image_loading.eight_bits` for what becomes of them.
_UNUSUAL_MODES = {
    "CMYK": ("pixels_cmyk", "CMYK pixels, converted to RGB without a colour profile"),
    "P": ("pixels_palette", "pixels from a palette, converted to RGB"),
    "PA": ("pixels_palette", "pixels from a palette with alpha, converted to RGB; alpha is dropped"),
    "LA": ("pixels_alpha", "grey pixels with alpha, which is dropped"),
    "La": ("pixels_alpha", "grey pixels with alpha, which is dropped"),
    "RGBA": ("pixels_alpha", "pixels with alpha, which is dropped: what is transparent shows its hidden colour"),
    "RGBa": ("pixels_alpha", "pixels with alpha, which is dropped: what is transparent shows its hidden colour"),
}
_USUAL_MODES = ("L", "RGB", "YCbCr", "1")
_TINY = 8  # pixels; a shorter longest side is named
_FLAT = 20  # ratio of the sides from which on an image is named
_TASK = 32  # files that one thread looks at in one go
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")


@dataclasses.dataclass(slots=True)
class ImageFacts:
    """What is known of one file. Sizes are in pixels, 0 where the file cannot be used."""

    width: int = 0  # upright, as the model is going to see it
    height: int = 0
    turned: bool = False  # whether EXIF swaps the sides
    findings: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # kinds of `defects.KINDS`, messages

    @property
    def usable(self) -> bool:
        return self.width > 0


def look_at_all(paths: Iterable[str], count: int, *, full: bool = False, jobs: int = 0) -> Iterator[ImageFacts]:
    """Look at many files, in several threads, with a progress bar where it takes longer than a second or two.

    Args:
        paths: The files.
        count: How many, for the bar.
        full: Whether to decode every pixel.
        jobs: Number of threads; 0: four times the number of processors, at most 32, as most of the time is waiting.

    Yields:
        What `look_at` finds, in the order of ``paths``.
    """
    jobs = jobs or min(32, 4 * (os.cpu_count() or 1))
    paths = iter(paths)
    tasks = iter(lambda: list(itertools.islice(paths, _TASK)), [])
    waiting: collections.deque = collections.deque()
    bar = tqdm(total=count, unit="img", desc="Checking images", disable=None, delay=1.5, leave=False)
    with bar, warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of large images and broken EXIF blocks
        for task in tasks:
            waiting.append(pool.submit(_look_at_some, task, full))
            if len(waiting) > 2 * jobs:
                facts = waiting.popleft().result()
                bar.update(len(facts))
                yield from facts
        while waiting:
            facts = waiting.popleft().result()
            bar.update(len(facts))
            yield from facts


def _look_at_some(paths: list[str], full: bool) -> list[ImageFacts]:
    return [look_at(path, full=full) for path in paths]


def look_at(path: str, *, full: bool = False) -> ImageFacts:
    """Look at one file; whatever it is, the answer says so and nothing is raised.

    Without ``full`` the header is read, and of JPEG, PNG, BMP and WebP the structure, which shows whether the file
    goes to its end; only what looks odd there is decoded.
    """
    facts = ImageFacts()
    problem = file_problem(path)
    if problem:
        facts.findings.append(problem)
        return facts
    try:
        with Image.open(path) as image:
            problem = _fill(facts, image, path, full)
    except Image.DecompressionBombError as error:
        problem = ("image_too_large", shown(str(error), 120))
    except Exception as error:  # Pillow raises almost anything on what is broken
        problem = _unopened(path, error)
    if problem:
        facts.width = facts.height = 0
        facts.findings.append(problem)
    return facts


def file_problem(path: str) -> tuple[str, str] | None:
    """Kind and message of what keeps a file from being read at all, without opening it: a pipe would block."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "file_missing", f"{shown(path)} does not exist"
    except ValueError:
        return "file_name_wrong", f"{shown(path)} is no name of a file"
    except OSError as error:
        return "file_unreadable", f"{shown(path)}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "file_not_regular", f"{shown(path)} is no regular file"
    if not status.st_size:
        return "file_empty", f"{shown(path)} is empty"
    if not os.access(path, os.R_OK):
        return "file_unreadable", f"{shown(path)}: no permission to read it"
    return None


def name_problem(name: object, folder: str | os.PathLike | None) -> tuple[str, str] | None:
    """Kind and message of what keeps an annotation file's ``file_name`` from being looked for.

    Args:
        name: What the file says.
        folder: The image folder, which the name must not lead out of; None: it may.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return "file_name_wrong", f"expected text as file_name, got {shown_value(name)}"
    if folder is not None:
        folder = os.path.abspath(folder)
        if not os.path.abspath(os.path.join(folder, name)).startswith(os.path.join(folder, "")):
            return "file_outside_folder", f"{shown(name)} lies outside {shown(folder, 200)}"
    return None


def _fill(facts: ImageFacts, image: Image.Image, path: str, full: bool) -> tuple[str, str] | None:
    """Write what the opened image says into ``facts``; the problem that rules it out, if there is one."""
    name, mode = shown(path), image.mode
    facts.width, facts.height = image.size
    whole, exif_inside = _structure(path, image.format)
    decode = full or not whole
    if reads_as_16_bits(image):
        facts.findings.append(("pixels_16_bit", f"{name}: 16-bit pixels, scaled to 8 bits"))
    elif mode == "F":
        facts.findings.append(("pixels_float", f"{name}: floating-point pixels, scaled to 8 bits"))
        decode = True  # the values decide whether there is a right way
    elif mode not in EIGHT_BIT_MODES:
        return "pixels_refused", f"{name}: pixels of the kind {mode!r} have no right reading as 8 bits"
    elif mode in _UNUSUAL_MODES:
        kind, words = _UNUSUAL_MODES[mode]
        facts.findings.append((kind, f"{name}: {words}"))
    elif mode not in _USUAL_MODES:
        facts.findings.append(("pixels_unusual", f"{name}: pixels of the kind {mode}, converted to RGB"))
    if exif_inside and _orientation(image) not in (None, 0, 1):
        facts.turned = _orientation(image) in _EXIF_QUARTER_TURNS
        facts.findings.append(("exif_turned", f"{name}: its EXIF data turn or mirror it, which is done on reading"))
        if facts.turned:
            facts.width, facts.height = facts.height, facts.width
    if getattr(image, "is_animated", False):
        facts.findings.append(("several_frames", f"{name}: the first of several pictures is used"))
    small, large = sorted(image.size)
    size = f"{name} is {facts.width} x {facts.height}"
    if large < _TINY:
        facts.findings.append(("image_tiny", size))
    elif large >= _FLAT * small:
        facts.findings.append(("image_flat", size))
    return _decoded(path, name) if decode else None


def _decoded(path: str, name: str) -> tuple[str, str] | None:
    """Decode it as for training; what is wrong with it."""
    try:
        read_image(path, "BGR")
    except ValueError as error:
        return "pixels_refused", f"{name}: {shown(str(error), 160)}"
    except Exception as error:  # Pillow raises almost anything on what is broken
        return "file_truncated", f"{name} cannot be decoded: {shown(str(error), 120)}"
    return None


def _unopened(path: str, error: Exception) -> tuple[str, str]:
    with open(path, "rb") as file:
        start = file.read(12)
    if start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"GIF8", b"II*\0", b"MM\0*")) or start[8:] == b"WEBP":
        return "file_truncated", f"{shown(path)} starts as an image and cannot be decoded: {shown(str(error), 120)}"
    if isinstance(error, UnidentifiedImageError):
        return "not_an_image", f"{shown(path)} is of no kind of image that can be read"
    return "not_an_image", f"{shown(path)} cannot be read as an image: {shown(str(error), 120)}"


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Detectron2 passes over a broken EXIF block too
        return None


def _structure(path: str, kind: str | None) -> tuple[bool, bool]:
    """Whether the file goes to its end, and whether there may be EXIF data in it, without decoding any pixel.

    (False, ...) also where that cannot be told so.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if kind in ("JPEG", "MPO"):
            file.seek(-2, os.SEEK_END)
            return file.read(2) == b"\xff\xd9", True
        if kind == "PNG":
            return _png_structure(file, size)
        if kind == "WEBP":
            return struct.unpack("<4xI", file.read(8))[0] + 8 <= size, True
        if kind == "BMP":
            return struct.unpack("<2xI", file.read(6))[0] <= size, False
    return True, True


def _png_structure(file: object, size: int) -> tuple[bool, bool]:
    """Walks over the chunks. Pillow decodes all pixels to find EXIF data behind them: it is asked only if need be."""
    place, exif, pixels = 8, False, False
    while place + 12 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += length + 12
        if kind == b"IEND":
            return place <= size, exif
        pixels |= kind == b"IDAT"
        exif |= kind == b"eXIf" or kind in _PNG_TEXT
    return False, exif
