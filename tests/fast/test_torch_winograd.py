"""3x3 convolution by minimal filtering in PyTorch alone, against the sum as it is written, in float64."""

import pytest
import torch

from fpn_d2.fast import cpu_maps, onednn_conv, torch_winograd

from .test_onednn_conv import need_operations
from .test_winograd import by_loops, case

ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def _without_gradients(monkeypatch):
    monkeypatch.delenv(cpu_maps.VARIABLE, raising=False)
    need_operations()
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 5, 1, 1),
        (1, 16, 16, 4, 4),
        (1, 8, 8, 1, 30),  # one row; one column
        (2, 8, 8, 30, 1),
        (2, 7, 32, 3, 5),
        (3, 48, 33, 9, 12),
        (1, 8, 8, 70, 41),  # several blocks of rows
        (40, 8, 8, 14, 14),  # several blocks of images
        (2, 4, 4, 5, 1100),  # a row of more tiles than a block
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_values(shape, bias, relu):
    x, weight, offset = case(*shape, bias=bias)
    out = torch_winograd.convolve(x, torch_winograd.pack(weight), offset, relu)
    wide = [None if t is None else t.double() for t in (x, weight, offset)]
    expected = torch.nn.functional.conv2d(*wide, padding=1)
    expected = expected.relu() if relu else expected
    assert out.dtype == torch.float32 and out.shape == expected.shape
    assert (out - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert cpu_maps.is_channels_last(out) or shape[3:] == (1, 1)


def test_values_against_the_definition():
    x, weight, bias = case(2, 16, 32, 6, 9)
    expected = by_loops(x, weight, bias)
    out = torch_winograd.convolve(x, torch_winograd.pack(weight), bias, relu=False)
    assert (out - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_rounding():
    """Of the size of the compiled one's, on rectified maps of many channels."""
    x, weight, bias = case(1, 256, 64, 40, 40)
    x = x.relu()
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error = torch_winograd.convolve(x, torch_winograd.pack(weight), bias, relu=False) - expected
    assert 2e-7 < error.square().mean().sqrt() / expected.square().mean().sqrt() < 3e-6


def test_views_of_larger_maps():
    """Channels-last maps whose rows do not follow one another without a gap."""
    whole, weight, bias = case(1, 16, 16, 12, 20)
    part = whole[:, :, 2:10, 3:17]
    packed = torch_winograd.pack(weight)
    expected = torch_winograd.convolve(part.contiguous(memory_format=torch.channels_last), packed, bias, True)
    assert torch.equal(torch_winograd.convolve(part, packed, bias, True), expected)


def test_nan_stays_in_its_tiles():
    """Later blocks are worked on in the memory where it was."""
    x, weight, bias = case(1, 8, 8, 70, 41)
    expected = torch_winograd.convolve(x, torch_winograd.pack(weight), bias, relu=False)
    x[:, :, 2] = torch.nan
    out = torch_winograd.convolve(x, torch_winograd.pack(weight), bias, relu=False)
    assert out[:, :, 1:4].isnan().all()
    assert torch.equal(out[:, :, 8:], expected[:, :, 8:])


def test_where_it_pays(monkeypatch):
    x, weight, bias = case(1, 128, 128, 24, 24)
    assert torch_winograd.pays(x, weight, bias) and torch_winograd.pays(x, weight, None)
    narrow = case(1, 64, 128, 24, 24)
    for inputs in (
        (x.contiguous(), weight, bias),
        (x[:, :, :8].contiguous(memory_format=torch.channels_last), weight, bias),
        (x.double(), weight.double(), bias.double()),
        (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        (x, case(1, 256, 128, 24, 24)[1], bias),
        narrow,
    ):
        assert not torch_winograd.pays(*inputs)
    with torch.enable_grad():
        assert not torch_winograd.pays(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch_winograd.pays(x, weight, bias)
    monkeypatch.setattr(onednn_conv, "_works", lambda: False)
    assert not torch_winograd.pays(x, weight, bias)
    monkeypatch.undo()
    monkeypatch.setenv(cpu_maps.VARIABLE, "direct")
    assert not torch_winograd.pays(x, weight, bias)
