"""Traces that leave sizes open, of parts that ask for them."""

import pytest
import torch
from torch import nn

from fpn_d2.fast.apply import make_fast
from fpn_d2.inference.export.program import export_program


class Graph(nn.Module):
    """What a trace asks of a detector, round a network of three layers."""

    divisor = 8

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))

    def forward(self, images, image_sizes):
        height, width = images.shape[-2:]
        padded = [(side + 7) // 8 * 8 for side in (height, width)]
        x = nn.functional.pad(images.float(), (0, padded[1] - width, 0, padded[0] - height))
        return self.layers(x / 255), image_sizes


@pytest.mark.parametrize("make", [lambda module: module, make_fast])
def test_timms_padding_by_size_is_traced_for_all_sizes(make):
    kind = pytest.importorskip("timm.layers.conv2d_same").Conv2dSame
    torch.manual_seed(0)
    convolutions = [kind(3, 4, 3, stride=2), kind(4, 4, 5, stride=2, groups=4), kind(4, 2, (3, 5), stride=(2, 1))]
    graph = Graph(make(nn.Sequential(*convolutions))).eval()
    kinds = [type(layer) for layer in graph.layers]
    program = export_program(graph).module()
    assert [type(layer) for layer in graph.layers] == kinds
    for shape in ((2, 3, 165, 333), (1, 3, 8, 8), (3, 3, 97, 40)):
        images, sizes = torch.randint(0, 256, shape, dtype=torch.uint8), torch.zeros(shape[0], 2, dtype=torch.int64)
        torch.testing.assert_close(program(images, sizes)[0], graph(images, sizes)[0])


@pytest.mark.parametrize("make", [lambda module: module, make_fast])
def test_layers_get_their_class_back_when_a_trace_fails(monkeypatch, make):
    graph = Graph(make(nn.Sequential(pytest.importorskip("timm.layers.conv2d_same").Conv2dSame(3, 4, 3, stride=2))))
    kind = type(graph.eval().layers[0])

    def fails(*args, **kwargs):
        assert type(graph.layers[0]) is not kind
        raise RuntimeError("no trace")

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(RuntimeError, match="no trace"):
        export_program(graph)
    assert type(graph.layers[0]) is kind
