"""docs/lazy_own_data.py: a LazyConfig on data of one's own, by Detectron2's own loop."""

import runpy
import sys
from pathlib import Path

import pytest
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog

from .small import ROOT

PROGRAM = ROOT / "docs" / "lazy_own_data.py"
# Small enough for a CPU: images of 64 pixels, hardly any proposals, no weights to download.
SMALL = """
    train.max_iter=2 train.init_checkpoint="" train.device=cpu
    dataloader.train.num_workers=0 dataloader.test.num_workers=0
    dataloader.train.mapper.augmentations.0.short_edge_length=[64]
    dataloader.test.mapper.augmentations.0.short_edge_length=64
    model.proposal_generator.post_nms_topk=[20,20] model.roi_heads.batch_size_per_image=16
""".split()


@pytest.fixture
def main():
    if not (Path(sys.modules["detectron2"].__file__).parent / "model_zoo" / "configs").exists():
        pytest.skip("this Detectron2 is not installed: model_zoo/configs is missing")
    yield runpy.run_path(str(PROGRAM))["main"]
    for name in ("lazy_train", "lazy_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_a_lazyconfig_trains_on_data_of_ones_own(tmp_path, scenes, main):
    data = [f"{scenes}/annotations/instances_train.json", f"{scenes}/images/train"]
    data += [f"{scenes}/annotations/instances_val.json", f"{scenes}/images/val"]
    main([*data, str(tmp_path / "out"), *SMALL])
    kept = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"model_final.pth", "metrics.json", "config.yaml", "log.txt"} <= kept
    (tmp_path / "out" / "model_final.pth").unlink()  # 330 MB
    assert "bbox/AP50" in (tmp_path / "out" / "metrics.json").read_text()
    classes = MetadataCatalog.get("lazy_train").thing_classes
    assert LazyConfig.load(str(tmp_path / "out" / "config.yaml")).model.roi_heads.num_classes == len(classes) != 80


def test_a_path_that_is_wrong_is_one_line(tmp_path, main, capfd):
    with pytest.raises(SystemExit) as end:
        main(["nowhere.json", str(tmp_path), "nowhere.json", str(tmp_path), str(tmp_path / "out")])
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith("error: There is no file for the annotations of data set 'lazy_train'")
