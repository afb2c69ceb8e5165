"""The Triton kernels: numbers from Triton's interpreter, compilation for a GPU that need not be there, no waiting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpn_d2.fast.roi_align import pyramid_roi_align

from .reference import SCALES, make_maps, random_rois, slow_roi_align, with_gradients
from .triton_cases import cases

triton = pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are NOT tested")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.fast.roi_align.triton_cases", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("name", sorted(cases().keys() - {"broken"}))
def test_loop(name, interpreted):
    maps, arguments, deterministic = cases()[name]
    actual = interpreted[name]
    assert [tensor.dtype for tensor in actual] == [maps[0].dtype] * (1 + len(maps))
    expected = with_gradients(slow_roi_align, maps, *arguments)
    precise = {torch.float64: 1e-12, torch.float32: 1e-5}
    # In half precision: rounded once, at the end; the gradient that went in was rounded too.
    tolerance = precise.get(maps[0].dtype, torch.finfo(maps[0].dtype).eps)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)
    if len(arguments[0]):
        assert all(tensor.abs().sum() > 0 for tensor in expected[:2])


def test_indices_and_boxes_that_make_no_sense(interpreted):
    """A GPU cannot raise: they pool NaN, give no gradient, and disturb no others."""
    maps, arguments, _ = cases()["broken"]
    rois, level_indices, *rest = arguments
    pooled, *gradients = interpreted["broken"]
    assert pooled[1:].isnan().all()
    expected = slow_roi_align(maps, rois[:1], level_indices[:1], *rest)
    torch.testing.assert_close(pooled[:1], expected, rtol=1e-12, atol=1e-12)
    assert gradients[0].isfinite().all() and gradients[0].abs().sum() > 0
    assert not gradients[1].any() and not gradients[2].any()


class _NoKernel:
    """Takes the place of the kernel where only what happens round it counts."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, constants["BACKWARD"]))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_launch_each_way_and_no_wait(deterministic, channels_last, monkeypatch):
    """Tensors on the device "meta" hold no numbers: asking for one, which makes the host wait for a GPU, raises."""
    from fpn_d2.fast.roi_align import triton_roi_align as module

    kernel = _NoKernel()
    monkeypatch.setattr(module, "_roi_align_kernel", kernel)
    monkeypatch.setattr(module, "INTERPRETED", True)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    maps = [m.to("meta").contiguous(memory_format=memory_format) for m in make_maps(40, dtype=torch.float32)]
    rois, level_indices = (tensor.to("meta") for tensor in random_rois(30))
    arguments = (rois, level_indices, SCALES, (9, 9), 0, True)
    leaves = [level_map.requires_grad_() for level_map in maps]
    pooled = pyramid_roi_align(leaves, *arguments, implementation="triton", deterministic=deterministic)
    pooled.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
    assert kernel.launches == [((30, 2, 2), False), ((30, 2, 2), True)]


def test_deterministic_quantum():
    """Its integers can neither overflow nor lose what float32 holds, and a gradient that is not finite shows."""
    from fpn_d2.fast.roi_align.triton_roi_align import _quantum

    gradient = torch.full((1000, 4, 7, 7), 1e-20)
    quantum = _quantum(gradient)
    assert 1e-20 * 1000 * 49 / quantum < 2.0**63 and quantum < 1e-20 * 2.0**-24
    assert _quantum(torch.zeros(3, 4, 7, 7)) > 0
    for value in (float("nan"), float("inf")):
        gradient[5, 1, 2, 3] = value
        assert _quantum(gradient).isnan()


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fpn_d2.fast.roi_align.triton_roi_align import _roi_align_kernel as kernel

for maps, pooled, backward, channels_last in (
    ("bf16", "bf16", False, True), ("fp32", "fp32", True, False), ("i64", "fp32", True, True)
):
    integers = maps == "i64"
    constants = dict(
        OUT_HEIGHT=7, OUT_WIDTH=7, SAMPLING_RATIO=0, ALIGNED=True, CHANNELS_LAST=channels_last, BACKWARD=backward,
        INTEGERS=integers, COORDINATE=tl.float32, ACCUMULATOR=tl.float64 if integers else tl.float32,
        CELLS=64, CHANNELS=32,
    )
    kinds = {"pooled": "*" + pooled, "rois": "*fp32", "level_indices": "*i64"}
    kinds["quantum"] = "*fp64" if integers else "*fp32"
    kinds |= {f"p{i}": "*" + maps for i in range(6)} | {f"s{i}": "fp32" for i in range(6)}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print("atom" in ptx, len(ptx) > 1000)
"""


def test_compiles_for_a_gpu(tmp_path):
    """The interpreter takes more than the compiler does. Forward must not add into the maps, backward must."""
    if "nvidia" not in triton.backends.backends or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton cannot compile for a GPU that is not there: the compiler is NOT tested")
    script = tmp_path / "compile_kernels.py"  # a file: Triton reads sources
    script.write_text(COMPILE)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "False True True True True True".split()
