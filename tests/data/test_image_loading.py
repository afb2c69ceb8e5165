"""Against Detectron2's own ``read_image``: the same bits of whatever file, and the same error."""

import io

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpn_d2.data import image_loading
from fpn_d2.data.image_loading import read_image, to_chw


def picture(width=37, height=29, seed=0) -> Image.Image:
    """A smooth picture with edges and some noise; no two of its turned or mirrored versions are equal."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(int)
    smooth[height // 3 :, width // 2 :] = 255 - smooth[height // 3 :, width // 2 :]
    return Image.fromarray(np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def outcome(read, path, image_format):
    """The pixels, or the error's type."""
    try:
        return read(str(path), image_format)
    except Exception as error:
        return type(error)


def check(path, image_format="BGR"):
    ours, theirs = outcome(read_image, path, image_format), outcome(detection_utils.read_image, path, image_format)
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    return ours


@pytest.fixture
def without_pillow(monkeypatch):
    """Fails where the file goes to Pillow after all."""

    def refuse(*_, **__):
        raise AssertionError("not read by OpenCV")

    monkeypatch.setattr(image_loading, "read_with_pillow", refuse)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"optimize": True}]
)
def test_usual_jpegs_are_read_by_opencv_to_the_same_bits(tmp_path, without_pillow, image_format, mode, options):
    (tmp_path / "a.jpg").write_bytes(encoded(picture().convert(mode), **options))
    check(tmp_path / "a.jpg", image_format)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_jpegs_of_any_size(tmp_path_factory, width, height, quality, subsampling, seed):
    path = tmp_path_factory.getbasetemp() / "any.jpg"
    path.write_bytes(encoded(picture(width, height, seed), quality=quality, subsampling=subsampling))
    check(path)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, without_pillow, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), exif=exif))
    assert check(tmp_path / "a.jpg").shape == ((37, 29, 3) if 5 <= orientation <= 8 else (29, 37, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif(tmp_path, without_pillow):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"))
    check(tmp_path / "a.jpg")


RARE = {
    "cmyk": lambda: encoded(picture().convert("CMYK")),
    "rgb_inside": lambda: encoded(picture(), keep_rgb=True),
    "bytes_behind": lambda: encoded(picture()) + b"\0\0",
    "png": lambda: encoded(picture(), "PNG"),
    "png_alpha": lambda: encoded(picture().convert("RGBA"), "PNG"),
    "png_palette": lambda: encoded(picture().convert("P"), "PNG"),
    "png_grey_alpha": lambda: encoded(picture().convert("LA"), "PNG"),
    "bmp": lambda: encoded(picture(), "BMP"),
    "two_pictures": lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    "sampling_440": lambda: cv2.imencode(
        ".jpg", np.asarray(picture()), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440]
    )[1].tobytes(),
    "empty": lambda: b"",
    "two_bytes": lambda: b"\xff\xd8",
    "start_and_end": lambda: b"\xff\xd8\xff\xd9",
    "text": lambda: b"no image",
}


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize("kind", RARE)
def test_rare_and_broken_files_as_detectron2_reads_them(tmp_path, kind, image_format):
    (tmp_path / "a").write_bytes(RARE[kind]())
    check(tmp_path / "a", image_format)


DEEP = np.arange(900, dtype=np.uint16).reshape(30, 30) * 70


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        (DEEP, "PNG", DEEP / 257),
        (DEEP, "TIFF", DEEP / 257),
        (DEEP, "PPM", DEEP / 257),
        ((DEEP / 65535).astype(np.float32), "TIFF", DEEP / 257),
        ((DEEP / 257).astype(np.float32), "TIFF", DEEP / 257),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled(tmp_path, image_format, pixels, kind, expected):
    """Detectron2 gives white for all of them but the last, and black for the one before."""
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(pixels), kind))
    ours = read_image(tmp_path / "a", image_format)
    assert ours.dtype == np.uint8 and ours.shape == (30, 30, 1 if image_format == "L" else 3)
    assert np.abs(ours.astype(float) - expected[:, :, None]).max() <= 0.5 + 1e-3
    assert len(np.unique(ours)) > 200


def test_turned_pixels_of_more_than_8_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(DEEP[:20]), "PNG", exif=exif))
    assert read_image(tmp_path / "a", "BGR").shape == (30, 20, 3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 5), 70_000, np.int32), "kind 'I' have no right reading"),
        (np.full((4, 5), -1.0, np.float32), "from -1 to -1, not from 0"),
        (np.full((4, 5), 1e6, np.float32), "to 1e"),
        (np.full((4, 5), np.nan, np.float32), "nan"),
    ],
)
def test_pixels_without_a_right_reading_are_refused(tmp_path, pixels, message):
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "a", "BGR")


def test_broken_png_is_no_black_image(tmp_path):
    data = bytearray(encoded(picture(), "PNG"))
    start = data.index(b"IDAT") + 4
    data[start : start + 40] = bytes(40)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(OSError):
        read_image(tmp_path / "a.png", "BGR")


def test_chroma_that_the_trial_images_do_not_cover_is_left_to_pillow(tmp_path, without_pillow):
    (tmp_path / "a.jpg").write_bytes(RARE["sampling_440"]())
    with pytest.raises(AssertionError, match="not read by OpenCV"):
        read_image(tmp_path / "a.jpg", "BGR")


def test_missing_file(tmp_path):
    assert check(tmp_path / "a.jpg") is FileNotFoundError


@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_cut_short_anywhere_raise(tmp_path, progressive):
    """OpenCV alone returns pictures that are grey from the cut on."""
    whole = encoded(picture(), quality=95, progressive=progressive)
    for length in range(2, len(whole), 61):
        (tmp_path / "a.jpg").write_bytes(whole[:length])
        found = check(tmp_path / "a.jpg")
        assert length > len(whole) - 100 or (isinstance(found, type) and issubclass(found, OSError))
    for length in (len(whole) - 2, len(whole) - 1):  # all pixels are there, and just the end mark is not
        (tmp_path / "a.jpg").write_bytes(whole[:length])
        check(tmp_path / "a.jpg")


def test_jpegs_with_wrong_bytes_inside(tmp_path):
    """Both libraries mend, or give up on, what the JPEG library mends or gives up on."""
    whole = encoded(picture(), quality=95)
    rng = np.random.default_rng(0)
    for _ in range(120):
        spoilt = bytearray(whole)
        for place in rng.integers(2, len(whole) - 2, rng.integers(1, 4)):
            spoilt[place] = rng.integers(256)
        (tmp_path / "a.jpg").write_bytes(spoilt)
        check(tmp_path / "a.jpg")


def test_pillow_reads_where_the_decoders_differ(tmp_path, monkeypatch):
    """As with another JPEG library behind one of them."""
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    decode = image_loading._decode
    monkeypatch.setattr(image_loading, "_decode", lambda data: decode(data) ^ 1)
    image_loading._decoders_agree.cache_clear()
    try:
        check(tmp_path / "a.jpg")
    finally:
        image_loading._decoders_agree.cache_clear()


def by_channel(image):
    return np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)


VIEWS = {
    "plain": lambda image: image,
    "reversed channels": lambda image: image[:, :, ::-1],
    "mirrored": lambda image: image[:, ::-1],
    "mirrored and reversed": lambda image: image[:, ::-1, ::-1],
    "upside down": lambda image: image[::-1],
    "all three": lambda image: image[::-1, ::-1, ::-1],
    "part": lambda image: image[2:9, 3:11],
    "every other": lambda image: image[::2, ::3],
    "empty": lambda image: image[:0],
    "one channel": lambda image: image[:, :, :1],
    "four channels": lambda image: np.concatenate([image, image[:, :, :1]], axis=2),
    "float": lambda image: image / 255.0,
    "channel by channel": lambda image: by_channel(image),
    "channel by channel, mirrored": lambda image: by_channel(image)[:, ::-1],
    "channel by channel, part": lambda image: by_channel(image)[2:9, 3:11],
    "read-only": lambda image: np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_to_chw(view):
    image = VIEWS[view](np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8))
    before = image.copy()
    tensor = to_chw(image)
    assert tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), before.transpose(2, 0, 1)) and tensor.numpy().dtype == image.dtype
    if view == "plain":
        tensor.zero_()
        assert np.array_equal(image, before)  # it was a copy
    if view == "channel by channel":
        tensor.zero_()
        assert not image.any()  # it was none
