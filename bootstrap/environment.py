"""Make an environment ready for fpn_d2, or find out in no time that it is ready.

What is there already is kept: an importable torch, torchvision, Detectron2 or OpenCV is never replaced. A new
environment gets all of them from the Python package index. Only the standard library is needed to start.
"""

import argparse
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

from fpn_d2.set_up.installer import Installer, SetupError, has_compiler, say

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Files in the environment's folder.
STAMP = "fpn_d2-ready"  # fingerprint of the set-up that ended well
OURS = "fpn_d2-made-this"  # only in environments made here, which may be thrown away; holds the folder's own path
BUSY = "fpn_d2-busy"  # there while pip is at work: left behind, an installation was broken off half-way
LOG = "setup.log"


class Environment(Installer):
    """A Python environment in a folder; makes it if need be and installs fpn_d2 and what it needs into it.

    Args:
        folder: the environment's folder, with the interpreter at ``bin/python``.
    """

    def __init__(self, folder: pathlib.Path):
        # Not resolved: bin/python of an environment is found through the path that its user gave.
        self.folder = pathlib.Path(os.path.abspath(folder))
        super().__init__(
            self.folder / "bin" / "python",
            self.folder / LOG,
            place=str(self.folder),
            elsewhere=f"name another Python with PYTHON=/path/to/python3 (and remove {self.folder}), or an environment "
            "that has torch with VENV=/path/to/environment",
            start_again=", or remove the whole folder to start again",
        )

    def fingerprint(self) -> str:
        """Return what the set-up depends on, hashed: a change of any of it makes the set-up run again."""
        digest = hashlib.sha256(f"{ROOT}\n{os.path.realpath(self.python)}\n".encode())
        places = [(ROOT / "bootstrap").glob("*.py"), (ROOT / "fpn_d2" / "set_up").glob("*.py")]
        for path in [ROOT / "setup.py", *sorted(path for place in places for path in place)]:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def is_ready(self) -> bool:
        stamp, script = self.folder / STAMP, self.folder / "bin" / "fpn-d2"
        there = self.python.exists() and script.exists() and stamp.is_file()
        return there and stamp.read_text() == self.fingerprint()

    def set_up(self) -> None:
        """Do all that is missing.

        Raises:
            SetupError: it could not be done.
        """
        self.make()
        (self.folder / STAMP).unlink(missing_ok=True)
        with open(self.log, "a") as log:
            self.started_at = log.tell()
        problems_before = self.problems()
        self.install_torch()
        extras = ["test"] if self.find("cv2")["cv2"] else ["test", "opencv"]
        if not has_compiler():
            extras.append("compiler")
        self.install_detectron2()
        what = f"fpn_d2 and its test tools ({', '.join(extras)}) from {ROOT}"
        self.pip_install(what, "--editable", f"{ROOT}[{','.join(extras)}]")
        if problems := self.problems() - problems_before:
            raise SetupError(f"the installed packages do not fit each other (pip check): {'; '.join(sorted(problems))}")
        (self.folder / STAMP).write_text(self.fingerprint())
        say(f"{self.folder} is ready")

    def make(self) -> None:
        """Make the environment unless there is one that works; one of our own that does not is made anew."""
        ours = self.folder / OURS
        if ours.is_file():
            moved = ours.read_text() != str(self.folder)
            if moved or (self.folder / BUSY).exists() or not self.has_pip():
                say(f"{self.folder} was {'moved' if moved else 'left half-made'}: starting again")
                shutil.rmtree(self.folder)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            if not self.has_pip():
                raise SetupError(
                    f"{self.folder} exists but is no Python environment with a working bin/python and pip: remove it, "
                    "or name another folder, as in: make test VENV=/path/to/environment"
                )
            say(f"using the environment {self.folder}; the torch and Detectron2 found there are kept")
        if not self.python.exists():
            self.create()
        if tuple(int(part) for part in self.read_version().split(".")[:2]) < (3, 10):
            raise SetupError(f"{self.folder} has Python {self.version}, but 3.10 or newer is needed; set another VENV")

    def create(self) -> None:
        if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
            raise SetupError(
                f"{sys.executable} lacks the module venv or ensurepip, without which no environment can be made: "
                "install it (Debian and Ubuntu: the package python3-venv) or name another with PYTHON=/path/to/python3"
            )
        say(f"making {self.folder} with Python {platform.python_version()} ({sys.executable})")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / OURS).write_text(str(self.folder))
        (self.folder / BUSY).touch()
        with open(self.log, "a") as log:
            command = [sys.executable, "-m", "venv", str(self.folder)]
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                raise SetupError(f"{sys.executable} -m venv failed; its messages are in {self.log}")
        (self.folder / BUSY).unlink()

    def install_detectron2(self, replace_ours: bool | None = None) -> None:
        """As in `Installer`; an older wheel of ours is replaced in an environment that was made here."""
        super().install_detectron2((self.folder / OURS).is_file() if replace_ours is None else replace_ours)

    def about_to_change(self) -> None:
        (self.folder / BUSY).touch()

    def changed(self) -> None:
        (self.folder / BUSY).unlink()


def main(arguments: list | None = None) -> int:
    """Set up the environment that ``arguments`` name; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m bootstrap", description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: %(default)s)")
    environment = Environment(pathlib.Path(parser.parse_args(arguments).venv))
    try:
        if not environment.is_ready():
            environment.set_up()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command takes it up again", file=sys.stderr)
        return 130
    return 0
