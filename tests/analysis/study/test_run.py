"""The study: which runs it makes, how it goes on, what its table says; with runs of a fake, and one real study."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from fpn_d2 import cli
from fpn_d2.analysis.study import report as study_report
from fpn_d2.analysis.study import run as study
from fpn_d2.analysis.study.run import run_study, variants_in
from fpn_d2.analysis.study.settings import SETTINGS
from fpn_d2.errors import UserError
from fpn_d2.files import write_atomically
from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY

SCRATCH = SETTINGS["small_objects"]
CONFIGS = SCRATCH.configs


def with_few_scenes(setting, train=2, val=1):
    return dataclasses.replace(setting, scenes={**setting.scenes, "train": train, "val": val})


SMALL = {"setting": with_few_scenes(SCRATCH), "time_pairs": 2}
PAPER = with_few_scenes(SETTINGS["paper"])
AP = {("fpn", 1): 40.0, ("fpn", 2): 44.0, ("c4", 1): 30.0, ("c4", 2): 31.0, ("only_p2", 1): 35.0, ("only_p2", 2): 36.0}


@pytest.fixture
def runs(monkeypatch):
    """Replace the processes by results made up from the names; returns the list of what was asked for, in order."""
    asked = []

    def do_one(task):
        result = Path(task["result"])
        result.parent.mkdir(parents=True, exist_ok=True)
        if task["kind"] == "time":
            asked.append(("time", result.stem))
            found = {"ratios": [0.4, 0.6], "median": 0.5, "quartiles": [0.45, 0.55], "versions": {}}
        else:
            variant, seed = result.parts[-3], int(result.parts[-2].removeprefix("seed_"))
            asked.append((variant, seed))
            ap = AP[variant, seed]
            found = {
                "AP": ap,
                "AP50": 2 * ap,
                "sizes": {"<16": ap - 20, "16-32": ap, "32-64": math.nan},
                "parameters": 12_000_000,
                "macs": 1.5e9,
                "peak_memory_mb": 300.0 if variant == "c4" else 330.0,
                "versions": {},
            }
        write_atomically(str(result), json.dumps({"settings": task["settings"], **found}))
        return True

    monkeypatch.setattr(study, "_do_one", do_one)
    return asked


def test_seeds_go_on_the_outside_and_nothing_is_done_twice(tmp_path, runs):
    options = SMALL | {"variants": ["fpn", "c4"], "iterations": 5}
    run_study(tmp_path, seeds=[1], **options)
    assert runs == [("fpn", 1), ("c4", 1), ("time", "fpn"), ("time", "c4")]
    runs.clear()
    run_study(tmp_path, seeds=[1, 2], **options)
    assert runs == [("fpn", 2), ("c4", 2)]
    runs.clear()
    (tmp_path / "runs" / "fpn" / "seed_1" / "result.json").unlink()
    run_study(tmp_path, seeds=[1, 2], **options)
    assert runs == [("fpn", 1)]
    for seed in (1, 2):
        assert (tmp_path / "scenes" / f"seed_{seed}" / "scenes.json").exists()


def test_results_of_another_folder_are_taken_over(tmp_path, runs):
    options = SMALL | {"variants": ["fpn", "c4"], "time_pairs": 0, "iterations": 5}
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    table = run_study(first, seeds=[1], **options).read_text()
    runs.clear()
    known = first / "records.json"
    assert run_study(second, seeds=[1], known=known, **options).read_text() == table and not runs
    result = Path("runs", "fpn", "seed_1", "result.json")
    assert json.loads((second / result).read_text()) == json.loads((first / result).read_text())
    assert (second / "records.json").read_text() == known.read_text()
    # What they lack is done, and what they have with other settings.
    run_study(third, seeds=[1, 2], known=known, **options)
    assert runs == [("fpn", 2), ("c4", 2)]
    runs.clear()
    run_study(tmp_path / "fourth", seeds=[1], known=known, **options | {"iterations": 6})
    assert runs == [("fpn", 1), ("c4", 1)]


@pytest.mark.parametrize("content", ["", "[1]", '{"runs/fpn/seed_1/result.json": {}}', '{"a": 1}'])
def test_records_that_are_none_are_named(tmp_path, runs, content):
    records = tmp_path / "records.json"
    records.write_text(content)
    with pytest.raises(UserError, match="is no records.json of a study"):
        run_study(tmp_path / "out", seeds=[1], variants=["fpn"], known=records, **SMALL)
    with pytest.raises(UserError, match="There is no file for the results of another study"):
        run_study(tmp_path / "out", seeds=[1], variants=["fpn"], known=tmp_path / "none.json", **SMALL)


def test_runs_with_other_settings_are_not_mixed(tmp_path, runs):
    run_study(tmp_path, seeds=[1], variants=["fpn"], iterations=5, **SMALL)
    with pytest.raises(UserError, match=r"SOLVER.MAX_ITER 5 there, 6 here.*--output"):
        run_study(tmp_path, seeds=[1], variants=["fpn"], iterations=6, **SMALL)
    with pytest.raises(UserError, match=r"SOLVER.MOMENTUM the default there, 0.5 here"):
        run_study(tmp_path, seeds=[1], variants=["fpn"], iterations=5, opts=["SOLVER.MOMENTUM", "0.5"], **SMALL)


def test_runs_of_another_machine_are_not_mixed(tmp_path, runs, monkeypatch):
    run_study(tmp_path, seeds=[1], variants=["fpn"], **SMALL)
    monkeypatch.setattr(study.torch, "__version__", "9.9")
    with pytest.raises(UserError, match=r"torch '2\S+' there, '9.9' here"):
        run_study(tmp_path, seeds=[1], variants=["fpn"], **SMALL)
    monkeypatch.undo()
    keys = {"MODEL.DEVICE": "cpu"}
    assert study._circumstances(keys)["MODEL.DEVICE"] == "cpu"
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(study.torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert study._circumstances({})["MODEL.DEVICE"] == "name of cuda"
    assert study._circumstances(keys)["MODEL.DEVICE"] == "cpu"


def test_times_and_runs_with_other_settings_are_not_shown(tmp_path, runs):
    run_study(tmp_path, seeds=[1], variants=["fpn", "c4"], iterations=5, **SMALL)
    none = SMALL | {"time_pairs": 0, "variants": ["only_p2"]}
    for name in ("times/fpn.json", "runs/fpn/seed_1/result.json", "runs/c4/seed_1/result.json"):
        assert (tmp_path / name).exists()
    # Of the same settings they count, though neither was asked for now.
    table = run_study(tmp_path, seeds=[1], iterations=5, **none).read_text()
    assert "| only_p2 | 1 | 35.0 |" in table and "| -5.0 |" in table and table.rstrip().endswith("| 1.10 | - |")
    assert "| fpn |" not in table
    runs_of_fpn = SMALL | {"time_pairs": 0, "variants": ["fpn"]}
    table = run_study(tmp_path, seeds=[1], iterations=5, **runs_of_fpn).read_text()
    assert table.rstrip().endswith("| 1.10 | 0.50 (0.45 to 0.55) |")
    # With other settings they do not.
    (tmp_path / "runs" / "fpn" / "seed_1" / "result.json").unlink()
    table = run_study(tmp_path, seeds=[1], iterations=6, **runs_of_fpn).read_text()
    assert table.rstrip().endswith("| - | - |")


def test_table_and_results(tmp_path, runs):
    table = run_study(tmp_path, seeds=[1, 2], variants=["fpn", "c4", "only_p2"], **SMALL).read_text().splitlines()
    assert table[0].startswith(
        "| variant | seeds | AP | AP50 | AP <16 px | AP 16-32 px | AP 32-64 px | AP less that of"
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len({len(line) for line in cells}) == 1
    # 40 and 44: mean 42, sample standard deviation 2.83.
    assert cells[2][:8] == ["fpn", "2", "42.0 ± 2.8", "84.0 ± 5.7", "22.0 ± 2.8", "42.0 ± 2.8", "-", ""]
    assert cells[2][8:] == ["1.50", "12.0", "1.10", "0.50 (0.45 to 0.55)"]
    # 30 - 40 and 31 - 44, seed by seed.
    assert cells[3][0] == "c4" and cells[3][7] == "-11.5 ± 2.1"
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    fpn = results["variants"][0]
    assert fpn["AP"] == {"mean": 42.0, "spread": pytest.approx(math.sqrt(8)), "values": [40.0, 44.0]}
    assert fpn["sizes"]["32-64"]["mean"] is None


def test_one_seed_has_no_spread(tmp_path, runs):
    table = run_study(tmp_path, seeds=[1], variants=["fpn"], **SMALL | {"time_pairs": 0}).read_text()
    assert "| fpn | 1 | 40.0 | 80.0 |" in table and "±" not in table
    assert table.rstrip().endswith("| - | - |")  # nothing to compare memory and time with
    assert not (tmp_path / "times").exists()


def _settings_of(folder, variant):
    return json.loads((folder / "runs" / variant / "seed_1" / "result.json").read_text())["settings"]


def test_figure_shows_something(tmp_path, runs):
    run_study(tmp_path, seeds=[1, 2], variants=["fpn", "c4"], **SMALL)
    first = cv2.imread(str(tmp_path / "study.png"))
    assert first.shape[1] > 1000 and len(np.unique(first.reshape(-1, 3), axis=0)) > 50
    settings = {name: _settings_of(tmp_path, name) for name in ("fpn", "c4")}
    rows = study_report.summarise(tmp_path, ["fpn", "c4"], [1, 2], "c4", settings)
    rows[0]["AP"]["mean"] += 10
    study_report.draw(rows, "c4", tmp_path / "other.png")
    assert (cv2.imread(str(tmp_path / "other.png")) != first).any()


def test_numbers_beside_crowded_points_hide_nothing():
    figure = Figure(dpi=100)
    axes = figure.subplots()
    xs, ys = [1 + 0.01 * (n % 4) for n in range(17)], [40 + 0.2 * (n // 4) for n in range(17)]
    axes.set(xlim=(0.5, 1.5), ylim=(35, 45))
    study_report._number_points(axes, xs, ys)
    points = axes.transData.transform(list(zip(xs, ys, strict=True)))
    assert [text.get_text() for text in axes.texts] == [str(n) for n in range(1, 18)]
    places = [text.xyann for text in axes.texts]
    for number, place in enumerate(places):
        assert axes.bbox.contains(*place)
        others = [*points, *places[:number], *places[number + 1 :]]
        assert min(math.dist(place, other) for other in others) > 12 * 100 / 72


def test_failed_runs_are_named_and_the_others_count(tmp_path, runs, monkeypatch):
    real = study._do_one
    monkeypatch.setattr(study, "_do_one", lambda task: "/c4/" not in task["result"] and real(task))
    with pytest.raises(UserError, match=r"1 of the runs failed, see \S+/runs/c4/seed_1/console.txt"):
        run_study(tmp_path, seeds=[1], variants=["fpn", "c4"], **SMALL | {"time_pairs": 0})
    assert "| fpn |" in (tmp_path / "table.md").read_text() and "| c4 |" not in (tmp_path / "table.md").read_text()
    runs.clear()
    monkeypatch.setattr(study, "_do_one", real)
    run_study(tmp_path, seeds=[1], variants=["fpn", "c4"], **SMALL | {"time_pairs": 0})
    assert runs == [("c4", 1)]


def test_mistakes(tmp_path, runs):
    for options, message in [
        ({"variants": ["fnp"]}, "no variant fnp.*fpn"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"iterations": 0}, "iterations is 0"),
        ({"jobs": 0}, "jobs is 0"),
        ({"opts": ["SOLVER.NO_SUCH", "1"]}, "NO_SUCH"),
        ({"opts": ["SOLVER.BASE_LR"]}, "pairs"),
    ]:
        with pytest.raises(UserError, match=message):
            run_study(tmp_path / "new", **SMALL | {"seeds": [1]} | options)
    with pytest.raises(UserError, match="--configs"):
        run_study(tmp_path / "new", setting=dataclasses.replace(SCRATCH, configs=tmp_path))
    with pytest.raises(UserError, match="seed 0 is that of the scenes"):
        run_study(tmp_path / "new", setting=PAPER, seeds=[0, 1])
    assert runs == [] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_neck_and_extractor_has_a_variant(setting):
    used = {"FPN", "canonical"} | ({"ImagePyramid"} if setting.image_pyramid else set())
    variants = variants_in(setting.configs, setting.order)
    for path in variants.values():
        keys = study.changed_keys(path, [])
        used |= {keys.get("MODEL.FPN.NECK"), keys.get("MODEL.ROI_LEVEL_ASSIGN.NAME")}
    for registry in (NECK_REGISTRY, ROI_RULE_REGISTRY):
        assert {name for name, _ in registry} <= used, f"add a config to {setting.configs}"
    assert tuple(variants)[: len(setting.order)] == setting.order and set(setting.image_pyramid) <= set(variants)


@pytest.mark.parametrize(
    "setting, sizes, numerics",
    # C4 and C5 from scratch have Detectron2's operations only
    [("small_objects", [8, 11, 16, 23, 32, 45, 64, 90], "exact"), ("paper", [32, 64, 128, 256, 512], None)],
)
def test_variants_differ_in_the_model_only(setting, sizes, numerics):
    configs = SETTINGS[setting].configs
    recipe = study.changed_keys(configs / "fpn.yaml", [])
    for name, path in variants_in(configs).items():
        keys = study.changed_keys(path, [])
        other = {key for key in {*keys, *recipe} if keys.get(key) != recipe.get(key)}
        assert all(key.startswith("MODEL.") for key in other), (name, other)
        of_levels = keys.get("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128, 256, 512]])  # Detectron2's default
        anchors = [size for of_level in of_levels for size in of_level]
        assert keys.get("MODEL.NUMERICS") == numerics
        assert sorted(anchors) == sizes, name


def test_each_variant_gets_its_best_learning_rate(tmp_path, monkeypatch):
    """The learning rate with the highest AP of those tried; runs of another seed's scenes, half as long."""
    asked = []
    best = {"fpn": "0.001", "c4": "0.004"}

    def do_one(task):
        result = Path(task["result"])
        result.parent.mkdir(parents=True, exist_ok=True)
        variant = Path(task["config"]).stem
        keys = dict(zip(task["opts"][::2], task["opts"][1::2], strict=True))
        tuning = result.parts[-4] == "tuning"
        asked.append((tuning, variant, keys["SEED"], keys.get("SOLVER.MAX_ITER"), float(keys["SOLVER.BASE_LR"])))
        assert ("seed_0" in keys["DATASETS.COCO_FORMAT"]) == tuning and bool(task["recall_at"]) != tuning
        found = {
            "AP": 9.0 if keys["SOLVER.BASE_LR"] == best[variant] else 5.0,
            "AP50": 9.0, "sizes": {"<56": 1.0}, "parameters": 1, "macs": 1e9, "peak_memory_mb": 1.0,
            "recall": {"AR@100": {"all": 30.0, "<56": 20.0}}, "AP_image_pyramid": 44.0,
        }  # fmt: skip
        write_atomically(str(result), json.dumps({"settings": task["settings"], **found}))
        return True

    monkeypatch.setattr(study, "_do_one", do_one)
    options = {"setting": PAPER, "seeds": [1], "variants": ["fpn", "c4"], "iterations": 8}
    table = run_study(tmp_path, **options).read_text()
    assert [run for run in asked if run[0]] == [
        (True, variant, "0", "4", rate) for variant in ("fpn", "c4") for rate in (0.001, 0.002, 0.004)
    ]
    assert [run[1:] for run in asked if not run[0]] == [("fpn", "1", "8", 0.001), ("c4", "1", "8", 0.004)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]
    assert lines[0][-4:] == ["AP, image pyramid at test", "learning rate", "GMAC", "M parameters"]
    assert lines[2][-4:] == ["44.0", "0.001", "1.00", "0.0"] and lines[3][-3] == "0.004"
    assert lines[4] == ["variant", "AR@100", "AR@100 <56 px"] and lines[6] == ["fpn", "30.0", "20.0"]
    asked.clear()
    run_study(tmp_path, **options)
    assert asked == []


def test_a_variant_whose_learning_rates_were_not_all_tried_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_do_one", lambda task: False)
    with pytest.raises(UserError, match="no run in"):
        run_study(tmp_path, setting=PAPER, seeds=[1], variants=["fpn"])
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="learning rate of fpn, whose proposals all are to have"):
        run_study(tmp_path, setting=PAPER, seeds=[1], variants=["c4"], proposals_of="fpn")


def test_heads_are_compared_on_the_proposals_of_one_variant(tmp_path, monkeypatch):
    asked = []

    def do_one(task):
        result = Path(task["result"])
        result.parent.mkdir(parents=True, exist_ok=True)
        asked.append((task["kind"], result.parent.relative_to(tmp_path).as_posix(), task))
        made_up = {"AP": 9.0, "AP50": 9.0, "sizes": {"<56": 1.0}, "parameters": 1, "macs": 1e9, "peak_memory_mb": 1.0}
        write_atomically(str(result), json.dumps({"settings": task["settings"], **made_up}))
        return True

    monkeypatch.setattr(study, "_do_one", do_one)
    options = {"setting": PAPER, "seeds": [1, 2], "variants": ["c4"], "iterations": 8, "proposals_of": "fpn"}
    table = run_study(tmp_path, **options)
    assert table == tmp_path / "heads_on_fpn" / "table.md" and "| c4 | 2 |" in table.read_text()
    places = [(kind, place) for kind, place, _ in asked if not place.startswith("tuning")]
    assert places == [
        *(("propose", f"proposals/fpn/seed_{seed}") for seed in (1, 2)),
        *(("train", f"heads_on_fpn/c4/seed_{seed}") for seed in (1, 2)),
    ]
    tuned = {place.split("/")[1] for _, place, _ in asked if place.startswith("tuning")}
    assert tuned == {"fpn", "c4"}
    made, words = asked[-3][2], asked[-1][2]["opts"]
    assert made["proposals"] == {
        split: str(tmp_path / "proposals" / "fpn" / "seed_2" / f"{split}.pkl") for split in ("study_train", "study_val")
    }
    keys = dict(zip(words[::2], words[1::2], strict=True))
    assert keys["DATASETS.PROPOSAL_FILES_TRAIN"] == repr((made["proposals"]["study_train"],))
    assert keys["DATASETS.PROPOSAL_FILES_TEST"] == repr((made["proposals"]["study_val"],))
    assert keys["DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN"] == keys["DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST"] == "200"
    assert asked[-1][2]["recall_at"] == [] and asked[-1][2]["image_pyramid"] is False
    asked.clear()
    run_study(tmp_path, **options)
    assert asked == []
    # What the proposals were made with is part of what the heads depend on.
    with pytest.raises(UserError, match="SOLVER.MAX_ITER 8 there, 9 here"):
        run_study(tmp_path, **options | {"iterations": 9})
    with pytest.raises(UserError, match="no variant fnp"):
        run_study(tmp_path, **options | {"proposals_of": "fnp"})


@pytest.mark.slow
def test_a_study_from_the_command_line_goes_on(tmp_path, capfd):
    command = ["study", "--setting", "small_objects", "--output", str(tmp_path), "--variants", "fpn", "c4"]
    command += ["--seeds", "1", "2", "--iterations", "2", "--train", "4", "--val", "2", "--time-pairs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        real = subprocess.run
        started = []

        def killed(words, **options):
            started.append(words)
            if len(started) >= 3:
                raise KeyboardInterrupt
            return real(words, **options)

        patch.setattr(subprocess, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            cli.main(command)
    first = sorted(tmp_path.glob("runs/*/seed_*/result.json"))
    assert len(first) == 2
    times = [path.stat().st_mtime_ns for path in first]
    assert cli.main(command) == 0
    assert [path.stat().st_mtime_ns for path in first] == times
    assert len(list(tmp_path.glob("runs/*/seed_*/result.json"))) == 4
    assert not list(tmp_path.glob("runs/*/*/*.pth"))
    out = capfd.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert table in out and "| fpn | 2 |" in table and "| c4 | 2 |" in table
    assert (tmp_path / "study.png").stat().st_size > 10_000
    c4 = json.loads((tmp_path / "results.json").read_text())["variants"][1]
    assert c4["memory_ratio"]["mean"] == 1.0 and 0.2 < c4["time_ratio"]["median"] < 5
