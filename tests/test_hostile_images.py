"""Image files and names that mean harm: the check of data, training and prediction refuse them alike."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fpn_d2.data.bad_images import BadImage
from fpn_d2.data.image_files import look_at
from fpn_d2.data.mapper import TrainingMapper
from fpn_d2.errors import UserError
from fpn_d2.inference.predictor import read
from fpn_d2.inference.sources import annotated, items


def _gif(path):
    """A header that claims 60,000 x 60,000 pixels, and nothing behind it."""
    path.write_bytes(b"GIF89a" + (60_000).to_bytes(2, "little") * 2 + b"\0\0\0" + b"," + b"\0" * 20)


HOSTILE = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("<html>404</html>"),
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("gone.png"),
    "bomb": lambda path: Image.new("1", (15_000, 14_000)).save(path),
    "claims": _gif,
    "cut short": lambda path: path.write_bytes(_png()[:-40]),
    "whole numbers of 32 bits": lambda path: Image.fromarray(np.full((4, 4), 1 << 30, np.int32)).save(path, "TIFF"),
}


def _png():
    import io

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_everywhere(tmp_path, name):
    path = tmp_path / "a.png"
    HOSTILE[name](path)
    assert not look_at(str(path)).usable
    mapper = TrainingMapper(True, augmentations=[], image_format="BGR")
    with pytest.raises(BadImage):
        mapper._read({"file_name": str(path)})
    with pytest.raises(UserError, match="a.png"):
        read(str(path), "BGR")


@pytest.mark.parametrize("name", ["a\0.png", "n" * 5000 + ".png", "\ud800.png"])
def test_a_hostile_name_is_refused_everywhere(tmp_path, name):
    path = f"{tmp_path}/{name}"
    assert not look_at(path).usable
    with pytest.raises(BadImage):
        TrainingMapper(True, augmentations=[], image_format="BGR")._read({"file_name": path})
    with pytest.raises(UserError):
        read(path, "BGR")


@pytest.mark.parametrize("name", ["../b.png", "/etc/passwd", "c/../../b.png", "a\0.png", "", 5])
def test_prediction_by_annotations_stays_in_their_folder(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "b.png").write_bytes(_png())
    images = [{"id": 1, "file_name": name}, {"id": 2, "file_name": "a.png"}]
    content = {"images": images, "categories": [{"id": 1, "name": "ant"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    found, _ = annotated(str(tmp_path / "set.json"), str(tmp_path / "images"))
    assert found[0].image is None and ("outside" in found[0].error or "file_name" in found[0].error)
    assert found[1].image == str(tmp_path / "images" / "a.png") and found[1].error is None


def test_annotations_nested_without_end_are_one_sentence(tmp_path):
    (tmp_path / "set.json").write_text('{"images": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(UserError, match="deep"):
        annotated(str(tmp_path / "set.json"), str(tmp_path))


def test_folders_that_link_into_themselves_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "i.png").write_bytes(_png())
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")  # another folder, and no circle
    assert [item.name for item in items([str(tmp_path)])] == [f"{tmp_path}/{folder}/i.png" for folder in "ab"]
