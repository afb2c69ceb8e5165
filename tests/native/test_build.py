"""Building, caching and failing to build compiled libraries. Their results: test_roi_align.py, test_winograd.py."""

import ctypes
import dataclasses
import multiprocessing
import os
import shlex
import shutil
import stat
import sys
import time

import pytest
import torch

from fpn_d2.fast.roi_align import compiled_roi_align as pooling
from fpn_d2.native import build as builder
from tests.fast.roi_align.reference import SCALES, make_maps, random_rois


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch):
    """A compiler that copies a library built before, and notes each call: building takes seconds."""
    if pooling.library() is None:
        pytest.skip("no C++ compiler on this machine: building is NOT tested")
    built, _ = builder.build(pooling.SOURCE)
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
    return script


def calls(tmp_path):
    notes = tmp_path / "calls"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def test_built_once_per_source_compiler_and_processor(quick_compiler, tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    first, built = builder.build(pooling.SOURCE, cache)
    assert built and first.parent == cache and ctypes.CDLL(str(first)).pool_float32
    assert builder.build(pooling.SOURCE, cache) == (first, False)
    assert calls(tmp_path) == 1
    assert [path.name for path in cache.iterdir()] == [first.name]  # nothing left over
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    paths = {first}
    (tmp_path / "version").write_text("1.1")
    paths.add(builder.build(pooling.SOURCE, cache)[0])
    monkeypatch.setattr(builder, "_processor", lambda: "flags: another")
    paths.add(builder.build(pooling.SOURCE, cache)[0])
    source = dataclasses.replace(pooling.SOURCE, flags=(*pooling.SOURCE.flags, "-g"))
    paths.add(builder.build(source, cache)[0])
    folder = tmp_path / "changed"
    shutil.copytree(source.path.parent, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in (source.path.name, "cpu_kernels.h"):
        with open(folder / name, "a") as file:
            file.write("\n")
        paths.add(builder.build(dataclasses.replace(source, path=folder / source.path.name), cache)[0])
    assert len(paths) == 6 == calls(tmp_path)


def _build(cache, at, queue):
    time.sleep(max(0.0, at - time.time()))
    path, _ = builder.build(pooling.SOURCE, cache)
    queue.put(str(path) if hasattr(ctypes.CDLL(str(path)), "unpool_float32") else "broken")


def test_processes_that_build_at_the_same_time(quick_compiler, tmp_path):
    context = multiprocessing.get_context("fork")
    queue, cache = context.Queue(), tmp_path / "cache"
    workers = [context.Process(target=_build, args=(cache, time.time() + 0.5, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    paths = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1 and [str(path) for path in cache.iterdir()] == list(paths)


def test_cache_that_cannot_be_written(quick_compiler, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    path, built = builder.build(pooling.SOURCE, blocked)
    try:
        assert built and ctypes.CDLL(str(path)).pool_float32
        assert path.parent != tmp_path and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/bin/sh\necho '1.0'\n[ \"$1\" = --version ] || { echo 'error: no space' >&2; exit 1; }", "error: no space"),
        ("#!/bin/sh\nexit 3", "exit status 3"),
        ("not a program", "cxx"),
        ('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done; [ "$1" = --version ] || echo text > "$1"', "roi_align_cpu"),
    ],
)
def test_broken_compilers_are_told_of_once_and_stop_nothing(script, message, tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "cxx"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "cache"))
    pooling.library.cache_clear()
    try:
        assert pooling.library() is None and pooling.library() is None
    finally:
        pooling.library.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Pooling runs in pure torch, not compiled: ") and message in line and "\n" not in line


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
    assert builder.default_cache() == tmp_path / "a"
    monkeypatch.delenv("FPN_D2_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert builder.default_cache() == tmp_path / "b" / "fpn_d2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert builder.default_cache() == tmp_path / "c" / ".cache" / "fpn_d2"


def test_without_tuning_for_this_processor(tmp_path, monkeypatch):
    """The baseline of every x86-64, without fused operations and wide vectors, gives the same within rounding."""
    if pooling.library() is None:
        pytest.skip("no C++ compiler on this machine: the compiled pooling is NOT tested")
    wrapper = tmp_path / "cxx"
    real = shlex.join(builder.find_compiler())
    wrapper.write_text(
        f'#!/bin/sh\nfor word; do [ "$word" = -march=native ] && {{ echo unknown >&2; exit 1; }}; done\n{real} "$@"\n'
    )
    wrapper.chmod(0o755)
    arguments = (make_maps(channels=83, dtype=torch.float32), *random_rois(40), SCALES, (4, 3), 0, True)
    expected = pooling.compiled_roi_align(*arguments)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "cache"))
    pooling.library.cache_clear()
    try:
        assert pooling.library() is not None and len(os.listdir(tmp_path / "cache")) == 1
        torch.testing.assert_close(pooling.compiled_roi_align(*arguments), expected, rtol=1e-5, atol=1e-5)
    finally:
        pooling.library.cache_clear()


def test_threads_are_those_of_torchs_openmp():
    """A second OpenMP runtime, or threads beside it, would compete with torch's for the cores."""
    if "OpenMP" not in torch.__config__.parallel_info() or not os.path.exists("/proc/self/maps"):
        pytest.skip("this torch has no OpenMP, or this is no Linux: shared threads are NOT tested")
    assert builder._openmp() is not None
    maps = open("/proc/self/maps").read()
    assert len({line.split()[-1] for line in maps.splitlines() if "/libgomp" in line or "/libiomp5" in line}) == 1
