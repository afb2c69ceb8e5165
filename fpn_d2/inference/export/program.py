"""The graph of a detector as an exported program of PyTorch, for any number and size of images."""

import contextlib
from collections.abc import Iterator

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fpn_d2.errors import UserError
from fpn_d2.fast.convolution import padded_by_size

from .graph import DetectorGraph

LARGEST_BATCH, LARGEST_SIDE = 1024, 16384
# What a trace that finds sizes fixed ends with; PyTorch's explanation of it, which names the sizes that are left, can
# fail itself.
_REFUSED = (torch._dynamo.exc.UserError, AssertionError)


def export_program(graph: DetectorGraph) -> ExportedProgram:
    """Trace ``graph`` with batch, height and width left open.

    Raises:
        UserError: a part of it, the bottom-up pathway as a rule, asks for sizes that a trace has to leave open.
    """
    stride = max(graph.divisor, 1)
    # As position embeddings of one patch, which are not interpolated: from two patches on, or from two cells of the
    # coarsest map, there is one way.
    for least in (1, stride + 1, 2 * stride + 1):
        try:
            program = _traced(graph, least)
            break
        except _REFUSED as error:
            refused = error
    else:
        said = " ".join(str(refused).split())[:300]
        raise UserError(f"this detector cannot be exported, PyTorch's tracer says: {said}") from refused
    _drop_assertions(program)
    return program


def _traced(graph: DetectorGraph, least: int) -> ExportedProgram:
    """The program for images of at least so many pixels a side."""
    from torch.fx.experimental import _config as shapes

    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    height, width = (Dim(name, min=least, max=LARGEST_SIDE) for name in ("height", "width"))
    # What layout a map of one column has is asked again and again; so set, no answer is taken for all sizes.
    with torch.no_grad(), _in_whole_numbers(graph), shapes.patch(backed_size_oblivious=True):
        return torch.export.export(
            graph,
            example(graph),
            dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch}),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextlib.contextmanager
def _in_whole_numbers(graph: DetectorGraph) -> Iterator[None]:
    """Within this context timm's ``Conv2dSame`` finds its padding in whole numbers.

    timm divides sizes as floats; where they are left open, a trace does not get to the end of what that gives.
    """
    kinds = {module: type(module) for module in graph.modules() if _pads_by_size(type(module))}
    try:
        for module in kinds:
            module.__class__ = _PadsBySize
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


def _pads_by_size(kind: type) -> bool:
    plain = getattr(kind, "plain", kind)  # of a fast class
    return f"{plain.__module__}.{plain.__qualname__}" == "timm.layers.conv2d_same.Conv2dSame"


class _PadsBySize(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weights = (self.weight, self.bias)
        return F.conv2d(padded_by_size(self, x), *weights, self.stride, 0, self.dilation, self.groups)


def _drop_assertions(program: ExportedProgram) -> None:
    """Take out what the tracer assumed of numbers: that a map has more than one cell, that suppression keeps two.

    The operations do not need it, and small images and images without detections would be refused.
    """
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def example(graph: DetectorGraph) -> tuple[Tensor, Tensor]:
    """Images to trace with: two of no special size."""
    device = graph.pixel_mean.device
    channels = graph.pixel_mean.shape[0]
    images = torch.zeros(2, channels, 165, 333, dtype=torch.uint8, device=device)
    return images, torch.tensor([[165, 300], [150, 333]], device=device)
