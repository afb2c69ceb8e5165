"""The program that measures what keys of the recipe are worth."""

import json

import pytest
from detectron2.config import CfgNode

from fpn_d2.config import get_cfg
from fpn_d2.config_names import find_config
from tests import recipes


def record(variant, seed, ap, images=0):
    return {"variant": variant, "seed": seed, "images": images, "AP": ap, "AP50": 90.0, "AP75": 70.0, "minutes": 2.0}


def test_the_table_pairs_seeds():
    found = [record("recipe", 1, 60.0), record("recipe", 2, 62.0), record("mosaic", 1, 61.0), record("mosaic", 2, 61.0)]
    failed = {"variant": "mosaic", "seed": 3, "images": 0, "failed": "why"}
    rows = recipes.table([*found, failed, record("recipe", 1, 50.0, images=20)]).splitlines()[2:]
    assert rows == [
        "| 20 | recipe | 1 | 50.0 | 90.0 | 70.0 |  | 2 |",
        "| all | recipe | 1, 2 | 61.0 ± 1.4 | 90.0 ± 0.0 | 70.0 ± 0.0 |  | 2 |",
        "| all | mosaic | 1, 2 | 61.0 ± 0.0 | 90.0 ± 0.0 | 70.0 ± 0.0 | +0.0 ± 1.4 | 2 |",
        "| all | mosaic | 3 | failed: why |",
    ]


@pytest.mark.parametrize("variant", recipes.VARIANTS)
def test_every_row_changes_keys_that_exist(variant):
    cfg = get_cfg()
    cfg.merge_from_file(str(find_config(f"configs/{recipes.RECIPE}")))
    before = cfg.dump()
    cfg.merge_from_list([str(word) if not isinstance(word, list) else word for word in recipes.VARIANTS[variant]])
    assert isinstance(cfg, CfgNode)
    assert (cfg.dump() == before) == (variant in ("recipe", "from scratch"))


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch, capsys, scenes):
    sets = [["annotations/instances_train.json", "images/train"], ["annotations/instances_val.json", "images/val"]]
    words = [str(scenes / part) for pair in sets for part in pair]
    asked = []

    def measure(variant, data, seed, folder, opts):
        with open(data[0][0]) as file:
            asked.append((variant, seed, len(json.load(file)["images"])))
        return {figure: 10.0 * seed for figure in ("AP", "AP50", "AP75")} | {"minutes": 1.0}

    monkeypatch.setattr(recipes, "measure", measure)
    command = ["--set", "tiny", *words, "--only", "mosaic", "recipe", "--output", str(tmp_path), "--images", "2", "3"]
    assert recipes.main([*command, "--seeds", "1"]) == 0
    assert asked == [("recipe", 1, 2), ("mosaic", 1, 2), ("recipe", 1, 3), ("mosaic", 1, 3)]
    assert recipes.main([*command, "--seeds", "2"]) == 0
    assert len(asked) == 8 and {seed for _, seed, _ in asked[4:]} == {2}
    figures = "15.0 ± 7.1 | 15.0 ± 7.1 | 15.0 ± 7.1"
    assert capsys.readouterr().out.endswith(f"| 3 | mosaic | 1, 2 | {figures} | +0.0 ± 0.0 | 1 |\n\n")
    # With other options nothing is known.
    assert recipes.main([*command, "--seeds", "1", "--opts", "SOLVER.EMA_DECAY", "0.5"]) == 0 and len(asked) == 12
    other = ["--set", "other", *command[2:]]
    assert recipes.main([*other, "--seeds", "1"]) == 0 and len(asked) == 16, "it is not that set that is known"
    page = tmp_path / "page.md"
    page.write_text("# Rows\n<!-- recipes tiny: begin -->\n<!-- recipes tiny: end -->\n")
    assert recipes.main([*command, "--seeds", "2", "--write", str(page)]) == 0 and len(asked) == 16
    assert page.read_text().count("| 1, 2 | 15.0 ± 7.1") == 4


def test_images_are_held_back_from_those_to_train_on(tmp_path, monkeypatch, scenes, capsys):
    train, images = scenes / "annotations/instances_train.json", scenes / "images/train"
    words = ["--set", "tiny", str(train), str(images), "no.json", "nowhere", "--only", "recipe", "--seeds", "1"]
    asked = []
    monkeypatch.setattr(recipes, "measure", lambda variant, data, *_: asked.append(data) or record(variant, 1, 60.0))
    command = [*words, "--output", str(tmp_path), "--hold"]
    assert recipes.main([*command, "2"]) == 0
    every = json.loads(train.read_text())
    parts = [json.loads(open(path).read()) for path, _ in asked[0]]
    assert [folder for _, folder in asked[0]] == [str(images)] * 2
    ids = [{image["id"] for image in part["images"]} for part in parts]
    assert len(ids[1]) == 2 and not ids[0] & ids[1] and ids[0] | ids[1] == {image["id"] for image in every["images"]}
    for part, own in zip(parts, ids, strict=True):
        assert part["annotations"] == [one for one in every["annotations"] if one["image_id"] in own]
    with pytest.raises(SystemExit):
        recipes.main([*command, str(len(every["images"]))])
    assert "is not between 0 and the" in capsys.readouterr().err


def test_what_failed_is_told_and_tried_again(tmp_path, monkeypatch, capsys, scenes):
    sets = [["annotations/instances_train.json", "images/train"], ["annotations/instances_val.json", "images/val"]]
    command = ["--set", "tiny", *(str(scenes / part) for pair in sets for part in pair), "--output", str(tmp_path)]
    command += ["--only", "recipe", "--seeds", "1", "--opts", "SOLVER.EMA_DECAY", "2.0"]
    tried = []
    for time in range(2):
        assert recipes.main(command) == 0 and len(tried) == time
        told = capsys.readouterr().out.splitlines()[-2]
        assert told.startswith("| all | recipe | 1 | failed: error: SOLVER.EMA_DECAY is 2.0"), told
        again = {"failed": "error: SOLVER.EMA_DECAY is 2.0"}
        monkeypatch.setattr(recipes, "measure", lambda *_, again=again: tried.append(1) or again)


def test_bad_words(tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipes.main(["--scenes", "--only", "luck", "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    assert "--only 'luck' is no row; there are recipe, " in capsys.readouterr().err
