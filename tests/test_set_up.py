"""What `fpn-d2 install-detectron2` installs, keeps and says. No network: pip gets a folder of small packages."""

import functools
import http.server
import os
import platform
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from fpn_d2 import set_up
from fpn_d2.set_up import current, downloads, installer
from fpn_d2.set_up.downloads import Downloads, plan, size_of, size_text
from fpn_d2.set_up.installer import Installer, SetupError

TORCH, TORCHVISION = f"{installer.TORCH}", f"{installer.TORCHVISION}"


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), filling: int = 0) -> Path:
    """A wheel with one module, and some bytes that cannot be compressed away."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n#" + "x" * filling)
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Root-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\n{tags}")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder whose wheels a package index on this machine offers, one folder a name, with their metadata."""
    folder = tmp_path / "index"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield folder
    server.shutdown()


def offer(index: Path, name: str, version: str, **keywords) -> Path:
    (index / name).mkdir(exist_ok=True)
    return make_wheel(index / name, name, version, **keywords)


@pytest.fixture
def environment(tmp_path):
    """An installer into an empty environment; it has this one's pip."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    import pip

    (site,) = (folder / "lib").glob("python*/site-packages")
    pip_only = tmp_path / "pip_only"
    pip_only.mkdir()
    (pip_only / "pip").symlink_to(Path(pip.__file__).parent)
    (site / "pip.pth").write_text(f"{pip_only}\n")
    return Installer(folder / "bin" / "python", tmp_path / "pip.log", place="the environment", elsewhere="go elsewhere")


@pytest.fixture(autouse=True)
def the_pip_at_hand_will_do(monkeypatch):
    """An older one downloads what it looks at, which is no harm here."""
    monkeypatch.setattr(downloads, "_PIP", (0, 0))


def test_sizes_are_said_before_anything_is_downloaded(index, environment, capsys):
    offer(index, "large", "1.0", requires=("small",), filling=2_000_000)
    offer(index, "small", "3.0")
    environment.pip_install("the large one", "large")
    shown = capsys.readouterr().out
    assert shown.startswith("[set-up] installing the large one; to download: 2 packages, 2.0 MB (large 2.0 MB, small ")
    assert environment.find("large", "small", "absent") == {
        "large": {"version": "1.0", "release": "1.0", "wheel": environment.find("large")["large"]["wheel"]},
        "small": {"version": "3.0", "release": "3.0", "wheel": environment.find("small")["small"]["wheel"]},
        "absent": None,
    }


def test_what_an_index_does_not_have_has_no_plan(index, environment):
    assert plan(environment.python, ["absent"], environment.environment()) is None


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="CPU builds are for Linux")
@pytest.mark.parametrize(("offered", "gpu", "taken"), [(True, False, "+cpu"), (True, True, ""), (False, False, "")])
def test_torch_for_cpus_is_taken_where_it_is_offered(index, environment, monkeypatch, capsys, offered, gpu, taken):
    monkeypatch.setattr(installer, "has_gpu", lambda: gpu)
    for build in ("", "+cu128", *(["+cpu"] if offered else [])):
        offer(index, "torch", f"{TORCH}{build}")
        offer(index, "torchvision", f"{TORCHVISION}{build}")
    environment.install_torch()
    # Without a choice of ours, pip takes what sorts last.
    expected = taken or "+cu128"
    assert environment.constraints == [f"torch=={TORCH}{expected}", f"torchvision=={TORCHVISION}{expected}"]
    assert ("no package index in pip's configuration has torch for CPUs" in capsys.readouterr().out) == (
        not offered and not gpu
    )


def test_what_is_installed_is_never_replaced(index, environment, monkeypatch):
    offer(index, "base", "1.0")
    environment.pip_install("base", "base==1.0")
    offer(index, "base", "2.0")
    offer(index, "new", "1.0", requires=("base>=2",))
    environment.constraints = ["base==1.0"]
    with pytest.raises(SetupError, match="new could not be installed"):
        environment.pip_install("new", "new")
    assert environment.find("base", "new") == {"base": environment.find("base")["base"], "new": None}
    assert environment.find("base")["base"]["version"] == "1.0"


def test_a_clone_in_this_folder_is_not_taken_for_the_package(environment, tmp_path, monkeypatch):
    (tmp_path / "clone" / "detectron2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone")
    assert environment.find("detectron2") == {"detectron2": None}


def test_sizes():
    assert [size_text(n) for n in (7, 5400, 54_000, 9_940_000, 554_618_164, 2_900_000_000)] == [
        *("7 bytes", "5.4 kB", "54 kB", "9.9 MB", "555 MB", "2.9 GB"),
    ]
    assert Downloads({"a": None}).text() == "to download: 1 package of unknown size"
    assert Downloads({"a": 0}).text() == Downloads({}).text() == "nothing to download"
    four = {"a": 1_000_000, "b": None, "c": 3_000_000, "d": 2_000, "e": 40_000, "f": 0}
    assert Downloads(four).text() == "to download: 5 packages, at least 4.0 MB (c 3.0 MB, a 1.0 MB, e 40 kB)"


def test_what_lies_here_is_not_downloaded_and_what_nobody_answers_is_unknown(tmp_path):
    assert size_of(tmp_path.as_uri()) == 0
    assert size_of("http://127.0.0.1:9/x.whl") is None


class Recorded(Installer):
    """An installer that only notes what it is asked to."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        Recorded.asked = []

    def find(self, *names):
        return {name: Recorded.there.get(name) for name in names}

    def has_pip(self):
        return Recorded.pip

    def problems(self):
        return set()

    def pip_install(self, what, *arguments):
        Recorded.asked.append(arguments)

    def call(self, what, *arguments):
        Path(arguments[-1], "detectron2-0.6-py3-none-any.whl").touch()


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(current, "Installer", Recorded)
    monkeypatch.setattr(Recorded, "pip", True, raising=False)
    monkeypatch.setattr(Recorded, "cpu_build", lambda self: "")
    return Recorded


def test_into_this_environment_goes_what_is_missing(recorded, monkeypatch, capsys):
    there = {"torch": {"version": "2.0", "release": "2.0"}, "torchvision": {"version": "0.15", "release": "0.15"}}
    monkeypatch.setattr(Recorded, "there", there, raising=False)
    assert set_up.install_missing() == 0
    (opencv,), (wheel,) = Recorded.asked
    assert opencv == "opencv-python-headless" and wheel.endswith("detectron2-0.6-py3-none-any.whl")
    assert "[set-up] torch 2.0\n" in capsys.readouterr().out


def test_where_all_is_there_nothing_happens_and_is_said(recorded, monkeypatch, capsys):
    there = {name: {"version": "9.0", "wheel": ""} for name in ("torch", "torchvision", "cv2", "detectron2")}
    monkeypatch.setattr(Recorded, "there", there, raising=False)
    assert set_up.install_missing() == 0
    assert Recorded.asked == []
    assert "[set-up] detectron2 9.0\n" in capsys.readouterr().out


def test_without_pip_it_says_how_to_get_it(recorded, monkeypatch, capsys):
    monkeypatch.setattr(Recorded, "pip", False)
    assert set_up.install_missing() == 1
    assert "-m ensurepip" in capsys.readouterr().err


def test_all_but_pips_own_tools_is_held_on_to():
    held = installer.installed()
    assert any(line.startswith("torch==") for line in held) and any(line.startswith("detectron2==") for line in held)
    assert not [line for line in held if line.split("==")[0] in ("pip", "setuptools", "wheel")]


def test_it_knows_the_standard_library_alone():
    code = "import sys, fpn_d2.set_up; print([m for m in ('torch', 'numpy', 'pip', 'setuptools') if m in sys.modules])"
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
