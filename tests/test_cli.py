import inspect
import json
import subprocess
import sys

import pytest

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
    assert cli.main([*command, "2"]) == 1
    assert "fpn-d2 scenes: " in capsys.readouterr().err
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
    assert result.returncode == 1
    assert result.stderr == "fpn-d2 scenes: Expected train to be a whole number of at least 1, got 0.\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["scenes"]])
def test_unknown_or_incomplete_command_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: fpn-d2" in capsys.readouterr().err
