import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fpn_d2 import cli
from fpn_d2.data.scenes import make_scenes


def test_scenes_are_made_as_asked_for(tmp_path, capsys):
    arguments = [
        "--train",
        "3",
        "--val",
        "2",
        "--image-size",
        "64",
        "--seed",
        "7",
        "--min-size",
        "9",
        "--max-size",
        "30",
    ]
    arguments += ["--max-objects", "4", "--empty", "0.5"]
    assert cli.main(["scenes", "--output", str(tmp_path / "set"), *arguments]) == 0
    assert capsys.readouterr().out.strip() == f"Scenes: {tmp_path / 'set'}"
    parameters = json.loads((tmp_path / "set" / "scenes.json").read_text())
    expected = {"train": 3, "val": 2, "image_size": 64, "seed": 7, "min_size": 9, "max_size": 30, "max_objects": 4}
    assert {**parameters, **expected, "empty": 0.5} == parameters


@pytest.mark.parametrize("set_before", [None, "0"])
def test_large_tensors_lie_in_huge_pages_unless_asked_otherwise(tmp_path, capsys, monkeypatch, set_before):
    """What PyTorch makes of the variable: tests/engine/test_launch.py."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that what the command sets is undone
    if set_before is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert cli.main(["scenes", "--output", str(tmp_path), "--train", "1", "--val", "1", "--image-size", "64"]) == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (set_before or "1")


def test_overwrite(tmp_path, capsys):
    command = [
        "scenes",
        "--output",
        str(tmp_path / "set"),
        "--train",
        "1",
        "--val",
        "1",
        "--image-size",
        "64",
        "--seed",
    ]
    assert cli.main([*command, "1"]) == 0
    assert cli.main([*command, "2"]) == 2
    assert "error: " in capsys.readouterr().err
    assert cli.main([*command, "2", "--overwrite"]) == 0


def test_defaults_are_those_of_the_function():
    args = vars(cli.build_parser().parse_args(["scenes", "--output", "x"]))
    for name, parameter in inspect.signature(make_scenes).parameters.items():
        if name not in ("folder", "progress"):
            assert args[name] == parameter.default, name


def test_mistake_is_one_line_without_traceback(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "fpn_d2.cli",
            "scenes",
            "--output",
            str(tmp_path / "set"),
            "--train",
            "0",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "error: Expected train to be a whole number of at least 1, got 0.\n"


def test_alone_it_shows_its_verbs(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {verb} " in shown or f"    {verb}\n" in shown for verb in cli.build_parser().verbs())
    assert len(cli.build_parser().verbs()) == len(cli.VERBS)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("trian", "there is no verb trian (did you mean train?); see fpn-d2 --help"),
        ("data chek", "there is no action chek (did you mean check?); see fpn-d2 data --help"),
        ("scenes", "the following arguments are required: --output; see fpn-d2 scenes --help"),
        ("scenes --output", "argument --output: expected one argument; see fpn-d2 scenes --help"),
        ("scenes --outptu x", "there is no option --outptu (did you mean --output?); see fpn-d2 scenes --help"),
        ("scenes --output x y", "there is no place for the argument y; see fpn-d2 scenes --help"),
        ("scenes --output x --train many", "argument --train: invalid int value: 'many'; see fpn-d2 scenes --help"),
        ("train --config-file", "argument --config-file: expected one argument; see fpn-d2 train --help"),
        ("train A 1 --resmue", "there is no option --resmue (did you mean --resume?); see fpn-d2 train --help"),
    ],
)
def test_an_unknown_or_incomplete_command_is_one_line(command, told, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(command.split())
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"error: {told}\n")


def test_a_verb_far_from_all_is_told_which_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fly"])
    told = capsys.readouterr().err
    assert told.startswith("error: there is no verb fly: there are ") and told.count("\n") == 1
    assert all(verb in told for verb in cli.build_parser().verbs())


def test_an_option_may_be_shortened_and_a_value_may_follow_a_sign(tmp_path):
    args = cli.build_parser().parse_args(["scenes", "--out", "x", "--tr=3"])
    assert (args.output, args.train) == ("x", 3)


def test_train_takes_what_detectron2s_own_command_line_takes():
    from detectron2.engine import default_argument_parser

    theirs = default_argument_parser()
    words = "--config-file a.yaml --resume --eval-only --num-gpus 2 --num-machines 3 --machine-rank 1 --dist-url tcp://h:1"
    for given in ([], [*words.split(), "A.B", "1", "C", "(2,)"]):
        expected, ours = vars(theirs.parse_args(given)), vars(cli.build_parser().parse_args(["train", *given]))
        if not given:
            assert expected.pop("dist_url").startswith("tcp://127.0.0.1:") and ours["dist_url"] is None
        assert {name: ours[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["COCO-Detection/faster_rcnn_R_50_FPN_1x", "configs/pyramids/retinanet_R_50_BiFPN_1x"])
def test_configs_lists_names_that_lead_to_files(name, capsys):
    assert cli.main(["configs"]) == 0
    rows = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) > 60 and all(title.strip() for _, title in rows)
    assert name.removeprefix("configs/") in [row[0] for row in rows]
    assert cli.main(["configs", name]) == 0
    path = capsys.readouterr().out.rstrip("\n")
    assert path.endswith(f"{name.removeprefix('configs/')}.yaml") and os.path.isfile(path)


def test_convert_torchvision(tmp_path, capsys):
    from tests.checkpoint.test_torchvision_names import small_weights

    source, target = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    torch.save(small_weights("retinanet", 91), source)
    assert cli.main(["convert-torchvision", source, target]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{target}: retinanet_resnet50_fpn with 80 classes")
    assert f"--config-file configs/torchvision/retinanet_R_50_FPN.yaml MODEL.WEIGHTS {target}\n" in out
    first = torch.load(target, weights_only=True)["model"]
    assert cli.main(["convert-torchvision", source, target, "--all-classes", "--batch-norm-eps", "1e-3"]) == 0
    assert "90 classes" in (out := capsys.readouterr().out) and out.endswith("MODEL.RETINANET.NUM_CLASSES 90\n")
    second = torch.load(target, weights_only=True)["model"]
    variances = "backbone.bottom_up.stem.conv1.norm.running_var"
    torch.testing.assert_close(second[variances] - first[variances], torch.full((2,), 1e-3), rtol=1e-3, atol=1e-6)
    torch.save({"a": torch.zeros(2)}, source)
    assert cli.main(["convert-torchvision", source, target]) == 2
    assert f"error: {source}: these are not the weights" in capsys.readouterr().err


def test_convert_weights(tmp_path, capsys):
    pytest.importorskip("safetensors")
    source, target, again = (str(tmp_path / name) for name in ("in.pth", "out.safetensors", "again.pth"))
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": {}, "matching_heuristics": True}, source)
    assert cli.main(["convert-weights", source, target]) == 0
    assert capsys.readouterr().out == f"{target}: 1 tensors\n"
    assert cli.main(["convert-weights", target, again]) == 0
    loaded = torch.load(again, weights_only=True)
    assert loaded.pop("model")["a"].tolist() == [1, 1] and loaded == {"matching_heuristics": True}
    assert cli.main(["convert-weights", source, "out.bin"]) == 2
    assert "ends in .pth" in capsys.readouterr().err


def test_models(monkeypatch, capsys):
    from fpn_d2.analysis import catalogue as components

    asked, real = [], components.list_components

    def one(size, progress):
        asked.append(size)
        return real(size, names=["canonical"])

    monkeypatch.setattr(components, "list_components", one)
    assert cli.main(["models", "--size", "480x640", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert asked == [(480, 640)] and (shown["height"], shown["width"]) == (480, 640)
    assert [row["name"] for row in shown["components"]] == ["canonical"]
    assert cli.main(["models"]) == 0
    assert asked[1] == (800, 1088) and "RoI extractors" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["480", "480x", "0x640", "480x640x3", "-1x5"])
def test_models_refuses_what_is_no_size(size, capsys):
    with pytest.raises(SystemExit):
        cli.main(["models", "--size", size])
    assert "800x1088" in capsys.readouterr().err or size.startswith("-")


def test_study_passes_its_arguments_on(monkeypatch, tmp_path, capsys):
    from fpn_d2.analysis.study import run as study
    from fpn_d2.analysis.study.settings import SETTINGS

    asked = {}

    def run_study(folder, **options):
        asked.update(options, folder=folder)
        (tmp_path / "table.md").write_text("the table")
        return tmp_path / "table.md"

    monkeypatch.setattr(study, "run_study", run_study)
    words = "study --output out --seeds 4 5 --variants fpn c4 --iterations 7 --train 8 --val 9 --time-pairs 3 --jobs 2"
    words += " --opts SOLVER.BASE_LR 0.1 --known r.json --proposals-of c5"
    assert cli.main(words.split()) == 0
    assert asked == {
        "folder": "out",
        "seeds": [4, 5],
        "variants": ["fpn", "c4"],
        "setting": dataclasses.replace(SETTINGS["paper"], scenes={**SETTINGS["paper"].scenes, "train": 8, "val": 9}),
        "iterations": 7,
        "tuning_iterations": None,
        "time_pairs": 3,
        "jobs": 2,
        "opts": ["SOLVER.BASE_LR", "0.1"],
        "known": "r.json",
        "proposals_of": "c5",
    }
    assert "the table" in capsys.readouterr().out


def test_study_has_the_defaults_of_the_function():
    from fpn_d2.analysis.study.run import run_study

    args = vars(cli.build_parser().parse_args(["study", "--output", "x"]))
    for name, parameter in inspect.signature(run_study).parameters.items():
        if name not in ("folder", "setting"):
            assert args[name] == parameter.default, name


def test_compare_passes_its_arguments_on(monkeypatch, capsys):
    from fpn_d2.analysis.compare import report as compare_report
    from fpn_d2.analysis.compare import run as compare

    taken = []
    monkeypatch.setattr(compare, "run_compare", lambda a, b, plan, command: taken.append((a, b, plan, command)))
    monkeypatch.setattr(compare_report, "text", lambda result: "tables")
    assert cli.main(["compare", "a.yaml", "b.yaml"]) == 0
    assert taken.pop() == ("a.yaml", "b.yaml", compare.Plan(), "fpn-d2 compare a.yaml b.yaml")
    words = "--weights w.pth --sizes 64x96 32x32 --batch 1 8 --rounds 3 --warmup 1 --threads 2 --device cpu --train "
    words += "--no-memory --data --torchvision --optimize both --dtype bfloat16 --opts A 1 --opts-a B 2 --opts-b C 3 "
    words += "--output out"
    assert cli.main(["compare", "a.yaml", "b.yaml", *words.split()]) == 0
    expected = compare.Plan(
        weights="w.pth",
        sizes=[(64, 96), (32, 32)],
        batches=[1, 8],
        rounds=3,
        warmup=1,
        threads=2,
        device="cpu",
        train=True,
        memory=False,
        data=True,
        torchvision=True,
        optimize="both",
        dtype="bfloat16",
        opts=["A", "1"],
        opts_a=["B", "2"],
        opts_b=["C", "3"],
        output="out",
    )
    assert taken.pop()[2] == expected
    assert "tables" in capsys.readouterr().out


# What is asked for in a folder with a file "file", a COCO json without content and a weight file of one tensor.
MISTAKES = {
    "scenes --output file": "file exists and does not hold scenes",
    "scenes --output file/below": "cannot write .*/file: File exists",
    "data check nowhere.json": r"looked for .*/nowhere\.json",
    "data check empty.json --report file/r.json": "cannot write .*/file/r.json: Not a directory",
    "predict nowhere.pth . --output out": r"looked for .*/nowhere\.pth",
    "predict weights.pth . --output out": "--config",
    "export file --output out": "file",
    "errors nowhere.json empty.json --output out": r"no file nowhere\.json",
    "errors empty.json empty.json --output out --iou 7": "IoU of a right detection is 7.0",
    "errors empty.json empty.json --output out": "empty.json has no objects",
    "levels file empty.json --output out": "file",
    "doctor nowhere.yaml": r"looked for .*/nowhere\.yaml",
    "doctor coco.yaml": "data set coco_2017_train: its json_file does not exist: .*DETECTRON2_DATASETS",
    "convert-torchvision nowhere.pth out.pth": r"no weight file nowhere\.pth",
    "convert-weights weights.pth file/out.pth": "cannot write .*/file: File exists",
    "study --output file/below": "cannot write .*/file/below: Not a directory",
    "compare coco.yaml nowhere": "no configuration file nowhere: looked for",
    "compare coco.yaml coco.yaml --output file/below": "cannot write .*/file/below: Not a directory",
    "cost-curves --device foo": "the device is 'foo'; it must be cpu, cuda",
    "cost-curves --output file --largest 64": "cannot write .*/file: File exists",
    "benchmark --output file --rows loading": "cannot write .*/file: File exists",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_in_any_verb_is_one_line_and_status_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    (tmp_path / "file").touch()
    (tmp_path / "empty.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    (tmp_path / "coco.yaml").write_text("VERSION: 2\nDATASETS: {TRAIN: [coco_2017_train], TEST: []}\n")
    torch.save({"a": torch.zeros(2)}, "weights.pth")
    assert cli.main(command.split()) == 2
    told = capsys.readouterr().err.splitlines()
    assert re.search(MISTAKES[command], told[-1]) and told[-1].startswith("error: ")
    assert not [line for line in told if "Traceback" in line]
    assert not (tmp_path / "out").exists()
