"""Building, keeping, loading and refusing compiled libraries. Their results: test_roi_align.py, test_winograd.py."""

import ctypes
import errno
import logging
import multiprocessing
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fpn_d2.fast import nms
from fpn_d2.fast.roi_align import compiled_roi_align as pooling
from fpn_d2.native import build as builder
from tests.fast.roi_align.reference import SCALES, make_maps, random_rois

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "fpn_d2" / "native" / "nms_cpu.cpp"
SYMBOLS = ("nms_float32",)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A library of the suppression of boxes."""
    try:
        command = [*builder.find_compiler(), *builder.FLAGS]
    except OSError:
        pytest.skip("no C++ compiler on this machine: building is NOT tested")
    path = tmp_path_factory.mktemp("built") / "nms.so"
    builder._compile(command, SOURCE, path)
    return path


@pytest.fixture
def quick_compiler(built, tmp_path, monkeypatch):
    """A compiler that copies a library built before, and notes each call: building takes seconds."""
    script = tmp_path / "cxx"
    script.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then cat "{tmp_path}/version"; exit 0; fi\n'
        f'echo call >> "{tmp_path}/calls"; sleep 0.2\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'cp "{built}" "$2"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "version").write_text("1.0")
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "new" / "cache"))
    return script


def load(flags=(), source=SOURCE, symbols=SYMBOLS):
    return builder.load(source, flags, symbols)[1]


def calls(tmp_path):
    notes = tmp_path / "calls"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def kept(tmp_path):
    return sorted((tmp_path / "new" / "cache").iterdir())


def test_built_once_per_source_compiler_and_processor(quick_compiler, tmp_path, monkeypatch):
    where = load()
    (path,) = kept(tmp_path)  # and nothing left over
    assert where == f"built {path}" and load() == f"found {path}"
    assert calls(tmp_path) == 1
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (tmp_path / "version").write_text("1.1")
    load()
    monkeypatch.setattr(builder, "_processor", lambda: "flags: another")
    load()
    load(flags=("-g",))
    folder = tmp_path / "changed"
    shutil.copytree(SOURCE.parent, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in (SOURCE.name, "cpu_kernels.h"):
        with open(folder / name, "a") as file:
            file.write("\n")
        load(source=folder / SOURCE.name)
    assert len(kept(tmp_path)) == 6 == calls(tmp_path)


def _build(at, queue):
    time.sleep(max(0.0, at - time.time()))
    queue.put(load().split()[-1])


def test_processes_that_build_at_the_same_time(quick_compiler, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(time.time() + 0.5, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    paths = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert calls(tmp_path) > 1 and [str(path) for path in kept(tmp_path)] == list(paths)


def _others_may_write(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o777)


def _group_may_write(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o770)


def _somebody_else_owns(cache, monkeypatch):
    cache.mkdir(parents=True)
    own = os.getuid()
    if own == 0:
        os.chown(cache, 54321, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: own + 1)


def _anybody_may_put_another_there(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.parent.chmod(0o777)


@pytest.mark.parametrize(
    "spoil", [_others_may_write, _group_may_write, _somebody_else_owns, _anybody_may_put_another_there]
)
def test_nothing_is_loaded_from_a_cache_of_others(spoil, quick_compiler, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(builder.ctypes, "CDLL", lambda path, real=ctypes.CDLL: loaded.append(path) or real(path))
    load()
    (path,) = kept(tmp_path)
    good = path.read_bytes()
    shutil.rmtree(path.parent)
    spoil(path.parent, monkeypatch)
    path.write_bytes(good)
    assert load() == f"built for this process alone (others can write to {path.parent}, or own it)"
    assert loaded[0] == str(path) and str(path) not in loaded[1:] and not Path(loaded[1]).exists()
    assert calls(tmp_path) == 2


def _is_a_file(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("")
    return "exists|Not a directory"


def _no_home(tmp_path, monkeypatch):
    for variable in ("FPN_D2_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(builder.Path, "home", home)
    return "Could not determine home directory"


def _read_only(tmp_path, monkeypatch):
    def mkdir(self, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(builder.Path, "mkdir", mkdir)
    return "Read-only file system"


def _full_disk(tmp_path, monkeypatch):
    def replace(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(builder.os, "replace", replace)
    return "No space left on device"


@pytest.mark.parametrize("spoil", [_is_a_file, _no_home, _read_only, _full_disk])
def test_no_cache(spoil, quick_compiler, tmp_path, monkeypatch):
    """It is built for this process, and nothing is left behind."""
    monkeypatch.setattr(builder.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    why = spoil(tmp_path, monkeypatch)
    where = load()
    assert where.startswith("built for this process alone (") and any(word in where for word in why.split("|")), where
    assert not list((tmp_path / "temporary").iterdir()) and not list(tmp_path.glob("new/cache/*"))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be another user")
def test_a_user_without_name_and_home():
    code = (
        "import os; from fpn_d2.fast import nms; from fpn_d2.native import build; os.setuid(54321)\n"
        "print(build.find_cache()); nms.library()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "FPN_D2_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("(None, ") and done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, good: path.write_bytes(good[: len(good) // 2]),
        lambda path, good: path.write_bytes(good[:9000] + b"\x00" * 64 + good[9064:]),
        lambda path, good: path.write_bytes(b""),
    ],
)
def test_a_damaged_library_is_built_anew(damage, quick_compiler, tmp_path):
    load()
    (path,) = kept(tmp_path)
    good = path.read_bytes()
    path.unlink()  # a file that is loaded must not be written to
    damage(path, good)
    assert load() == f"built {path}" and path.read_bytes() == good and kept(tmp_path) == [path]
    assert calls(tmp_path) == 2


@pytest.mark.parametrize("content", ["no library", "another library"])
def test_a_library_of_no_use_is_built_anew_once(content, quick_compiler, tmp_path):
    """Its hash is right; it was built where this machine's libraries are others, or it lacks what is looked for."""
    load()
    (path,) = kept(tmp_path)
    good = path.read_bytes()
    other = tmp_path / "other.so"
    other.write_text("int f() { return 0; }")
    if content == "another library":
        builder._compile(["gcc" if shutil.which("gcc") else "cc", "-shared", "-x", "c++"], other, tmp_path / "o.so")
        other = tmp_path / "o.so"
    path.unlink()
    wrong = path.with_name(f"{path.stem.rpartition('_')[0]}_{builder._digest(other)}.so")
    shutil.copy(other, wrong)
    assert load() == f"built {path}" and path.read_bytes() == good
    assert calls(tmp_path) == 2


def test_a_library_that_lacks_a_function_is_refused(quick_compiler, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(nms.OP, "functions", ("nms_float32", "no_such_function"))
    assert _line_of_refusal(caplog).endswith("undefined symbol: no_such_function")


def _line_of_refusal(caplog):
    """Of an operation that cannot run: once in the log, and it does not stop anything."""
    nms.OP.forget()
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]])
    try:
        for _ in range(2):
            kept = nms.batched_nms(boxes, torch.tensor([0.5, 0.6]), torch.zeros(2, dtype=torch.int64), 0.5)
            assert kept.tolist() == [1]
    finally:
        nms.OP.forget()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("Non-maximum suppression runs in torchvision, not compiled: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho '1.0'\n[ \"$1\" = --version ] || { echo 'error: no space' >&2; exit 1; }", "error: no space"),
        ("#!/bin/sh\nexit 3", "exit status 3"),
        ("#!/bin/sh\nexit 0", "made no library of nms_cpu.cpp, and did not say why"),
        ('#!/bin/sh\n[ "$1" = --version ] || sleep 60', "cxx did nothing for 0.5 s"),
        ("#!/bin/sh\nsleep 60 & wait", "cxx did nothing for 0.5 s"),
        ("#!/bin/sh\ncat", "made no library"),  # reads from the terminal, if it can
        ("not a program", "cxx"),
        ('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done; [ "$1" = --version ] || echo text > "$1"', "file too short"),
    ],
)
def test_broken_compilers_are_told_of_once_and_stop_nothing(script, message, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", program(tmp_path, "cxx", script))
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "_COMPILE_SECONDS", 0.5)
    monkeypatch.setattr(builder, "_VERSION_SECONDS", 0.5)
    start = time.time()
    assert message in _line_of_refusal(caplog)
    assert time.time() - start < 30


def test_compiler_with_a_stray_quote(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", 'g++ -DX="')
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "cache"))
    line = _line_of_refusal(caplog)
    assert line.endswith('no C++ compiler: CXX is g++ -DX=", which is no command (No closing quotation)')


def program(folder, name, text="#!/bin/sh\n"):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_which_compiler(monkeypatch, tmp_path):
    """The one that is asked for and no other; else the first of the usual names; else the Python package."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(OSError, match=r"looked for g\+\+, clang\+\+, c\+\+ and the Python package ziglang$"):
        builder.find_compiler()
    monkeypatch.delitem(sys.modules, "ziglang")
    program(tmp_path / "packages" / "ziglang", "__init__.py", "")
    assert builder.find_compiler() == [sys.executable, "-m", "ziglang", "c++"]
    last = program(tmp_path / "bin", "c++")
    assert builder.find_compiler() == [last]
    first = program(tmp_path / "bin", "g++")
    assert builder.find_compiler() == [first]
    spaced = program(tmp_path / "some where", "my c++")
    for asked, expected in (("c++", [last]), (f"'{last}' -x 'a b'", [last, "-x", "a b"]), (spaced, [spaced])):
        monkeypatch.setenv("CXX", asked)
        assert builder.find_compiler() == expected
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    with pytest.raises(OSError, match="looked for no-such-compiler --fast$"):
        builder.find_compiler()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "a"))
    assert builder.find_cache() == (tmp_path / "a", "")
    monkeypatch.delenv("FPN_D2_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert builder.find_cache() == (tmp_path / "b" / "fpn_d2", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert builder.find_cache() == (tmp_path / "c" / ".cache" / "fpn_d2", "")


@pytest.mark.parametrize("folder", [".", "cache"])
def test_relative_cache_folder(folder, tmp_path, monkeypatch, quick_compiler):
    """As seen from where the program was started, wherever it went since."""
    monkeypatch.setattr(builder, "_START_FOLDER", str(tmp_path / "start"))
    (tmp_path / "start" / "elsewhere").mkdir(parents=True)
    monkeypatch.setenv("FPN_D2_CACHE", folder)
    monkeypatch.chdir(tmp_path / "start")
    built = load()
    monkeypatch.chdir(tmp_path / "start" / "elsewhere")
    assert load() == built.replace("built", "found")
    assert builder.find_cache()[0] == tmp_path / "start" / folder


def test_without_tuning_for_this_processor(tmp_path, monkeypatch):
    """The baseline of every x86-64, without fused operations and wide vectors, gives the same within rounding."""
    if pooling.library() is None:
        pytest.skip("no C++ compiler on this machine: the compiled pooling is NOT tested")
    real = shlex.join(builder.find_compiler())
    script = (
        f'#!/bin/sh\nfor word; do [ "$word" = -march=native ] && {{ echo unknown >&2; exit 1; }}; done\n{real} "$@"\n'
    )
    arguments = (make_maps(channels=83, dtype=torch.float32), *random_rois(40), SCALES, (4, 3), 0, True)
    expected = pooling.compiled_roi_align(*arguments)
    monkeypatch.setenv("CXX", program(tmp_path, "cxx", script))
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "cache"))
    pooling.OP.forget()
    try:
        assert pooling.library() is not None and len(os.listdir(tmp_path / "cache")) == 1
        torch.testing.assert_close(pooling.compiled_roi_align(*arguments), expected, rtol=1e-5, atol=1e-5)
    finally:
        pooling.OP.forget()
