"""Sets with one fault of an image file or of its name; see `messy_data`."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.small_sets import write_image
from tests.messy_sets import HEIGHT, WIDTH, messy, setting


def of_file(name: str, *kinds: str) -> Callable:
    """A fault of the last image's file, which ``spoil(path)`` makes."""

    def add(spoil: Callable[[Path], None]) -> Callable:
        def spoil_file(content: dict, folder: Path) -> None:
            path = folder / "images" / "4.png"
            path.unlink()
            spoil(path)
            if path.is_file() and not os.path.islink(path):
                try:
                    with Image.open(path) as image:
                        content["images"][3]["width"], content["images"][3]["height"] = image.size
                except Exception:  # no image: it keeps the size of the one that was there
                    pass

        messy(name, *kinds)(spoil_file)
        return spoil

    return add


def noise(*shape: int, high: int = 256, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(kind)


@of_file("empty image file", "file_empty", "image_left_out")
def _(path: Path) -> None:
    path.touch()


@of_file("image file cut short", "file_truncated", "image_left_out")
def _(path: Path) -> None:
    write_image(path, WIDTH, HEIGHT)
    path.write_bytes(path.read_bytes()[:-2000])


@of_file("text as an image file", "not_an_image", "image_left_out")
def _(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


@of_file("FIFO as an image file", "file_not_regular", "image_left_out")
def _(path: Path) -> None:
    os.mkfifo(path)


@of_file("folder as an image file", "file_not_regular", "image_left_out")
def _(path: Path) -> None:
    path.mkdir()


@of_file("links in a circle as an image file", "file_unreadable", "image_left_out")
def _(path: Path) -> None:
    path.symlink_to(path.name)


@of_file("PNG of 210 megapixels", "image_too_large", "image_left_out")
def _(path: Path) -> None:
    Image.new("1", (15_000, 14_000)).save(path)


@messy("PNG of 210 megapixels without recorded size", "image_too_large", "image_left_out")
def _(content: dict, folder: Path) -> None:
    Image.new("1", (15_000, 14_000)).save(folder / "images" / "4.png")
    del content["images"][3]["width"], content["images"][3]["height"]


@of_file("GIF of 60,000 x 60,000 in 40 bytes", "image_too_large", "image_left_out")
def _(path: Path) -> None:
    path.write_bytes(b"GIF89a" + (60_000).to_bytes(2, "little") * 2 + b"\0\0\0" + b"," + b"\0" * 20)


@of_file("JPEG cut short", "file_truncated", "image_left_out")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 3)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


@of_file("GIF of several pictures", "several_frames")
def _(path: Path) -> None:
    first, *others = (Image.fromarray(noise(HEIGHT, WIDTH, 3) // k) for k in (1, 2, 3))
    first.save(path, "GIF", save_all=True, append_images=others)


@of_file("PNG of two colours")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH) > 127).save(path)


@of_file("16-bit PNG", "pixels_16_bit")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, high=65536, kind=np.uint16)).save(path)


@of_file("floating-point TIFF in 0..1", "pixels_float")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH).astype(np.float32) / 255).save(path, "TIFF")


@of_file("floating-point TIFF in -1000..1000", "pixels_refused", "image_left_out")
def _(path: Path) -> None:
    Image.fromarray((noise(HEIGHT, WIDTH).astype(np.float32) - 128) * 8).save(path, "TIFF")


@of_file("32-bit TIFF of whole numbers", "pixels_refused", "image_left_out")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, high=1 << 30, kind=np.int32)).save(path, "TIFF")


@of_file("CMYK JPEG", "pixels_cmyk")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 4), "CMYK").save(path, "JPEG")


@of_file("palette PNG", "pixels_palette")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 3)).convert("P").save(path)


@of_file("PNG with alpha", "pixels_alpha")
def _(path: Path) -> None:
    Image.fromarray(noise(HEIGHT, WIDTH, 4)).save(path)


@of_file("image of 1 x 1", "image_tiny", "box_outside")
def _(path: Path) -> None:
    Image.fromarray(noise(1, 1, 3)).save(path)


@of_file("image of 4000 x 10", "image_flat", "box_outside")
def _(path: Path) -> None:
    Image.fromarray(noise(10, 4000, 3)).save(path)


@messy("EXIF turns an image, size recorded upright", "exif_turned")
def _(content: dict, folder: Path) -> None:
    _turned(content, folder)
    content["images"][3] |= {"width": HEIGHT, "height": WIDTH}


@messy("EXIF turns an image, size recorded as stored", "exif_ambiguous", "image_left_out")
def _(content: dict, folder: Path) -> None:
    _turned(content, folder)


def _turned(content: dict, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(HEIGHT, WIDTH, 3)).save(folder / "images" / "4.jpg", exif=exif)
    content["images"][3]["file_name"] = "4.jpg"


@messy("absolute path to an image elsewhere", "file_outside_folder", "image_left_out")
def _(content: dict, folder: Path) -> None:
    (folder / "images" / "4.png").rename(folder / "4.png")
    content["images"][3]["file_name"] = str(folder / "4.png")


@messy("path with .. to an image elsewhere", "file_outside_folder", "image_left_out")
def _(content: dict, folder: Path) -> None:
    (folder / "images" / "4.png").rename(folder / "4.png")
    content["images"][3]["file_name"] = "../4.png"


@messy("file name with escape sequences")
def _(content: dict, folder: Path) -> None:
    name = "\x1b]0;title\x07.png"
    (folder / "images" / "4.png").rename(folder / "images" / name)
    content["images"][3]["file_name"] = name


messy("file name of 20,000 characters", "file_unreadable", "image_left_out")(
    setting("images", 3, "file_name", to="n" * 20_000 + ".png")
)
messy("file name with half of a character", "file_name_wrong", "image_left_out")(
    setting("images", 3, "file_name", to="\ud800.png")
)
messy("two images of one file", "file_named_twice")(setting("images", 3, "file_name", to="1.png"))


@messy("image folder that links into itself", "file_unreadable", "image_left_out")
def _(content: dict, folder: Path) -> None:
    (folder / "images" / "again").symlink_to("again")
    content["images"][3]["file_name"] = "again/4.png"
