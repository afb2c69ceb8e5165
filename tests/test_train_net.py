"""train_net.py as a user runs it, and Detectron2's own script with our components."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from fpn_d2.data.scenes import make_scenes

from .engine.small import ROOT, write_config


def _stock_script() -> Path:
    """Detectron2's own tools/train_net.py, unchanged: from a checkout, or from beside the wheel of `make setup`."""
    import detectron2

    candidates = [Path(detectron2.__file__).parents[1] / "tools" / "train_net.py"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("detectron2") or []
        candidates += [Path(f.locate()) for f in files if str(f).endswith("dist-info/tools/train_net.py")]
    for path in candidates:
        if path.is_file():
            return path
    pytest.skip("this Detectron2 comes without its tools/train_net.py: use a checkout of it, or `make setup`")


def _as_coco_2017(scenes: Path, root: Path) -> None:
    """Put the scenes where Detectron2 looks for COCO, with COCO's own 80 categories."""
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    for split in ("train", "val"):
        shutil.copytree(scenes / "images" / split, root / "coco" / f"{split}2017")
        content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        target = root / "coco" / "annotations" / f"instances_{split}2017.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({**content, "categories": categories}))


def _run(*command, **env):
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": path, **env},
    )


def _train_net(*args):
    return _run(ROOT / "train_net.py", *args)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train_net") / "scenes"
    return make_scenes(folder, train=4, val=2, image_size=64, min_size=8, max_objects=3, empty=0.0, progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """The configuration file and the finished process of a short training."""
    config = write_config(tmp_path_factory.mktemp("run") / "config.yaml", scenes)
    return config, _train_net("--config-file", config, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)


def test_training_ends_in_a_table_and_one_last_line(trained):
    config, done = trained
    assert done.returncode == 0, done.stderr
    out = config.parent / "out"
    last = done.stdout.rstrip().splitlines()[-1]
    assert re.fullmatch(rf"AP50 \d+\.\d  picture: {out}/detections\.png", last)
    assert (out / "detections.png").is_file()
    assert "AP50    AP75" in done.stdout
    assert {"model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "log.txt"} <= set(os.listdir(out))
    # The terminal stays readable; the log file has everything.
    assert "Environment info" not in done.stdout
    log = (out / "log.txt").read_text()
    assert "Environment info" in log
    assert last in log


def test_a_finished_model_evaluates_to_the_same_numbers(trained, tmp_path):
    config, training = trained
    again = _train_net(
        "--config-file", config.parent / "out" / "config.yaml", "--eval-only", "OUTPUT_DIR", tmp_path,
        "MODEL.WEIGHTS", config.parent / "out" / "model_final.pth",
    )
    assert again.returncode == 0, again.stderr
    table = re.compile(r"Results in percent:\n(.*?)\nAP50", re.DOTALL)
    tables = [re.sub(r"\[.*?\].*\n", "", table.search(run.stdout)[1]) for run in (training, again)]
    assert tables[0] == tables[1]
    assert f"picture: {tmp_path}/detections.png" in again.stdout.splitlines()[-1]


def test_a_mistake_is_one_line_and_status_2(trained):
    config, _ = trained
    done = _train_net("--config-file", config, "MODEL.FPN.NEK", "FPN")
    assert done.returncode == 2
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: there is no key MODEL.FPN.NEK (did you mean MODEL.FPN.NECK?)"]
    assert "Traceback" not in done.stderr


def test_no_configuration_is_a_mistake(tmp_path):
    """Detectron2's defaults would train a C4 model for 40,000 iterations."""
    done = _train_net("OUTPUT_DIR", tmp_path / "out")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--config-file is missing" in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# Arguments of train_net.py that a value follows.
VALUED = ("--num-gpus", "--num-machines", "--dist-url")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["MODEL.FPN.UPSAMPLE", "nearst"], "nearest"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
        (["--eval-only"], "MODEL.WEIGHTS"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", "MODEL.DEVICE", "cpu"], "bfloat16"),
        (["--num-gpus", "3", "MODEL.DEVICE", "cpu", "--dist-url", "auto"], "multiple of 3"),
        (["--num-machines", "2", "--dist-url", "auto"], "--dist-url tcp://HOST:PORT"),
    ],
)
def test_more_mistakes_are_one_line_and_status_2(trained, args, words):
    config, _ = trained
    options = [a for a in args if a.startswith("--") or (args[args.index(a) - 1] in VALUED)]
    keys = [a for a in args if a not in options]
    done = _train_net("--config-file", config, *options, "OUTPUT_DIR", config.parent / "other", *keys)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr


@pytest.mark.slow
def test_two_processes_on_a_cpu(trained, tmp_path):
    config, _ = trained
    done = _train_net(
        "--config-file", config, "--num-gpus", 2, "--dist-url", "auto", "OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("AP50 ")
    assert (tmp_path / "log.txt.rank1").is_file()


def test_detectron2s_own_script_sees_our_components(tmp_path, scenes):
    script = _stock_script()
    _as_coco_2017(scenes, tmp_path)
    config = write_config(tmp_path / "config.yaml", scenes)  # with our keys in it
    done = _run(
        *[script, "--config-file", config, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 1],
        *["DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val',)"],
        DETECTRON2_ENV_MODULE="fpn_d2.env_module",
        DETECTRON2_DATASETS=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "(backbone): FPN(" in done.stdout and "(roi_heads): FPNROIHeads(" in done.stdout
    assert "AP50" in done.stdout
    assert (tmp_path / "out" / "model_final.pth").is_file()


@pytest.mark.parametrize("first", ["import fpn_d2", "from fpn_d2.modeling.necks import FPN"])
def test_the_environment_module_works_whatever_is_imported_first(first):
    code = (
        f"{first}; from detectron2.config import get_cfg; from detectron2.modeling import BACKBONE_REGISTRY;"
        "print(get_cfg().MODEL.FPN.NECK, 'build_fpn_backbone' in BACKBONE_REGISTRY)"
    )
    done = _run("-c", code, DETECTRON2_ENV_MODULE="fpn_d2.env_module")
    assert done.stdout.split() == ["FPN", "True"], done.stderr
