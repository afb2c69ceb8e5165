"""Brings into an environment what fpn_d2 needs and pip cannot install with it; what is there is never replaced."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import detectron2_wheel
from .downloads import plan

TORCH = "2.14.1"
TORCHVISION = "0.29.2"
_TOOLS = ("pip", "setuptools", "wheel")

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
    r"|NameResolutionError|Temporary failure in name resolution"
)


class SetupError(Exception):
    """The set-up cannot go on; the message is one sentence for the user."""


def say(text: str) -> None:
    print(f"[set-up] {text}", flush=True)


def has_compiler() -> bool:
    """Whether a C++ compiler is here; the operations for CPUs are compiled at their first use."""
    asked = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (*asked[:1], "g++", "clang++", "c++"))


def has_gpu() -> bool:
    """Whether there are signs of a GPU that torch could use with other builds than those for CPUs."""
    places = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, places))


class Installer:
    """Installs into one environment.

    Args:
        python: its interpreter.
        log: file for what pip says.
        place: what to call the environment in messages.
        elsewhere: what to do, in messages, where torch has no build for this Python.
        start_again: likewise, where a package is broken.
    """

    def __init__(self, python: Path, log: Path, place: str, elsewhere: str, start_again: str = ""):
        self.python = python
        self.log = log
        self.place = place
        self.elsewhere = elsewhere
        self.start_again = start_again
        self.version = ""
        self.started_at = 0
        self.constraints: list[str] = []

    def install_torch(self) -> None:
        """Install torch and torchvision where they are missing, and hold on to both from here on."""
        found = self.find("torch", "torchvision")
        if not found["torch"]:
            cpu = self.cpu_build()
            wanted = f"torch {TORCH}{cpu} and torchvision {TORCHVISION}{cpu}"
            self.pip_install(wanted, f"torch=={TORCH}{cpu}", f"torchvision=={TORCHVISION}{cpu}")
        elif not found["torchvision"]:
            torch = found["torch"].get("release", found["torch"]["version"])
            self.pip_install(f"the torchvision that goes with torch {torch}", "torchvision", f"torch=={torch}")
        found = self.find("torch", "torchvision")
        for name, what in found.items():
            say(f"{name} {what['version']}")
            if "release" in what:
                self.constraints.append(f"{name}=={what['release']}")

    def cpu_build(self) -> str:
        """ "+cpu" where there is no GPU and a package index in pip's configuration has builds without CUDA, else ""."""
        if platform.system() != "Linux" or platform.machine() != "x86_64" or has_gpu():
            return ""
        if plan(self.python, ["--no-deps", f"torch=={TORCH}+cpu"], self.environment()):
            return "+cpu"
        say("no package index in pip's configuration has torch for CPUs alone (PyTorch's site names one): most of what")
        say("follows are libraries for NVIDIA's GPUs")
        return ""

    def install_detectron2(self, replace_ours: bool = False) -> None:
        """Install our wheel of Detectron2 where none can be imported.

        Args:
            replace_ours: whether an older wheel of ours is replaced.
        """
        found = self.find("detectron2")["detectron2"]
        wheel = found.get("wheel", "") if found else ""
        outdated = "fpn_d2 bootstrap" in wheel and detectron2_wheel.generator() not in wheel
        if found and not (outdated and replace_ours):
            say(f"detectron2 {found['version']}")
            return
        say("building Detectron2 0.6 as a pure-Python wheel")
        with tempfile.TemporaryDirectory() as folder:
            self.call("Detectron2's sources", detectron2_wheel.__file__, folder)
            wheels = [str(path) for path in Path(folder).glob("*.whl")]
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
                    f"{name} is in {self.place} but cannot be imported ({what['error']}): repair or uninstall it"
                    f"{self.start_again}"
                )
        return found

    def problems(self) -> set:
        """Return the lines in which ``pip check`` complains."""
        result = self.run("-m", "pip", "check", stdout=subprocess.PIPE, text=True)
        return set(result.stdout.splitlines()) if result.returncode else set()

    def has_pip(self) -> bool:
        return self.python.exists() and self.run("-m", "pip", "--version", stdout=subprocess.DEVNULL).returncode == 0

    def pip_install(self, what: str, *arguments: str) -> None:
        """Install with pip, after saying how much it will download."""
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(self.constraints))
            options = ["--use-pep517", "--constraint", str(constraints), *arguments]
            downloads = plan(self.python, options, self.environment())
            say(f"installing {what}" + (f"; {downloads.text()}" if downloads else ""))
            self.call(what, "-m", "pip", "install", *options)

    def call(self, what: str, *arguments: str) -> None:
        """Run the environment's Python with its output in the log, telling of large downloads only.

        Raises:
            SetupError: it failed; the message says why, as far as that can be told.
        """
        self.about_to_change()
        lines = []
        with self.popen(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                lines.append(line.strip())
                if re.match(r"Downloading .*\((\d{2,}\.\d MB|.* GB)\)", line.strip()):
                    say(f"  {line.strip()}")
        if process.returncode >= 0:  # it ended by itself, so pip has left nothing half-done
            self.changed()
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
        raise SetupError(f"{what} could not be installed: {self._reason(lines, process.returncode)} {details}")

    def _reason(self, lines: list[str], status: int) -> str:
        errors = [line for line in lines if line.lower().startswith("error: ")]
        reason = errors[-1][len("error: ") :] if errors else f"exit status {status}"
        if "No matching distribution found for torch" in reason:
            system = f"{platform.system()} {platform.machine()}"
            return f"there is no build of it for Python {self.version} on {system}; {self.elsewhere}"
        if "externally-managed-environment" in reason:
            return "this Python belongs to the system: make an environment first, as with python3 -m venv env"
        return reason

    def about_to_change(self) -> None:
        """Called before the environment is changed."""

    def changed(self) -> None:
        """Called after it was changed, or was left as it was."""

    def run(self, *arguments: str, **keywords) -> subprocess.CompletedProcess:
        # Elsewhere than here, where a folder named as a module, a clone of Detectron2's, would be taken for it.
        with tempfile.TemporaryDirectory() as folder:
            with self.popen(*arguments, stderr=subprocess.DEVNULL, cwd=folder, **keywords) as process:
                output, _ = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, output)

    def run_python(self, *arguments: str) -> str:
        result = self.run(*arguments, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            raise SetupError(f"{self.python} does not work (exit status {result.returncode}){self.start_again}")
        return result.stdout

    def environment(self) -> dict[str, str]:
        """Environment variables of the processes that are started."""
        pip = {"PIP_LOG": str(self.log), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_NO_COLOR": "1"}
        return {**os.environ, **pip, "PIP_ROOT_USER_ACTION": "ignore"}

    def popen(self, *arguments: str, **keywords) -> subprocess.Popen:
        return subprocess.Popen([str(self.python), *arguments], env=self.environment(), **keywords)

    def read_version(self) -> str:
        """Version of the interpreter, as 3.11.7; kept in ``version``."""
        self.version = self.run_python("-c", "import sys; print(*sys.version_info[:3], sep='.')").strip()
        return self.version


def installed() -> list[str]:
    """Everything in the environment of this process, but for pip's own tools, as constraints: it is not replaced."""
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    for one in distributions():
        if one.metadata and one.metadata["Name"] and one.version:
            found.setdefault(one.metadata["Name"].lower(), one.version)  # the first is what is imported
    return sorted(f"{name}=={version}" for name, version in found.items() if name not in _TOOLS)


def this_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)
