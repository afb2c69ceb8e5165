"""Make an environment ready for fpn_d2, or find out in no time that it is ready.

What is there already is kept: an importable torch, torchvision, Detectron2 or OpenCV is never replaced. A new
environment gets all of them from the Python package index. Only the standard library is needed to start.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

from bootstrap.detectron2_wheel import generator

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = "2.14.1"
TORCHVISION = "0.29.2"

# Files in the environment's folder.
STAMP = "fpn_d2-ready"  # fingerprint of the set-up that ended well
OURS = "fpn_d2-made-this"  # only in environments made here, which may be thrown away; holds the folder's own path
BUSY = "fpn_d2-busy"  # there while pip is at work: left behind, an installation was broken off half-way
LOG = "setup.log"

# Reports, as JSON on the last line of stdout: for each name None (not there) or {"version": ...} or {"error": ...}.
PROBE = """
import importlib, importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        found[name] = {"version": str(getattr(module, "__version__", None))}
        if getattr(module, "__file__", None) is None:
            found[name] = {"error": "its folder is incomplete"}
    except ModuleNotFoundError as error:
        found[name] = None if error.name == name else {"error": str(error)}
    except Exception as error:
        found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    if found[name]:
        found[name]["release"] = distribution.version
        found[name]["wheel"] = distribution.read_text("WHEEL") or ""
print("\\n" + json.dumps(found))
"""

NO_NETWORK = re.compile(
    r"NewConnectionError|Max retries exceeded|Retrying \(Retry\(|connection error:|ConnectTimeout|ReadTimeout"
    r"|Temporary failure in name resolution|Network is unreachable|ProxyError|SSLError"
)


class SetupError(Exception):
    """The set-up cannot go on; the message is one sentence for the user."""


def say(text: str) -> None:
    print(f"[set-up] {text}", flush=True)


def has_compiler() -> bool:
    """Whether a C++ compiler is here; the operations for CPUs are compiled at their first use."""
    asked = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (*asked[:1], "g++", "clang++", "c++"))


class Environment:
    """A Python environment in a folder; makes it if need be and installs what fpn_d2 needs into it.

    Args:
        folder: the environment's folder, with the interpreter at ``bin/python``.
    """

    def __init__(self, folder: pathlib.Path):
        # Not resolved: bin/python of an environment is found through the path that its user gave.
        self.folder = pathlib.Path(os.path.abspath(folder))
        self.python = self.folder / "bin" / "python"
        self.log = self.folder / LOG
        self.version = ""
        self.started_at = 0
        self.constraints = []

    def fingerprint(self) -> str:
        """Return what the set-up depends on, hashed: a change of any of it makes the set-up run again."""
        digest = hashlib.sha256(f"{ROOT}\n{os.path.realpath(self.python)}\n".encode())
        for path in [ROOT / "setup.py", *sorted((ROOT / "bootstrap").glob("*.py"))]:
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
        say(f"installing fpn_d2 and its test tools ({', '.join(extras)}) from {ROOT}")
        self.pip_install("fpn_d2", "--editable", f"{ROOT}[{','.join(extras)}]")
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
        self.version = self.run_python("-c", "import sys; print(*sys.version_info[:3], sep='.')").strip()
        if tuple(int(part) for part in self.version.split(".")[:2]) < (3, 10):
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

    def install_torch(self) -> None:
        """Install torch and torchvision where they are missing, and hold on to both from here on."""
        found = self.find("torch", "torchvision")
        if not found["torch"]:
            wanted = f"torch {TORCH} and torchvision {TORCHVISION}"
            say(f"installing {wanted}: a large download, some minutes on a slow line")
            self.pip_install(wanted, f"torch=={TORCH}", f"torchvision=={TORCHVISION}")
        elif not found["torchvision"]:
            torch = found["torch"].get("release", found["torch"]["version"])
            say(f"installing the torchvision that goes with torch {torch}")
            self.pip_install(f"a torchvision for torch {torch}", "torchvision", f"torch=={torch}")
        found = self.find("torch", "torchvision")
        for name, what in found.items():
            say(f"{name} {what['version']}")
            if "release" in what:
                self.constraints.append(f"{name}=={what['release']}")

    def install_detectron2(self) -> None:
        """Install our wheel of Detectron2 where none can be imported, or over an older one in our own environment."""
        found = self.find("detectron2")["detectron2"]
        wheel = found.get("wheel", "") if found else ""
        outdated = (self.folder / OURS).is_file() and "fpn_d2 bootstrap" in wheel and generator() not in wheel
        if found and not outdated:
            say(f"detectron2 {found['version']}")
            return
        say("building Detectron2 0.6 as a pure-Python wheel and installing it")
        with tempfile.TemporaryDirectory() as folder:
            self.call("Detectron2's sources", "-m", "bootstrap.detectron2_wheel", folder)
            wheels = [str(path) for path in pathlib.Path(folder).glob("*.whl")]
            if found:
                self.call("the older build of Detectron2", "-m", "pip", "uninstall", "--yes", "detectron2")
            self.pip_install("Detectron2", *wheels)
        self.find("detectron2")

    def find(self, *names: str) -> dict:
        """Return ``{name: None or {"version": ..., ...}}`` of the modules ``names``.

        Raises:
            SetupError: one is there but cannot be imported.
        """
        found = json.loads(self.run_python("-c", PROBE, *names).splitlines()[-1])
        for name, what in found.items():
            if what and "error" in what:
                raise SetupError(
                    f"{name} is in {self.folder} but cannot be imported ({what['error']}): repair or uninstall it, or "
                    "remove the whole folder to start again"
                )
        return found

    def problems(self) -> set:
        """Return the lines in which ``pip check`` complains."""
        result = self.run("-m", "pip", "check", stdout=subprocess.PIPE, text=True)
        return set(result.stdout.splitlines()) if result.returncode else set()

    def has_pip(self) -> bool:
        return self.python.exists() and self.run("-m", "pip", "--version", stdout=subprocess.DEVNULL).returncode == 0

    def pip_install(self, what: str, *arguments: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            constraints = pathlib.Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(self.constraints))
            self.call(what, "-m", "pip", "install", "--use-pep517", "--constraint", str(constraints), *arguments)

    def call(self, what: str, *arguments: str) -> None:
        """Run the environment's Python with its output in the log, telling of large downloads only.

        Raises:
            SetupError: it failed; the message says why, as far as that can be told.
        """
        busy = self.folder / BUSY
        busy.touch()
        lines = []
        with self.popen(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                lines.append(line.strip())
                if re.match(r"Downloading .*\((\d{2,}\.\d MB|.* GB)\)", line.strip()):
                    say(f"  {line.strip()}")
        if process.returncode >= 0:  # it ended by itself, so pip has left nothing half-done
            busy.unlink()
        if process.returncode == 0:
            return
        with open(self.log, "a+", errors="replace") as log:
            log.write("\n".join(["", *lines, ""]))
            log.seek(self.started_at)
            record = log.read()
        details = f"(details: {self.log})"
        if NO_NETWORK.search(record):
            raise SetupError(
                f"{what} could not be downloaded because the package index could not be reached: connect to the "
                f"network and run the same command again, it goes on from here {details}"
            )
        errors = [line for line in lines if line.lower().startswith("error: ")]
        reason = errors[-1][len("error: ") :] if errors else f"exit status {process.returncode}"
        if "No matching distribution found for torch" in reason:
            reason = (
                f"there is no build of it for Python {self.version} on {platform.system()} "
                f"{platform.machine()}; name another Python with PYTHON=/path/to/python3 (and remove {self.folder}), "
                "or an environment that has torch with VENV=/path/to/environment"
            )
        raise SetupError(f"{what} could not be installed: {reason} {details}")

    def run(self, *arguments: str, **keywords) -> subprocess.CompletedProcess:
        with self.popen(*arguments, stderr=subprocess.DEVNULL, **keywords) as process:
            output, _ = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, output)

    def run_python(self, *arguments: str) -> str:
        result = self.run(*arguments, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            raise SetupError(f"{self.python} does not work (exit status {result.returncode}); remove {self.folder}")
        return result.stdout

    def popen(self, *arguments: str, **keywords) -> subprocess.Popen:
        pip = {"PIP_LOG": str(self.log), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_NO_COLOR": "1"}
        pip["PIP_ROOT_USER_ACTION"] = "ignore"
        return subprocess.Popen([str(self.python), *arguments], cwd=ROOT, env={**os.environ, **pip}, **keywords)


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
