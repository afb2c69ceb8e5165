"""Which implementation runs when."""

import logging
import sys

import pytest
import torch
import torchvision

import fpn_d2.fast.roi_align as package
from fpn_d2.errors import UserError
from fpn_d2.fast.roi_align import compiled_roi_align, pyramid_roi_align, roi_align

from .reference import SCALES, make_maps, random_rois


@pytest.fixture
def arguments():
    return (make_maps(dtype=torch.float32), *random_rois(30), SCALES, (3, 3), 0, True)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("FPN_D2_CACHE", str(tmp_path / "cache"))
    compiled_roi_align.OP.forget()
    yield
    compiled_roi_align.OP.forget()


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{package.__name__}.triton_roi_align", raising=False)
    monkeypatch.delattr(package, "triton_roi_align", raising=False)
    roi_align._triton.cache_clear()
    yield
    roi_align._triton.cache_clear()


def test_auto_on_a_cpu(arguments, monkeypatch):
    maps = arguments[0]
    if compiled_roi_align.library() is not None:
        assert roi_align.choose("auto", maps) == "compiled"
    for name in ("torch", "torchvision"):
        monkeypatch.setenv("FPN_D2_ROI_ALIGN", name)
        assert roi_align.choose("auto", maps) == name
        assert roi_align.choose("torchvision", maps) == "torchvision"  # an argument goes before the variable
    monkeypatch.setenv("FPN_D2_ROI_ALIGN", "quick")
    with pytest.raises(UserError, match="FPN_D2_ROI_ALIGN is 'quick'; expected one of auto, compiled"):
        roi_align.choose("auto", maps)


def test_without_a_compiler(arguments, no_compiler, caplog):
    with caplog.at_level(logging.INFO, logger="fpn_d2"):
        pooled = [pyramid_roi_align(*arguments) for _ in range(3)]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "pure torch, not compiled: no C++ compiler: looked for" in lines[0]
    assert torch.equal(pooled[2], pyramid_roi_align(*arguments, implementation="torch"))
    with pytest.raises(UserError, match="implementation is 'compiled'.*could not be built"):
        pyramid_roi_align(*arguments, implementation="compiled")


def test_triton_missing(arguments, no_triton, caplog):
    for _ in range(2):
        with pytest.raises(UserError, match="'triton'.*on a GPU: Triton cannot be imported"):
            pyramid_roi_align(*arguments, implementation="triton")
    assert [r.getMessage().startswith("Triton cannot be imported: ") for r in caplog.records] == [True]


def test_on_other_devices(arguments, monkeypatch):
    """On a GPU what Detectron2 does; Triton's kernel, which none has measured, only where it is asked for by name."""
    maps = arguments[0]
    on_gpu = [FakeGPUMap(m) for m in maps]
    assert roi_align.choose("auto", on_gpu) == "torchvision"
    assert roi_align.choose("auto", [m.to("meta") for m in maps]) == "torchvision"
    with pytest.raises(UserError, match="'compiled', which runs on a CPU.*on cuda"):
        roi_align.choose("compiled", on_gpu)
    pytest.importorskip("triton", reason="Triton is not installed: the choice of it is NOT tested")
    monkeypatch.setenv("FPN_D2_ROI_ALIGN", "triton")
    assert roi_align.choose("triton", on_gpu) == roi_align.choose("auto", on_gpu) == "triton"
    with pytest.raises(UserError, match="'triton'.*GPU: got 9 maps on cuda"):
        roi_align.choose("triton", on_gpu * 3)  # more levels than it takes
    with pytest.raises(UserError, match="'triton'.*GPU: got 3 maps on cpu"):
        roi_align.choose("triton", maps)


class FakeGPUMap:
    """What the choice looks at, of a tensor on a GPU that this machine need not have."""

    device = torch.device("cuda")
    is_cuda = True

    def __init__(self, tensor):
        self.tensor, self.dtype = tensor, tensor.dtype

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        return self.tensor[index]


def test_traced(arguments):
    """A traced model holds torchvision's operation, for any number of RoIs."""
    maps, rois, level_indices, *rest = arguments

    def pool(maps, rois, level_indices):
        return pyramid_roi_align(maps, rois, level_indices, *rest)

    traced = torch.jit.trace(pool, (maps, rois, level_indices), check_trace=False)
    assert "torchvision::roi_align" in str(traced.inlined_graph)
    others = random_rois(50, seed=9)
    torch.testing.assert_close(traced(maps, *others), pool(maps, *others), rtol=1e-5, atol=1e-5)


def test_under_torch_compile(arguments):
    maps, rois, level_indices, *rest = arguments

    @torch.compile(backend="eager")
    def pool(maps, rois, level_indices):
        return pyramid_roi_align([m * 2 for m in maps], rois, level_indices, *rest) + 1

    expected = pyramid_roi_align(maps, rois, level_indices, *rest) * 2 + 1
    torch.testing.assert_close(pool(maps, rois, level_indices), expected, rtol=1e-5, atol=1e-5)


def test_torchvision_is_one_call_per_level(arguments):
    maps, rois, level_indices, scales, *rest = arguments
    pooled = pyramid_roi_align(*arguments, implementation="torchvision")
    for level, (level_map, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = level_indices == level
        expected = torchvision.ops.roi_align(level_map, rois[rows], rest[0], scale, *rest[1:])
        assert rows.any() and torch.equal(pooled[rows], expected)
