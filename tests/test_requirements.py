"""What pip may install with us, and what ``import fpn_d2`` says about what pip may not."""

import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest

from fpn_d2 import _requirements

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def metadata(monkeypatch):
    """The keywords that setup.py hands to setuptools."""
    keywords = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: keywords.update(given))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    return keywords


def test_pip_install_touches_no_torch_detectron2_or_opencv(metadata):
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in metadata["install_requires"]}
    assert names == {"numpy", "pillow", "matplotlib", "pycocotools", "tqdm", "faster-coco-eval"}
    tools = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in metadata["extras_require"]["test"]}
    assert not tools & {"torch", "torchvision", "detectron2", "opencv-python", "opencv-python-headless"}


def use_fpn_d2(folder: pathlib.Path, modules: dict, use: str, **variables: str) -> str:
    """Use fpn_d2 where ``modules`` (name: source) stand before the real ones; return the error's last line."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]), **variables}
    result = subprocess.run(
        [sys.executable, "-c", use], env=environment, cwd=folder, text=True, capture_output=True
    )
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


NEW = "__version__ = '99.0'\n"
GOOD = {"torch": NEW, "torchvision": NEW}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"torch": "__version__ = '1.13.1+cu117'"}, "fpn_d2 needs torch 2.0 or newer, found 1.13.1+cu117: "),
        (
            {"torch": "raise ModuleNotFoundError(name='torch')"},
            "fpn_d2 needs torch 2.0 or newer, found none: run `fpn-d2 install-detectron2`",
        ),
        (GOOD | {"torchvision": "__version__ = '0.9'"}, "fpn_d2 needs torchvision 0.15 or newer, found 0.9: "),
        (
            GOOD | {"torchvision": "raise RuntimeError('operator torchvision::nms does not exist')"},
            "fpn_d2 needs torchvision 0.15 or newer, found one that cannot be imported (operator torchvision::nms does",
        ),
        (GOOD | {"detectron2": "__version__ = '0.5'"}, "fpn_d2 needs Detectron2 0.6 or newer, found 0.5: "),
        (
            GOOD | {"detectron2": "raise ModuleNotFoundError(name='detectron2')"},
            "fpn_d2 needs Detectron2 0.6 or newer, found none: run `fpn-d2 install-detectron2`",
        ),
    ],
)
def test_a_missing_broken_or_old_one_is_one_clear_import_error(tmp_path, modules, message):
    use = "import fpn_d2; fpn_d2.get_cfg()" if "torch" in modules else "import fpn_d2.engine"
    last = use_fpn_d2(tmp_path, modules, use)
    assert last.startswith(f"fpn_d2._requirements.RequirementError: {message}")


def test_opencv_is_needed_for_images_alone(tmp_path):
    """Components are registered, and a configuration made, without it."""
    modules = {"cv2": "raise ModuleNotFoundError(name='cv2')"}
    use = "import fpn_d2.modeling, sys; fpn_d2.modeling.FPN, fpn_d2.get_cfg(); fpn_d2.load"
    message = "fpn_d2._requirements.RequirementError: fpn_d2 needs OpenCV 4.0 or newer, found none: run `fpn-d2"
    assert use_fpn_d2(tmp_path, modules, use).startswith(message)


AS_DETECTRON2 = """
import importlib, os
module = importlib.import_module(os.environ["DETECTRON2_ENV_MODULE"])
assert hasattr(module, "setup_environment"), "it does not have the required callable attribute 'setup_environment'."
"""


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("fpn_d2.env_modul", r"cannot be used (did you mean fpn_d2.env_module?): No module named 'fpn_d2.env_modul'"),
        ("nowhere.env", "cannot be used: No module named 'nowhere'"),
        ("json", "cannot be used: it does not have the required callable attribute 'setup_environment'."),
    ],
)
def test_a_wrong_name_in_detectron2s_variable_is_not_blamed_on_its_installation(tmp_path, named, message):
    modules = GOOD | {"detectron2": AS_DETECTRON2}
    said = use_fpn_d2(tmp_path, modules, "import fpn_d2.engine", DETECTRON2_ENV_MODULE=named)
    assert said == f"fpn_d2._requirements.RequirementError: DETECTRON2_ENV_MODULE names '{named}', which {message}"


def test_versions_are_compared_as_numbers(monkeypatch):
    module = types.ModuleType("some_module")
    monkeypatch.setitem(sys.modules, "some_module", module)
    requirement = (("some_module", "Some", (0, 6), "do it"),)
    for version in ("0.6", "0.10", "0.6+cpu", "1.0a1", None):  # None: Detectron2 while it is itself being imported
        module.__version__ = version
        _requirements.check(requirement)
    for version in ("0.5.9", "0.5+cu118"):
        module.__version__ = version
        with pytest.raises(ImportError, match=re.escape(f"found {version}: do it")):
            _requirements.check(requirement)
