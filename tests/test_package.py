"""What is installed without a checkout: the wheel out of the source distribution, tried in an empty folder."""

import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from fpn_d2.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command, cwd: Path, **env: str) -> str:
    """Run it with no more of this environment than ``env``; returns what it printed. Of warnings there are none."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr and "CUDA_HOME" not in done.stderr, done.stderr
    return done.stdout


def names_below(*folders: str) -> set[str]:
    """Our files, as they lie in a checkout."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that was built from nothing else."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    left_out = ("__pycache__", "output", "datasets", "build", "dist", "*.egg-info", "shared")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", *left_out))
    try:
        sdist = folder / run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=tree).splitlines()[-1]
    except AssertionError as error:
        if "No module named 'setuptools'" in str(error):
            pytest.skip("this environment has no setuptools")
        raise
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, folder / run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=source).splitlines()[-1]


def test_the_source_distribution_holds_what_a_checkout_does(built):
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = names_below("fpn_d2", "configs", "bootstrap", "tests", "docs")
    assert len(expected) > 300 and expected <= held
    assert {"setup.py", "pyproject.toml", "train_net.py", "Makefile", "README.md", "LICENSE"} <= held


def test_the_wheel_holds_the_package_its_configs_and_its_cpp_sources(built):
    with zipfile.ZipFile(built[1]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {f"fpn_d2/{name}" for name in names_below("configs")}
    assert len(configs) > 70 and "fpn_d2/native/roi_align_cpu.cpp" in held and "fpn_d2/native/cpu_kernels.h" in held
    assert held == names_below("fpn_d2") | configs  # and nothing at the top level of somebody's environment


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """``bin`` of an environment with the wheel; all other packages are this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    if subprocess.run([*pip[:3], "--version"], capture_output=True).returncode:
        pytest.skip("this environment has no pip")
    run(*pip, "--quiet", built[1], cwd=folder)
    # A path alone: what stands in .pth files there, as of an editable fpn_d2, is not read.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(paths)) + "\n")
    return folder / "bin"


def test_the_quickstart_from_an_empty_folder(installed, tmp_path):
    """Cut short; then the command for predicting that it shows, as it stands."""
    env = {"PATH": f"{installed}:/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env["FPN_D2_CACHE"] = str(ROOT / ".pytest_cache" / "compiled")
    folder = tmp_path / "empty"
    folder.mkdir()
    where = run(installed / "fpn-d2", "configs", "COCO-Detection/faster_rcnn_R_50_FPN_1x", cwd=folder, **env)
    assert Path(where.strip()).is_relative_to(installed.parent) and Path(where.strip()).is_file()

    short = "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 16".split()
    scenes = ["--train", 2, "--val", 2]
    shown = run("fpn-d2", "quickstart", *scenes, "--opts", *short, cwd=folder, **env)
    steps = [line for line in shown.splitlines() if line.startswith("[quickstart] ")]
    assert "1 of 2: making 2 synthetic scenes" in steps[0] and "next: " in steps[1]
    assert "2 of 2: training" in steps[2] and "next: " in steps[4] and steps[5].startswith("[quickstart] done: ")
    assert "\nAP50 " in shown and (folder / "output" / "quickstart" / "detections.png").is_file()

    own_data, predict, swap = [shlex.split(line) for line in shown.splitlines() if line.startswith("fpn-d2 ")]
    assert shown.splitlines()[-1] == shlex.join(swap)
    for words in (own_data, swap):
        assert build_parser().parse_args(words[1:]).verb == "train"
    assert ["MODEL.BACKBONE.NAME", "build_fpn_backbone"] == swap[-4:-2]
    assert """ DATASETS.TRAIN "('my_train',)" DATASETS.TEST "('my_val',)" """ in shown  # as a person writes it
    assert own_data[3].startswith("own_data/faster_rcnn_")  # with weights where their package is installed
    assert run(*predict, cwd=folder, **env).startswith("2 images: output/quickstart/predictions/")
