"""Compiled multi-level RoIAlign for the CPU: builds ``roi_align_cpu.cpp``, keeps the result, calls it.

The library has a C interface and is called through ctypes. It needs no headers of torch, so that it builds in seconds
with any C++ compiler, needs neither ninja nor setuptools, and one build serves every version of torch. It runs its own
threads, as many as ``torch.get_num_threads()``: linking OpenMP would bring a second OpenMP runtime beside torch's.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("roi_align_cpu.cpp")
FLAGS = ("-O2", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPILE_SECONDS = 120


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in (
                "num_levels num_images num_channels num_rois out_height out_width "
                "sampling_ratio aligned num_threads pooled_channels_last"
            ).split()
        ],
        *[(name, ctypes.c_void_p) for name in "heights widths scales maps rois level_indices".split()],
    ]


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled library, built or taken from the cache; None where that is not possible.

    The first call in a process says in the log what it did: one line. A failure is remembered, not tried again.
    """
    try:
        path, built = build()
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(f"Pooling runs in pure torch, not compiled: {_first_line(error)}")
        return None
    logger.info(f"Pooling runs compiled: {'built' if built else 'found'} {path}")
    for kind in ("float32", "float64", "bfloat16"):
        for name in (f"pool_{kind}", f"unpool_{kind}"):
            function = getattr(loaded, name)
            function.argtypes, function.restype = [ctypes.POINTER(_Problem), ctypes.c_void_p], ctypes.c_int64
    return loaded


def build(cache: Path | None = None) -> tuple[Path, bool]:
    """Compile the source, unless the cache has it for this source, compiler, flags and processor.

    Processes that build at the same time do not disturb each other: each compiles into a file of its own, and the last
    step, a rename, is atomic. There is no lock that a killed process could leave behind.

    Args:
        cache: the folder to keep the library in; None: ``default_cache()``.

    Returns:
        The library's path, and whether it was compiled just now.

    Raises:
        OSError: there is no compiler, or no place to write to.
        subprocess.SubprocessError: the compiler failed or hung.
    """
    cache = default_cache() if cache is None else cache
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_COMPILE_SECONDS, check=True).stdout
    parts = [SOURCE.read_bytes(), compiler.encode(), version, " ".join(FLAGS).encode(), _processor().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache / f"roi_align_cpu_{key}.so"
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
    try:
        _compile(compiler, scratch)
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


def find_compiler() -> str:
    """Return the path of ``$CXX``, or else of g++, clang++ or c++.

    Raises:
        OSError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise OSError(f"no C++ compiler: looked for {', '.join(names)}")


def _compile(compiler: str, path: Path) -> None:
    # Not every compiler knows -march=native on every processor; the code is right, and slower, without.
    for tuning in (["-march=native"], []):
        command = [compiler, *FLAGS, *tuning, str(SOURCE), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        if done.returncode == 0:
            return
    raise subprocess.SubprocessError(f"{compiler} failed: {done.stderr.strip() or done.returncode}")


def _processor() -> str:
    """Describe the instruction set: a cache may lie on a file system that several kinds of machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def compiled_roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """:func:`fpn_d2.modeling.ops.pyramid_roi_align` with ``implementation="compiled"``, of checked arguments."""
    dtype = maps[0].dtype
    if dtype == torch.float16:  # rare on CPUs
        maps = [level_map.float() for level_map in maps]
    # The sums run over vectors of channels; a map that is not channels-last in memory is copied.
    maps = [level_map.contiguous(memory_format=torch.channels_last) for level_map in maps]
    settings = (tuple(scales), tuple(output_size), sampling_ratio, aligned)
    return _Pool.apply(settings, rois.detach(), level_indices, *maps).to(dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, rois, level_indices, *maps):
        ctx.settings = settings
        ctx.map_shapes = [level_map.shape for level_map in maps]
        rois = rois.to(torch.float64 if maps[0].dtype == torch.float64 else torch.float32).contiguous()
        level_indices = level_indices.contiguous()
        ctx.save_for_backward(rois, level_indices)
        pooled = maps[0].new_empty((len(rois), maps[0].shape[1], *settings[1]))
        _call("pool", pooled, maps, rois, level_indices, settings, channels_last=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rois, level_indices = ctx.saved_tensors
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        gradients = [_empty_channels_last(shape, wide) for shape in ctx.map_shapes]
        # Heads of convolutions hand back a channels-last gradient, those of fully connected layers another.
        channels_last = not gradient.is_contiguous() and gradient.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            gradient = gradient.contiguous()
        _call("unpool", gradient, gradients, rois, level_indices, ctx.settings, channels_last)
        return None, None, None, *[level_gradient.to(gradient.dtype) for level_gradient in gradients]


def _empty_channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    images, channels, height, width = shape
    return torch.empty((images, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _call(verb, pooled, maps, rois, level_indices, settings, channels_last) -> None:
    """Run one of the library's functions; ``maps`` are its input ("pool") or output ("unpool")."""
    scales, output_size, sampling_ratio, aligned = settings
    images, channels = maps[0].shape[:2]
    levels = len(maps)
    problem = _Problem(
        levels, images, channels, len(rois), *output_size, sampling_ratio, aligned, torch.get_num_threads(),
        channels_last,
        ctypes.addressof(heights := (ctypes.c_int64 * levels)(*[m.shape[2] for m in maps])),
        ctypes.addressof(widths := (ctypes.c_int64 * levels)(*[m.shape[3] for m in maps])),
        ctypes.addressof(factors := (ctypes.c_double * levels)(*scales)),
        ctypes.addressof(pointers := (ctypes.c_void_p * levels)(*[m.data_ptr() for m in maps])),
        rois.data_ptr(),
        level_indices.data_ptr(),
    )  # fmt: skip
    kind = str(pooled.dtype).removeprefix("torch.")
    failed = getattr(library(), f"{verb}_{kind}")(ctypes.byref(problem), pooled.data_ptr())
    del heights, widths, factors, pointers  # alive until here
    if failed:
        raise MemoryError("compiled RoIAlign ran out of memory or threads")
