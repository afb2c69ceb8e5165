"""What starts at once: `import fpn_d2`, and each command's help; and when the components are registered."""

import sys

import pytest

from fpn_d2 import _on_first_use, _requirements
from fpn_d2.cli import VERBS, build_parser
from tests.test_train_net import _run

# What takes seconds to import, or may be missing where Detectron2 is yet to be installed.
HEAVY = ("torch", "torchvision", "detectron2", "cv2", "numpy", "PIL", "yaml", "matplotlib", "pycocotools", "fvcore")
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules], end='')"


def test_the_import_alone_needs_no_other_package():
    done = _run("-S", "-c", f"import fpn_d2, fpn_d2.cli; fpn_d2.config_file('Base-FPN'); {LOADED}")
    assert (done.stdout, done.stderr) == ("[]", "")


@pytest.mark.parametrize("words", [[], *([name] for name in build_parser().verbs()), ["data", "check"]])
def test_help_imports_nothing_heavy_and_warns_of_nothing(words):
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))\n"
        "from fpn_d2.cli import main\n"
        f"main([*{words!r}, '--help'])\n"
    )
    done = _run("-S", "-W", "always", "-c", code)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("usage: fpn-d2") and done.stdout.splitlines()[-1] == "[]"


def test_every_verb_has_a_help():
    assert len(build_parser().verbs()) == len(VERBS) >= 17


def test_components_are_registered_before_anybody_can_look():
    code = (
        "import sys, fpn_d2, fpn_d2._on_first_use as hook\n"
        "from detectron2.modeling.poolers import ROIPooler\n"
        "import detectron2.modeling as m\n"
        "print('build_fpn_backbone' in m.BACKBONE_REGISTRY)\n"
        "print(hook._finder in sys.meta_path, m.__spec__.loader.__dict__.keys() - {'name', 'path'})\n"
    )
    done = _run("-W", "ignore", "-c", code)
    assert done.stdout == "True\nFalse set()\n", done.stderr


def test_after_detectron2_they_are_registered_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(_on_first_use, "register", lambda: asked.append(sys.meta_path.pop(0)))
    _on_first_use.watch()  # Detectron2's registries are there, in this process
    assert asked == [_on_first_use._finder] and _on_first_use._finder not in sys.meta_path


def test_what_is_missing_at_first_may_come_later(monkeypatch):
    def missing():
        raise _requirements.RequirementError("there is no torch")

    monkeypatch.setattr(sys, "meta_path", [_on_first_use._finder, *sys.meta_path])
    monkeypatch.setattr(_requirements, "check", missing)
    with pytest.raises(ImportError, match="no torch"):
        _on_first_use.register()
    assert sys.meta_path[0] is _on_first_use._finder
    monkeypatch.setattr(_requirements, "check", lambda: None)
    _on_first_use.register()
    assert _on_first_use._finder not in sys.meta_path


def test_names_and_modules_are_there_at_their_first_use():
    code = (
        "from fpn_d2.fast.apply import speed_up\n"
        "import fpn_d2\n"
        "print(*(fpn_d2.__dict__.get(name) for name in ('get_cfg', 'engine')))\n"
        "print(fpn_d2.get_cfg().MODEL.FPN.NECK, fpn_d2.engine.Trainer.__name__, fpn_d2.modeling.FPN.__name__)\n"
        "print(set(fpn_d2.__all__) <= set(dir(fpn_d2)), hasattr(fpn_d2, 'nothing'), hasattr(fpn_d2, '__path__'))\n"
        "from fpn_d2 import *\n"
        "print(load, swap, Predictor)\n"
    )
    done = _run("-W", "ignore", "-c", code)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["None None", "FPN Trainer FPN", "True False True"], done.stderr
    assert "function load" in lines[3] and "function swap" in lines[3]


def test_nobody_is_warned_of_what_libraries_do():
    """The words of Detectron2's and fvcore's calls, and one that has to be seen."""
    told = [
        ("`torch.jit.script` is deprecated. Please switch to", "FutureWarning"),
        ("torch.meshgrid: in an upcoming release, it will be required", "UserWarning"),
        ("The given NumPy array is not writable, and PyTorch does not support", "UserWarning"),
        ("TypedStorage is deprecated. It will be removed in the future and", "UserWarning"),
        ("`broadcast_buffers` is deprecated. Use `forward_sync_buffers` instead.", "FutureWarning"),
        ("something else", "UserWarning"),
    ]
    calls = "".join(f"; warnings.warn({text!r}, {kind})" for text, kind in told)
    logged = "; logging.getLogger('torch.utils.cpp_extension').warning('No CUDA runtime is found, using CUDA_HOME=/')"
    done = _run("-S", "-c", f"import fpn_d2.cli, logging, warnings{calls}{logged}")
    assert len(done.stderr.splitlines()) == 1 and "something else" in done.stderr


def test_no_verb_starts_with_a_warning():
    done = _run("-m", "fpn_d2.cli", "train", "--config-file", "nowhere.yaml")
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1, done.stderr
