"""Configurations by name: ours and Detectron2's, as paths, and what is said of names that are none."""

from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg

import fpn_d2
from fpn_d2 import config_names
from fpn_d2.config_files import merge_config_file, read_config
from fpn_d2.config_names import find_config, own_config, own_folder
from fpn_d2.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BOTH = "COCO-Detection/faster_rcnn_R_50_FPN_1x"  # ours has the name of its twin in the zoo
ZOO_ONLY = "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
OURS_ONLY = "pyramids/faster_rcnn_R_50_BiFPN_1x"


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("written", ["{}", "{}.yaml", "configs/{}", "configs/{}.yaml"])
def test_each_of_ours_has_a_name(written):
    names = [path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")]
    assert len(names) > 60
    for name in names:
        found = fpn_d2.config_file(written.format(name.removesuffix(".yaml")))
        assert found == str(ROOT / "configs" / name)


def test_a_mistyped_name_is_told_the_nearest():
    with pytest.raises(UserError, match=r"no configuration COCO.*\(did you mean COCO-Detection/faster_rcnn_R_50_FPN"):
        fpn_d2.config_file("COCO-Detection/faster_rcnn_R50_FPN_1x.yaml")
    with pytest.raises(UserError, match=r"no configuration .*R50.*; nor has .*\(did you mean COCO-Detection/faster_rc"):
        find_config("COCO-Detection/faster_rcnn_R50_FPN_1x.yaml")


LAZY = "lazy/faster_rcnn_fpn_R_50.py"


@pytest.mark.parametrize("name", ["", "configs/", "../setup.py", "COCO-Detection", "/etc/passwd", LAZY])
def test_what_is_no_configuration_has_no_name(name):
    assert own_config(name) is None


def test_a_file_comes_first_then_ours_then_the_zoos(tmp_path):
    zoo = Path(model_zoo.get_config_file(f"{BOTH}.yaml"))
    assert find_config(BOTH) == own_folder() / f"{BOTH}.yaml"
    assert find_config(BOTH, zoo_first=True).samefile(zoo)
    assert find_config(f"configs/{BOTH}", zoo_first=True) == own_folder() / f"{BOTH}.yaml"
    for first in (False, True):
        assert find_config(OURS_ONLY, zoo_first=first) == own_folder() / f"{OURS_ONLY}.yaml"
        assert find_config(ZOO_ONLY, zoo_first=first).samefile(model_zoo.get_config_file(f"{ZOO_ONLY}.yaml"))
    own = tmp_path / f"{BOTH}.yaml"
    own.parent.mkdir()
    own.write_text("VERSION: 2\n")
    assert find_config(f"{BOTH}.yaml").resolve() == find_config(str(own)) == own


def test_a_path_that_is_mistyped_is_told_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("VERSION: 2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("onw.yaml", "./onw.yaml", "~/onw.yaml", str(tmp_path / "onw.yaml")):
        with pytest.raises(UserError, match=r"looked for .*onw\.yaml \(did you mean own\.yaml\?\)"):
            find_config(name)


def test_a_configuration_is_read_and_based_on_by_name(tmp_path):
    expected = read_config(fpn_d2.config_file(BOTH))
    assert read_config(BOTH) == read_config(f"configs/{BOTH}.yaml") == expected
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {BOTH}.yaml\nSEED: 7\n")
    assert read_config("mine.yaml") == {**expected, "SEED": 7}
    cfg = get_cfg()
    fpn_d2.add_fpn_d2_config(cfg)
    merge_config_file(cfg, "mine.yaml")
    assert (cfg.SEED, cfg.MODEL.BACKBONE.NAME) == (7, "build_fpn_backbone")
    # A file beside it comes first.
    (tmp_path / "COCO-Detection").mkdir()
    (tmp_path / f"{BOTH}.yaml").write_text("SEED: 8\n")
    assert read_config("mine.yaml") == {"SEED": 7}


def test_a_package_without_its_configurations_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(config_names, "_PACKAGE", tmp_path / "fpn_d2")
    with pytest.raises(UserError, match="install fpn_d2 again"):
        own_folder()


def test_without_detectron2_ours_are_found(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert config_names.zoo_folders() == []
    assert find_config(BOTH, zoo_first=True) == own_folder() / f"{BOTH}.yaml"
