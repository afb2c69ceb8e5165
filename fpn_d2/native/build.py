"""Builds a C++ source at its first use, keeps the library where nobody else can write, and loads it.

The libraries have a C interface and are called through ctypes. They need no headers of torch, so that they build in
seconds with any C++ compiler, need neither ninja nor setuptools, and one build serves every version of torch.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = ("-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread")
_COMPILE_SECONDS = 300  # of ours a few; ziglang first builds its own C++ library, once on a machine
_VERSION_SECONDS = 30
_START_FOLDER = os.path.abspath(os.curdir) if os.path.exists(os.curdir) else "/"  # a relative cache lies there


def load(source: Path, flags: Sequence[str], symbols: Sequence[str]) -> tuple[ctypes.CDLL, str]:
    """Load the library of a source, from the cache, or built.

    The name of a library in the cache ends in a hash of what it holds: one that is damaged, does not load here or lacks
    a symbol is built anew, once. Processes that build at the same time do not disturb each other: each compiles in a
    folder of its own, and the last step, a rename, is atomic. No lock is there for a killed process to leave behind.

    Args:
        source: the C++ source; it may include the headers in its folder.
        flags: of the compiler, beside ``FLAGS``.
        symbols: functions that the library must have.

    Returns:
        The library, and in some words where it came from.

    Raises:
        OSError: there is no compiler, it failed or hung, or there is no place to write to.
        AttributeError: the library lacks a symbol.
    """
    compiler = find_compiler()
    stem = f"{source.stem}_{_key(source, flags, compiler)}"
    cache, refused = find_cache()
    for path in sorted(cache.glob(f"{stem}_*.so")) if cache else ():
        try:
            if path.stem.endswith("_" + _digest(path)):
                return _open(path, symbols), f"found {path}"
            path.unlink()  # damaged
        except (OSError, AttributeError) as error:
            logger.debug(f"{path} is of no use: {error}")
    with tempfile.TemporaryDirectory(prefix="fpn_d2_", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder, "scratch.so")
        logger.info(f"Compiling {source.name}, once on this machine")
        _compile([*compiler, *FLAGS, *flags], source, scratch)
        if cache:
            try:
                kept = _keep(scratch, cache / f"{stem}_{_digest(scratch)}.so")
                return _open(kept, symbols), f"built {kept}"
            except OSError as error:  # a full disk, one from which nothing may be run
                refused = first_line(error)
        return _open(scratch, symbols), f"built for this process alone ({refused})"


def find_cache() -> tuple[Path | None, str]:
    """Return the folder of the libraries, made if need be; or None and why it cannot be used.

    It is ``$FPN_D2_CACHE``, a relative one as seen from where the program started, or ``fpn_d2`` in the user's cache
    folder. Nobody but the user, and the administrator, may be able to put a library there.
    """
    try:
        asked = os.environ.get("FPN_D2_CACHE")
        usual = asked or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fpn_d2")
        cache = Path(_START_FOLDER, usual)
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache = cache.resolve()
        if not _is_private(cache):
            return None, f"others can write to {cache}, or own it"
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        return None, first_line(error)
    return cache, ""


def _is_private(cache: Path) -> bool:
    """Whether only this user and the administrator can put anything there."""
    if not hasattr(os, "getuid"):  # Windows
        return True
    own, free = cache.stat(), stat.S_IWOTH | stat.S_ISVTX
    replaceable = any(folder.stat().st_mode & free == stat.S_IWOTH for folder in cache.parents)
    return own.st_uid in (os.getuid(), 0) and not own.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not replaceable


def find_compiler() -> list[str]:
    """Return the command that is ``$CXX``, or else g++, clang++, c++ or the Python package ziglang, which has clang.

    Raises:
        OSError: there is none.
    """
    asked = os.environ.get("CXX", "").strip()
    if asked and (found := shutil.which(asked)):  # a path may have spaces in it
        return [found]
    try:
        commands = [shlex.split(asked)] if asked else [["g++"], ["clang++"], ["c++"]]
    except ValueError as error:
        raise OSError(f"no C++ compiler: CXX is {asked}, which is no command ({error})") from error
    for name, *words in commands:
        if found := shutil.which(name):
            return [found, *words]
    if not asked and importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    looked_for = asked or "g++, clang++, c++ and the Python package ziglang"
    raise OSError(f"no C++ compiler: looked for {looked_for}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _key(source: Path, flags: Sequence[str], compiler: list[str]) -> str:
    """A hash of all that a library depends on: sources, compiler, flags and processor."""
    _, version = _run([*compiler, "--version"], _VERSION_SECONDS)
    texts = [text.read_bytes() for text in (source, *sorted(source.parent.glob("*.h")))]
    words = [version, " ".join(compiler), " ".join((*FLAGS, *flags)), _processor()]
    return hashlib.sha256(b"\0".join([*texts, *[word.encode() for word in words]])).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _open(path: Path, symbols: Sequence[str]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for symbol in symbols:
        getattr(library, symbol)
    return library


def _keep(scratch: Path, path: Path) -> Path:
    """Copy a library into the cache; it is there as a whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".building_")
    try:
        with open(handle, "wb") as file:
            file.write(scratch.read_bytes())
        os.chmod(name, 0o700)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _compile(command: list[str], source: Path, path: Path) -> None:
    # Not every compiler knows -march=native on every processor; the code is right, and slower, without.
    arguments = [str(source), "-o", str(path)]
    try:
        _run([*command, "-march=native", *arguments], _COMPILE_SECONDS)
    except TimeoutError:
        raise
    except OSError:
        _run([*command, *arguments], _COMPILE_SECONDS)
    if not path.exists():
        raise OSError(f"{command[0]} made no library of {source.name}, and did not say why")


def _run(command: list[str], seconds: float) -> tuple[str, str]:
    """Run a compiler and return what it says, (errors, output); kill it and all that it started if it hangs."""
    group = {"start_new_session": True} if hasattr(os, "killpg") else {}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, errors="replace", **pipes, **group) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{command[0]} did nothing for {seconds:g} s") from error
            raise
    if process.returncode:
        raise OSError(f"{command[0]} failed: {errors.strip() or f'exit status {process.returncode}'}")
    return errors, output


def _processor() -> str:
    """Describe the instruction set: a cache may lie on a file system that several kinds of machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
