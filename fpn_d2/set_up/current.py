"""The environment that this runs in."""

import platform
import sys
import tempfile
from pathlib import Path

from .installer import Installer, SetupError, has_compiler, installed, say, this_python


def install_missing() -> int:
    """Install torch, torchvision, OpenCV and Detectron2 into this environment, each where it is missing.

    Nothing that is installed is replaced, not even by another version of it.

    Returns:
        Exit status: 0, or 1 after a sentence on stderr that says what is in the way.
    """
    folder = tempfile.mkdtemp(prefix="fpn_d2-set-up-")
    installer = Installer(
        this_python(),
        Path(folder) / "pip.log",
        place=f"the environment {sys.prefix}",
        elsewhere="use another Python",
    )
    try:
        _install(installer)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command takes it up again", file=sys.stderr)
        return 130
    installer.log.unlink(missing_ok=True)
    Path(folder).rmdir()
    return 0


def _install(installer: Installer) -> None:
    if not installer.has_pip():
        raise SetupError(
            f"{sys.prefix} has no pip, which installs the packages: run {sys.executable} -m ensurepip first"
        )
    say(f"{sys.prefix}, Python {platform.python_version()}: what is there is kept")
    installer.read_version()
    installer.constraints = installed()
    before = installer.problems()
    installer.install_torch()
    if installer.find("cv2")["cv2"]:
        say(f"OpenCV {installer.find('cv2')['cv2']['version']}")
    else:
        installer.pip_install("OpenCV", "opencv-python-headless")
    installer.install_detectron2()
    if problems := installer.problems() - before:
        raise SetupError(f"the installed packages do not fit each other (pip check): {'; '.join(sorted(problems))}")
    if not has_compiler():
        say("no C++ compiler here, which makes detectors on a CPU faster: pip install ziglang brings one")
    say("ready: fpn-d2 quickstart trains a first detector")
