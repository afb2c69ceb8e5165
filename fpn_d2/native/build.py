"""Compiled operations for the CPU: builds a C++ source at its first use, keeps the library, loads it.

The libraries have a C interface and are called through ctypes. They need no headers of torch, so that they build in
seconds with any C++ compiler, need neither ninja nor setuptools, and one build serves every version of torch. They run
in as many threads as ``torch.get_num_threads()`` says, those of torch's own OpenMP runtime where it can be found: a
second runtime, or threads beside it, would compete with it for the processor's cores.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent  # of the sources
FLAGS = ("-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread")
_COMPILE_SECONDS = 300  # of ours a few; ziglang first builds its own C++ library, once on a machine


@dataclass(frozen=True)
class Source:
    """A C++ source.

    Args:
        path: the source; it may include the headers in its folder.
        flags: of the compiler, beside ``FLAGS``.
        does: what it does, for the log: "Pooling".
        otherwise: how that is done where it cannot be compiled, for the log: "in pure torch".
    """

    path: Path
    flags: tuple[str, ...]
    does: str
    otherwise: str


def load(source: Source) -> ctypes.CDLL | None:
    """Return the compiled library, built or taken from the cache; None where that is not possible.

    Says in the log what it did: one line.
    """
    try:
        path, built = build(source)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(f"{source.does} runs {source.otherwise}, not compiled: {_first_line(error)}")
        return None
    if hasattr(loaded, "use_openmp") and (start := _openmp()):  # cpu_kernels.h has it
        loaded.use_openmp(start)
    logger.info(f"{source.does} runs compiled: {'built' if built else 'found'} {path}")
    return loaded


@functools.lru_cache(maxsize=1)
def _openmp() -> ctypes.c_void_p | None:
    """Return the address of what starts a parallel region in the OpenMP runtime that torch has loaded, or None."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    runtimes = {path for path in loaded if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*\.so", path)}
    of_torch = {path for path in runtimes if Path(torch.__file__).parent in Path(path).parents}
    if len(found := of_torch or runtimes) != 1:  # none, or several of which torch may use any
        return None
    try:
        return ctypes.cast(ctypes.CDLL(found.pop()).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def build(source: Source, cache: Path | None = None) -> tuple[Path, bool]:
    """Compile ``source``, unless the cache has it as it is, for this compiler, these flags and this processor.

    Processes that build at the same time do not disturb each other: each compiles into a file of its own, and the last
    step, a rename, is atomic. There is no lock that a killed process could leave behind.

    Args:
        source: what to compile.
        cache: the folder to keep the library in; None: ``default_cache()``.

    Returns:
        The library's path, and whether it was compiled just now.

    Raises:
        OSError: there is no compiler, or no place to write to.
        subprocess.SubprocessError: the compiler failed or hung.
    """
    cache = default_cache() if cache is None else cache
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_COMPILE_SECONDS, check=True).stdout
    texts = [source.path, *sorted(source.path.parent.glob("*.h"))]
    flags = " ".join((*FLAGS, *source.flags))
    words = [" ".join(compiler), flags, _processor()]
    parts = [*[text.read_bytes() for text in texts], version, *[word.encode() for word in words]]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache / f"{source.path.stem}_{key}.so"
    if path.exists():
        return path, False
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = tempfile.mkdtemp(dir=cache, prefix=".building_")
    except OSError:
        # Nowhere to keep it. A fresh folder of our own, never a name in a shared one that others could have put there.
        folder = tempfile.mkdtemp(prefix="fpn_d2_")
        path = Path(folder, path.name)
    scratch = Path(folder, "scratch.so")
    logger.info(f"{source.does}: compiling {source.path.name}, once on this machine")
    try:
        _compile(compiler, source, scratch)
        os.replace(scratch, path)
    finally:
        if path.parent != Path(folder) or not path.exists():
            shutil.rmtree(folder, ignore_errors=True)
    return path, True


def default_cache() -> Path:
    """Return ``$FPN_D2_CACHE``, or ``fpn_d2`` in the user's cache folder."""
    if os.environ.get("FPN_D2_CACHE"):
        return Path(os.environ["FPN_D2_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpn_d2"


def find_compiler() -> list[str]:
    """Return the command that is ``$CXX``, or else g++, clang++, c++ or the Python package ziglang, which has clang.

    Raises:
        OSError: there is none.
    """
    asked = os.environ.get("CXX", "").strip()
    if asked and (found := shutil.which(asked)):  # a path may have spaces in it
        return [found]
    commands = [shlex.split(asked)] if asked else [["g++"], ["clang++"], ["c++"]]
    for name, *words in commands:
        if found := shutil.which(name):
            return [found, *words]
    if not asked and importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    looked_for = asked or "g++, clang++, c++ and the Python package ziglang"
    raise OSError(f"no C++ compiler: looked for {looked_for}")


def _compile(compiler: list[str], source: Source, path: Path) -> None:
    # Not every compiler knows -march=native on every processor; the code is right, and slower, without.
    for tuning in (["-march=native"], []):
        command = [*compiler, *FLAGS, *source.flags, *tuning, str(source.path), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        if done.returncode == 0:
            return
    raise subprocess.SubprocessError(f"{' '.join(compiler)} failed: {done.stderr.strip() or done.returncode}")


def _processor() -> str:
    """Describe the instruction set: a cache may lie on a file system that several kinds of machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
