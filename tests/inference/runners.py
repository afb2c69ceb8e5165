"""The files that are written beside an exported detector, run as their user runs them."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def detector_of(to: str, path: Path):
    """The ``Detector`` of the runner beside ``path``, imported from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        for name in ("runner_shapes", "runner_base", f"{to}_runner"):
            patch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(f"{to}_runner").Detector(str(path))


def run_alone(to: str, path: Path, folder: Path, without: tuple[str, ...] = ()) -> list[list[str]]:
    """Run the runner on an image in a process where Detectron2, this package and ``without`` cannot be imported.

    Returns:
        The words of each line that it prints.
    """
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "image.png")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({('detectron2', 'fpn_d2', *without)!r})); "
        f"sys.path.insert(0, ''); runpy.run_path('{to}_runner.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, path.name, str(folder / "image.png")]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
