"""Image files to arrays and arrays to tensors: the bits of Detectron2's ``DatasetMapper``, sooner.

A JPEG is decoded by OpenCV, straight into an array of BGR; Pillow, which Detectron2 reads with, goes through an image
object of its own. Both call the same JPEG library, if not always the same build of it, so that OpenCV decodes only
what is known to come out alike: complete files of a usual kind, if both give the same bits for a trial image of that
kind on this machine. All else, broken files among it, is read as Detectron2's own ``read_image`` does it, but for two
things: pixels of more than 8 bits, of which Pillow's conversion makes white or black, and broken PNG files.
"""

import functools
import io
import re

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, JpegImagePlugin

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# What ends the compressed data of a scan: a marker, but for the restart markers that are part of it.
_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_EXIF_ORIENTATION = 0x0112
# What each value of the EXIF tag asks for; 1, the upright image, and unknown values ask for nothing.
_TURNS = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.flip(pixels, -1),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.flip(cv2.transpose(pixels), -1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
# Modes of Pillow's whose values have 8 bits or fewer.
EIGHT_BIT_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "La")


def read_image(file_name: str, image_format: str, *, by_pillow: bool = False) -> np.ndarray:
    """Read an image file as Detectron2's ``read_image`` does, bit for bit; pixels of more than 8 bits are scaled.

    Args:
        file_name: A path, or whatever else Detectron2's ``PathManager`` opens.
        image_format: ``INPUT.FORMAT``. JPEG files are read faster as "BGR" and "RGB".
        by_pillow: Whether to leave JPEG files to Pillow too.

    Returns:
        Array of shape (height, width, channels), turned upright by its EXIF tag. It may be a view with strides < 0.

    Raises:
        ValueError: Its pixels have no right reading as 8 bits; see `eight_bits`.
        OSError: It cannot be read.
    """
    if image_format in ("BGR", "RGB") and not by_pillow:
        with PathManager.open(file_name, "rb") as file:
            start = file.read(len(_JPEG_START))
            data = start + file.read() if start == _JPEG_START else b""
        pixels = _read_jpeg(data) if data else None
        if pixels is not None:
            return pixels if image_format == "BGR" else pixels[:, :, ::-1]
    return read_with_pillow(file_name, image_format)


def read_with_pillow(file_name: str, image_format: str) -> np.ndarray:
    """`read_image` without OpenCV: the steps of Detectron2's, with the scaling in between."""
    with PathManager.open(file_name, "rb") as file:
        image = Image.open(file)
        # Before anything asks for EXIF data: for PNG files that decodes, and Detectron2, which passes over its errors,
        # then takes the black image that is left of a broken file for the picture.
        image.load()
        if image.mode not in EIGHT_BIT_MODES:
            image = eight_bits(image)
        return convert_PIL_to_numpy(_apply_exif_orientation(image), image_format)


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits in 8 bits, the whole range of its kind to 0 to 255, whatever the picture holds.

    16 bits are divided by 257. Floating point is taken for 0 to 1 if nothing is above 1, and for 0 to 255 otherwise.

    Args:
        image: Of a mode that is not in `EIGHT_BIT_MODES`.

    Returns:
        An image of mode "L", with the EXIF data of the other.

    Raises:
        ValueError: It is of another kind (32-bit whole numbers have no range that pictures use), or floating point
            outside of both ranges.
    """
    if reads_as_16_bits(image):
        pixels = (np.asarray(image).astype(np.uint32) + 128) // 257
    elif image.mode == "F":
        pixels = np.asarray(image)
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 255):  # NaN is neither
            raise ValueError(
                f"its floating-point pixels go from {low:g} to {high:g}, not from 0 to 1 or to 255: save it with 8 bits"
            )
        pixels = np.rint(pixels * (255 if high <= 1 else 1))
    else:
        raise ValueError(f"its pixels of the kind {image.mode!r} have no right reading as 8 bits: save it with 8 bits")
    grey = Image.fromarray(pixels.astype(np.uint8))
    grey.getexif().update(image.getexif())
    return grey


def reads_as_16_bits(image: Image.Image) -> bool:
    """Whether its pixels go from 0 to 65535. Some versions of Pillow keep such PNG and PGM files as 32-bit numbers."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def to_chw(image: np.ndarray) -> torch.Tensor:
    """An image of shape (height, width, channels) as a contiguous tensor (channels, height, width).

    Faster for three channels of uint8, a view mirrored from left to right or with its channels in reverse included.
    An image that lies so in memory already shares it with the tensor.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0 or abs(image.strides[2]) != 1:
        return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    turn, step = (-1 if image.strides[1] < 0 else 1), channel_step(image)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    written = cv2.split(np.ascontiguousarray(image[:, ::turn, ::step]), list(planes[::step]))
    if not all(map(np.may_share_memory, written, planes[::step])):  # OpenCV made arrays of its own
        planes[::step] = written
    if turn < 0:
        for plane in planes:
            cv2.flip(plane, 1, dst=plane)
    return torch.from_numpy(planes)


def channel_step(image: np.ndarray) -> int:
    """-1 if the channels lie in memory in reverse, as in a view of BGR as RGB; else 1."""
    return -1 if image.strides[2] < 0 else 1


def _read_jpeg(data: bytes) -> np.ndarray | None:
    """BGR pixels of a JPEG file's content; None if Pillow has to say what they are, or what is wrong."""
    try:
        with Image.open(io.BytesIO(data)) as header:  # reads up to the first scan: decodes nothing
            size, mode, sampling = header.size, header.mode, JpegImagePlugin.get_sampling(header)
            usual = mode == "L" or (mode == "RGB" and sampling >= 0)
            orientation = _orientation(header)
    except Exception:  # on a broken file almost anything; Detectron2 is going to read it again, and to raise it
        return None
    if not usual or not _is_whole(data) or not _decoders_agree(mode, sampling):
        return None
    pixels = _decode(data)
    if pixels is None or pixels.shape != (size[1], size[0], 3):
        return None
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels


def _is_whole(data: bytes) -> bool:
    """Whether segment follows segment until an end marker at the end: OpenCV makes up the rest where Pillow raises."""
    place = len(_JPEG_START)
    while data[place : place + 1] == b"\xff" and data[place : place + 2] != _JPEG_END:
        scan = data[place : place + 2] == _JPEG_SCAN
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if scan:
            found = _BEHIND_SCAN.search(data, place)
            place = found.start() if found else len(data)
    return data[place:] == _JPEG_END


def _orientation(header: Image.Image) -> int | None:
    try:
        return header.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # Detectron2 passes over a broken EXIF block too
        return None


def _decode(data: bytes) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


@functools.lru_cache
def _decoders_agree(mode: str, sampling: int) -> bool:
    """Whether OpenCV and Pillow decode a JPEG of this kind to the same bits.

    They do with libjpeg-turbo behind both. Another library fills in chroma otherwise, by many grey levels at edges.

    Args:
        mode: "L" or "RGB".
        sampling: Of chroma, as Pillow numbers it (0: 4:4:4, 1: 4:2:2, 2: 4:2:0); without meaning for "L".
    """
    coarse = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    trial = Image.fromarray(coarse).resize((77, 61), Image.BICUBIC).convert(mode)
    file = io.BytesIO()
    trial.save(file, "JPEG", quality=90, **({"subsampling": sampling} if mode == "RGB" else {}))
    decoded = _decode(file.getvalue())
    return decoded is not None and np.array_equal(decoded, convert_PIL_to_numpy(Image.open(file), "BGR"))
