"""Convolution, sum and ReLU in one pass, against the three one after the other in float64."""

import pytest
import torch

from fpn_d2.fast import cpu_maps, onednn_conv

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
POINTWISE = ((1, 1), (0, 0), (1, 1), 1)
SAME = ((1, 1), (1, 1), (1, 1), 1)


def need_operations() -> None:
    """Skip where PyTorch lacks them; where it has them they have to pass the trial, or nothing would test them."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        pytest.skip("this PyTorch has no such operations: convolution by oneDNN is NOT tested")
    assert onednn_conv.works(torch.zeros(1))


@pytest.fixture(autouse=True)
def _needs_operations(monkeypatch):
    monkeypatch.delenv(cpu_maps.VARIABLE, raising=False)
    need_operations()
    with torch.no_grad():
        yield


def case(kernel, geometry, dtype, *, channels=24, out_channels=40, size=(9, 14), images=2, bias=True):
    torch.manual_seed(0)
    x = torch.randn(images, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels // geometry[3], kernel, kernel).to(dtype) / channels**0.5
    return x, weight, torch.randn(out_channels).to(dtype) if bias else None


def expected_of(x, weight, bias, geometry, relu, add):
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    out = torch.nn.functional.conv2d(*wide, *geometry)
    out = out if add is None else out + add.double()
    return out.relu() if relu else out


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [None, "channels-last", "contiguous", "float64"])
@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        (1, POINTWISE),
        (3, SAME),
        (1, ((2, 2), (0, 0), (1, 1), 1)),
        (3, ((2, 1), (1, 1), (1, 1), 1)),
        (7, ((2, 2), (3, 3), (1, 1), 1)),
        (3, ((1, 1), (2, 2), (2, 2), 1)),
        (3, ((1, 1), (0, 0), (1, 1), 1)),
        (3, ((1, 1), (1, 1), (1, 1), 8)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_values(kernel, geometry, added, relu, dtype, bias):
    x, weight, offset = case(kernel, geometry, dtype, bias=bias)
    add = None
    if added:
        add = torch.randn_like(expected_of(x, weight, offset, geometry, False, None), dtype=torch.float64)
        add = add if added == "float64" else add.to(dtype)
        add = add.contiguous(memory_format=torch.channels_last if added == "channels-last" else torch.contiguous_format)
    before = None if add is None else add.clone()
    out = onednn_conv.convolve(x, weight, offset, geometry, relu, add)
    expected = expected_of(x, weight, offset, geometry, relu, add)
    assert out.dtype == dtype and out.shape == expected.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    assert add is None or torch.equal(add, before)  # what is added may be an output of the network as well
    for height in (x.shape[2], 40):  # in oneDNN's layout for this size or another
        reordered = onednn_conv.reorder(weight, (*x.shape[:2], height, x.shape[3]), geometry)
        again = onednn_conv.convolve(x, reordered, offset, geometry, relu, add)
        assert (again.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize(("stride", "width"), [(1, 13), (2, 14)])
def test_a_sum_of_the_wrong_shape_is_refused(stride, width):
    geometry = ((stride, stride), *POINTWISE[1:])
    x, weight, bias = case(1, geometry, torch.float32)
    with pytest.raises(RuntimeError, match="size"):
        onednn_conv.convolve(x, weight, bias, geometry, True, torch.zeros(2, 40, 9, width))


def test_nan_and_infinity_are_not_lost():
    x, weight, bias = case(1, POINTWISE, torch.float32)
    x[0, 0, 3, 4], x[1, 0, 5, 6] = float("inf"), float("nan")
    out = onednn_conv.convolve(x, weight, bias, POINTWISE, False)
    assert torch.equal(out.isfinite(), expected_of(x, weight, bias, POINTWISE, False, None).isfinite())


def test_where_it_works(monkeypatch):
    x = torch.zeros(2)
    assert onednn_conv.works(x) and onednn_conv.works(x.bfloat16()) and not onednn_conv.works(x.double())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_conv.works(x)
    monkeypatch.setenv(cpu_maps.VARIABLE, "direct")
    assert not onednn_conv.works(x)


@pytest.mark.parametrize("fault", ["missing", "other arguments", "other numbers", "no sum"])
def test_operations_that_are_not_what_they_were_are_not_used(fault, monkeypatch):
    right = torch.ops.mkldnn._convolution_pointwise

    class Wrong:
        def __call__(self, x, *arguments):
            if fault == "other arguments":
                raise RuntimeError("expected at most 2 arguments")
            return right(x, *arguments) + (fault == "other numbers")

        def binary(self, x, add, *arguments):
            return right(x, *arguments[:6], "relu", [], "") if fault == "no sum" else right.binary(x, add, *arguments)

    class Operations:
        if fault != "missing":
            _convolution_pointwise = Wrong()

    monkeypatch.setattr(torch.ops, "mkldnn", Operations())
    onednn_conv._works.cache_clear()
    try:
        assert not onednn_conv._works()
    finally:
        onednn_conv._works.cache_clear()
