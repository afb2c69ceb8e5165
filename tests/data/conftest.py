"""What the tests of the data get: catalogs that no other test has filled, and a folder in Pascal VOC's layout."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_d2.data import coco_format

from .small_sets import HEIGHT, WIDTH, write_image, write_xml


@pytest.fixture(autouse=True)
def clean_catalogs():
    """Leave Detectron2's catalogs as they were."""
    before, registered = set(DatasetCatalog.list()), dict(coco_format._registered)
    metadata_before = set(MetadataCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
    for name in set(MetadataCatalog.list()) - metadata_before:
        MetadataCatalog.remove(name)
    coco_format._registered.clear()
    coco_format._registered.update(registered)


@pytest.fixture
def voc(tmp_path):
    """Two images in train, one in val; among them a png, an image without objects, a size left out."""
    write_xml(tmp_path, "one", [("wolf", (1, 1, WIDTH, HEIGHT)), ("cat", (5, 6, 20, 18.5))])
    write_xml(tmp_path, "two", [])
    write_xml(tmp_path, "three", [("emu", (0, 0, 9, 9))], size=None, extra="")
    write_image(tmp_path / "JPEGImages" / "one.jpg")
    write_image(tmp_path / "JPEGImages" / "two.jpg")
    write_image(tmp_path / "JPEGImages" / "three.png", width=50, height=20)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("one  1\ntwo -1\n\n")
    (lists / "val.txt").write_text("three\n")
    return tmp_path
