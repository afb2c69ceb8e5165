"""train_net.py as a user runs it, and Detectron2's own script with our components."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_d2.data.scenes import make_scenes

from .engine.small import ROOT, write_config

# What Detectron2's own tools/train_net.py does, without a line about fpn_d2.
STOCK_SCRIPT = """
import sys

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.data.datasets import register_coco_instances

register_coco_instances("stock_train", {}, sys.argv[1], sys.argv[2])
args = default_argument_parser().parse_args(sys.argv[3:])
cfg = get_cfg()
cfg.merge_from_file(args.config_file)
cfg.merge_from_list(args.opts)
cfg.freeze()
trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=args.resume)
trainer.train()
print("built", type(trainer.model.backbone).__name__, type(trainer.model.roi_heads).__name__, trainer.iter)
"""


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["MODEL.FPN.UPSAMPLE", "nearst"], "nearest"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
        (["--eval-only"], "MODEL.WEIGHTS"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16", "MODEL.DEVICE", "cpu"], "bfloat16"),
        (["--num-gpus", "3", "MODEL.DEVICE", "cpu", "--dist-url", "auto"], "multiple of 3"),
    ],
)
def test_more_mistakes_are_one_line_and_status_2(trained, args, words):
    config, _ = trained
    options = [a for a in args if a.startswith("--") or (args[args.index(a) - 1] in ("--num-gpus", "--dist-url"))]
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
    script = tmp_path / "stock.py"
    script.write_text(STOCK_SCRIPT)
    config = write_config(tmp_path / "config.yaml", scenes)
    command = [
        script, scenes / "annotations" / "instances_train.json", scenes / "images" / "train", "--config-file", config,
        "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('stock_train',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1,
    ]
    done = _run(*command, DETECTRON2_ENV_MODULE="fpn_d2.env_module")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "built PyramidBackbone FPNROIHeads 1"


@pytest.mark.parametrize("first", ["import fpn_d2", "from fpn_d2.modeling.necks import FPN"])
def test_the_environment_module_works_whatever_is_imported_first(first):
    code = (
        f"{first}; from detectron2.config import get_cfg; from detectron2.modeling import BACKBONE_REGISTRY;"
        "print(get_cfg().MODEL.FPN.NECK, 'build_fpn_backbone' in BACKBONE_REGISTRY)"
    )
    done = _run("-c", code, DETECTRON2_ENV_MODULE="fpn_d2.env_module")
    assert done.stdout.split() == ["FPN", "True"], done.stderr
