"""The set-up: the wheel of Detectron2, and which environments are made, kept, made anew or refused. No network."""

import base64
import hashlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from detectron2.utils.collect_env import collect_env_info

from bootstrap import environment
from bootstrap.environment import Environment
from fpn_d2.set_up import detectron2_wheel, installer
from fpn_d2.set_up.detectron2_wheel import MENDS, ROOT, Mend, WheelError, mended_files, write_wheel
from fpn_d2.set_up.installer import SetupError

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SOURCES = {
    "LICENSE": "the licence\n",
    "setup.py": "raise SystemExit('must not run')\n",
    "detectron2/__init__.py": "__version__ = '0.6'\n",
    "detectron2/old.py": "a = np.bool\nb = np.bool\n",
    "detectron2/model_zoo/configs/x.yaml": "MODEL: {}\n",
    "projects/PointRend/point_rend/__init__.py": "point = 1\n",
    "projects/PointRend/train_net.py": "not packed\n",
    "tools/train_net.py": "as it was\n",
    "tools/benchmark.py": "not packed\n",
}
MEND = Mend("detectron2/old.py", "np.bool", "bool", 2, "numpy removed it")


def make_sdist(folder: pathlib.Path, sources: dict = SOURCES) -> tuple:
    """Write ``sources`` as a source distribution; return its path and sha256."""
    path = folder / "sdist.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in sources.items():
            member = tarfile.TarInfo(ROOT + name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class TestMendedFiles:
    def test_packs_the_packages_with_the_mends_made(self, tmp_path):
        files = mended_files(*make_sdist(tmp_path), [MEND])
        assert sorted(files) == [
            "detectron2-0.6.dist-info/LICENSE",
            "detectron2-0.6.dist-info/tools/train_net.py",
            "detectron2/_C.py",
            "detectron2/__init__.py",
            "detectron2/model_zoo/configs/x.yaml",
            "detectron2/old.py",
            "detectron2/projects/point_rend/__init__.py",
        ]
        assert files["detectron2/old.py"] == b"a = bool\nb = bool\n"
        assert files["detectron2/__init__.py"] == SOURCES["detectron2/__init__.py"].encode()

    @pytest.mark.parametrize(
        "mend",
        [
            Mend("detectron2/old.py", "np.bool", "bool", 1, "the reason"),
            Mend("detectron2/old.py", "np.int", "int", 1, "the reason"),
            Mend("detectron2/gone.py", "np.bool", "bool", 2, "the reason"),
        ],
        ids=["more often than expected", "not in the file", "file not there"],
    )
    def test_a_text_that_is_not_there_as_expected_is_an_error(self, tmp_path, mend):
        with pytest.raises(WheelError, match=f"{mend.path}.*{mend.old}.*the reason"):
            mended_files(*make_sdist(tmp_path), [mend])

    def test_another_hash_is_an_error(self, tmp_path):
        sdist, actual = make_sdist(tmp_path)
        with pytest.raises(WheelError, match=f"{actual}, expected {detectron2_wheel.SHA256}"):
            mended_files(sdist)

    def test_every_mend_has_a_reason_and_changes_something(self):
        for mend in MENDS:
            assert len(mend.reason) > 20 and mend.count > 0 and mend.old != mend.new


class TestWriteWheel:
    @pytest.fixture
    def wheel(self, tmp_path):
        path = tmp_path / detectron2_wheel.WHEEL_NAME
        write_wheel(mended_files(*make_sdist(tmp_path), [MEND]), path)
        return path

    def test_record_lists_every_file_with_its_hash_and_size(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            recorded = {}
            for line in archive.read("detectron2-0.6.dist-info/RECORD").decode().splitlines():
                name, digest, size = line.rsplit(",", 2)
                recorded[name] = (digest, size)
            assert sorted(recorded) == sorted(archive.namelist())
            assert recorded.pop("detectron2-0.6.dist-info/RECORD") == ("", "")
            for name, (digest, size) in recorded.items():
                data = archive.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                assert (digest, int(size)) == (f"sha256={expected}", len(data))

    def test_same_sources_give_the_same_bytes_and_leave_nothing_else(self, wheel, tmp_path):
        other = tmp_path / "again" / wheel.name
        other.parent.mkdir()
        write_wheel(mended_files(*make_sdist(tmp_path), [MEND]), other)
        assert wheel.read_bytes() == other.read_bytes()
        assert [path.name for path in other.parent.iterdir()] == [other.name]

    def test_pip_installs_it_as_a_normal_distribution(self, wheel, tmp_path):
        target = tmp_path / "target"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
        if subprocess.run([*pip[:3], "--version"], capture_output=True).returncode:
            pytest.skip("this environment has no pip")
        subprocess.run([*pip, str(wheel)], check=True, cwd=tmp_path)
        script = """
import importlib.metadata, detectron2
print(detectron2.__version__, importlib.metadata.version("detectron2"), "torch" in detectron2.__dict__)
print(importlib.metadata.requires("detectron2"))
"""
        environ = {**os.environ, "PYTHONPATH": str(target)}
        result = subprocess.run([sys.executable, "-c", script], env=environ, text=True, capture_output=True, check=True)
        first, second = result.stdout.splitlines()
        assert first == "0.6 0.6 False"
        assert all(f"'{requirement}'" in second for requirement in ("iopath>=0.1.7,<0.1.10", "fvcore>=0.1.5,<0.1.6"))


class TestMissingExtension:
    def test_imports_and_any_call_says_what_is_missing(self):
        stub = {"__name__": "detectron2._C"}
        exec(detectron2_wheel.MISSING_EXTENSION, stub)
        with pytest.raises(RuntimeError, match="detectron2._C.nms_rotated .*pure-Python.*C\\+\\+ compiler.*https://"):
            stub["__getattr__"]("nms_rotated")(1, other=2)
        with pytest.raises(AttributeError):  # what importlib and inspect ask for is really not there
            stub["__getattr__"]("__path__")

    def test_deformable_and_rotated_ops_of_the_installed_detectron2(self):
        try:
            from detectron2 import _C
        except ImportError:
            pytest.skip("the installed Detectron2 was not built by bootstrap/")
        if not str(_C.__file__).endswith(".py"):
            pytest.skip("the installed Detectron2 has its compiled extension")
        from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlignRotated, nms_rotated
        from detectron2.structures import RotatedBoxes, pairwise_iou_rotated

        maps, box = torch.ones(1, 4, 8, 8), torch.tensor([[4.0, 4.0, 4.0, 4.0, 30.0]])
        offset = torch.zeros(1, 18, 8, 8, requires_grad=True)
        calls = {
            "deform_conv backward": lambda: DeformConv(4, 4, 3, padding=1)(maps, offset).sum().backward(),
            "modulated_deform_conv": lambda: ModulatedDeformConv(4, 4, 3, padding=1)(maps, offset, offset[:, :9]),
            "roi_align_rotated": lambda: ROIAlignRotated((7, 7), 1.0, 0)(maps, torch.cat([torch.zeros(1, 1), box], 1)),
            "nms_rotated": lambda: nms_rotated(box, torch.ones(1), 0.5),
            "box_iou_rotated": lambda: pairwise_iou_rotated(RotatedBoxes(box), RotatedBoxes(box)),
        }
        for call in calls.values():
            with pytest.raises(RuntimeError, match="pure-Python build without the compiled extension"):
                call()

    def test_detectron2s_environment_report_says_so_too(self, tmp_path, monkeypatch):
        (tmp_path / "_C.py").write_text(detectron2_wheel.MISSING_EXTENSION)
        spec = importlib.util.spec_from_file_location("detectron2._C", tmp_path / "_C.py")
        stub = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stub)
        monkeypatch.setitem(sys.modules, "detectron2._C", stub)
        monkeypatch.setattr(sys.modules["detectron2"], "_C", stub, raising=False)
        assert re.search(r"Compiler +none \(pure-Python build\)", collect_env_info())


def fake_environment(folder: pathlib.Path, ours: bool) -> Environment:
    """An environment whose bin/python is this test's own, so that it works and has the same packages."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    if ours:
        (folder / environment.OURS).write_text(str(folder))
    return Environment(folder)


class TestEnvironment:
    @pytest.fixture
    def creations(self, monkeypatch):
        """Count the environments that are made, and put an empty but working one there."""
        made = []

        def create(self):
            made.append(self.folder)
            fake_environment(self.folder, ours=True)

        monkeypatch.setattr(Environment, "create", create)
        monkeypatch.setattr(Environment, "has_pip", lambda self: self.python.exists())
        return made

    def test_one_that_works_is_kept(self, tmp_path, creations):
        for ours in (True, False):
            fake_environment(tmp_path / str(ours), ours).make()
        assert creations == []

    @pytest.mark.parametrize("harm", ["absent", "empty", "broken off", "no python", "moved"])
    def test_a_missing_or_half_made_one_is_made(self, tmp_path, creations, harm):
        folder = tmp_path / "env"
        if harm == "empty":
            folder.mkdir()
        elif harm != "absent":
            made = fake_environment(tmp_path / ("elsewhere" if harm == "moved" else "env"), ours=True)
            made.folder.joinpath("rubbish").touch()
            if harm == "broken off":
                (folder / environment.BUSY).touch()
            elif harm == "no python":
                (folder / "bin" / "python").unlink()
            else:
                made.folder.rename(folder)
        Environment(folder).make()
        assert creations == [folder]
        assert not (folder / "rubbish").exists()

    def test_a_folder_that_is_somebody_elses_is_refused_and_left_alone(self, tmp_path, creations):
        (tmp_path / "photo.jpg").touch()
        with pytest.raises(SetupError, match="no Python environment"):
            Environment(tmp_path).make()
        assert creations == [] and [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]

    def test_without_venv_or_ensurepip_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ensurepip" else name)
        with pytest.raises(SetupError, match="ensurepip.*python3-venv"):
            Environment(tmp_path / "env").make()
        assert not (tmp_path / "env").exists()

    def test_ready_until_what_it_was_made_from_changes(self, tmp_path, monkeypatch):
        repository = tmp_path / "repository"
        (repository / "bootstrap").mkdir(parents=True)
        (repository / "setup.py").write_text("1")
        monkeypatch.setattr(environment, "ROOT", repository)
        made = fake_environment(tmp_path / "env", ours=True)
        assert not made.is_ready()
        (made.folder / environment.STAMP).write_text(made.fingerprint())
        assert not made.is_ready()  # fpn_d2 has been uninstalled by hand
        (made.folder / "bin" / "fpn-d2").touch()
        assert made.is_ready()
        (repository / "setup.py").write_text("2")
        assert not made.is_ready()

    def test_find_tells_missing_from_broken_from_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "there.py").write_text("__version__ = '1.2'\nprint('noise')\n")
        (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
        (tmp_path / "half").mkdir()  # as an installation that was broken off leaves it
        made = fake_environment(tmp_path / "env", ours=False)
        assert made.find("there", "absent") == {"there": {"version": "1.2"}, "absent": None}
        with pytest.raises(SetupError, match="broken is in .* cannot be imported .*nothing_of_this_name"):
            made.find("broken")
        with pytest.raises(SetupError, match="half is in .* incomplete"):
            made.find("half")

    def test_what_is_there_is_kept_and_held_on_to(self, tmp_path, monkeypatch):
        found = {name: {"version": "9+cu1", "release": "9"} for name in ("torch", "torchvision", "detectron2")}
        monkeypatch.setattr(Environment, "find", lambda self, *names: {name: found[name] for name in names})
        monkeypatch.setattr(Environment, "call", lambda *args: pytest.fail(f"installs: {args}"))
        made = Environment(tmp_path)
        made.install_torch()
        made.install_detectron2()
        assert made.constraints == ["torch==9", "torchvision==9"]

    def test_an_older_wheel_of_ours_is_replaced_in_our_own_environment_only(self, tmp_path, monkeypatch):
        calls = []
        found = {"detectron2": {"version": "0.6", "wheel": "Generator: fpn_d2 bootstrap 0123456789ab"}}
        monkeypatch.setattr(Environment, "find", lambda self, *names: found)
        monkeypatch.setattr(Environment, "call", lambda self, what, *arguments: calls.append(what))
        monkeypatch.setattr(installer, "plan", lambda *_: None)
        fake_environment(tmp_path / "theirs", ours=False).install_detectron2()
        assert calls == []
        ours = fake_environment(tmp_path / "ours", ours=True)
        ours.install_detectron2()
        assert calls == ["Detectron2's sources", "the older build of Detectron2", "Detectron2"]
        found["detectron2"]["wheel"] = f"Generator: {detectron2_wheel.generator()}"
        ours.install_detectron2()
        assert len(calls) == 3

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("open(os.environ['PIP_LOG'], 'a').write('... NewConnectionError ...')", "index could not be reached"),
            ("print('ERROR: No matching distribution found for torch==1')", "no build of it for Python"),
            ("print('ERROR: the disk is full')", "could not be installed: the disk is full"),
        ],
    )
    def test_a_failing_pip_gives_one_sentence_that_names_the_log(self, tmp_path, script, message):
        made = fake_environment(tmp_path / "env", ours=True)
        with pytest.raises(SetupError, match=message) as caught:
            made.call("torch", "-c", f"import os, sys; {script}; sys.exit(1)")
        assert "\n" not in str(caught.value) and str(made.log) in str(caught.value)
        assert not (made.folder / environment.BUSY).exists()

    def test_an_earlier_run_without_a_network_does_not_explain_this_failure(self, tmp_path):
        made = fake_environment(tmp_path / "env", ours=True)
        made.log.write_text("NewConnectionError\n")
        made.started_at = len("NewConnectionError\n")
        with pytest.raises(SetupError, match="the disk is full"):
            made.call("torch", "-c", "import sys; print('ERROR: the disk is full'); sys.exit(1)")

    def test_a_killed_pip_leaves_its_mark(self, tmp_path):
        made = fake_environment(tmp_path / "env", ours=True)
        with pytest.raises(SetupError):
            made.call("torch", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert (made.folder / environment.BUSY).exists()


def test_a_compiler_is_brought_where_there_is_none(tmp_path, monkeypatch):
    (tmp_path / "g++").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not environment.has_compiler()
    (tmp_path / "g++").chmod(0o755)
    assert environment.has_compiler()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", f"{tmp_path / 'g++'} -m64")
    assert environment.has_compiler()


def test_a_set_up_without_network_ends_in_one_sentence(tmp_path):
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    offline |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "bootstrap", "--venv", str(tmp_path / "env")]
    result = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **offline}, text=True, capture_output=True)
    if "ensurepip" in result.stderr:
        pytest.skip("this Python cannot make environments")
    assert result.returncode == 1
    assert result.stderr.startswith("error: torch ") and result.stderr.count("\n") == 1
    assert "index could not be reached" in result.stderr
    assert all(line.startswith("[set-up] ") for line in result.stdout.splitlines())
