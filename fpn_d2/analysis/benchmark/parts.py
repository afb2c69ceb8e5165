"""Benchmarks of the parts that are ours: RoI pooling, neck, selection of proposals, each beside Detectron2's own."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import Boxes, Instances
from torch import Tensor

from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.roi_align.roi_align import VARIABLE, choose
from fpn_d2.modeling.poolers import PyramidROIPooler

from ..measure.complexity import count_macs
from ..measure.given_maps import GivenMaps
from ..measure.timing import Call
from ..parity import Tolerance
from ..subjects import optimized, read_config
from .detector import BFLOAT16_ALLOWED, CONFIG, STOCK, build_twins
from .line import Check, Ours, Timing, Work, equal_check, map_check, time_lines

_LEVELS = (2, 3, 4, 5)
_RESOLUTION = 7  # cells of a pooled RoI
Size = tuple[int, int]


def pooling(
    timing: Timing,
    *,
    rois: int,
    backward: bool = False,
    size: Size = (800, 1088),
    channels: int = 256,
    implementations: Sequence[str] = ("torch", "compiled"),
) -> list[dict]:
    """RoIAlign from all levels, on maps in the layout that each side prefers: channels-last for ours.

    Args:
        timing: how often.
        rois: number of RoIs.
        backward: with the gradient of the maps.
        size: (height, width) of the image in pixels.
        channels: of the maps.
        implementations: ours, as FPN_D2_ROI_ALIGN names them.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, channels, *(math.ceil(side / 2**k) for side in size)) for k in _LEVELS]
    maps = [torch.randn(shape, generator=generator) for shape in shapes]
    boxes = [Boxes(proposal_like(rois, size, generator))]
    scales = [1 / 2**k for k in _LEVELS]
    gradient = torch.randn(rois, channels, _RESOLUTION, _RESOLUTION, generator=generator) if backward else None

    stock = _pool(ROIPooler(_RESOLUTION, scales, 0, "ROIAlignV2"), maps, boxes, gradient)
    pooler = make_fast(PyramidROIPooler(_RESOLUTION, scales, 0, "ROIAlignV2"))
    own_maps = [one.to(memory_format=torch.channels_last) for one in maps]
    expected = stock()
    ours: dict[str, Ours | str] = {}
    for name in implementations:
        try:
            choose(name, own_maps)
        except RuntimeError as error:
            ours[name] = str(error)
            continue
        call = _with_implementation(name, _pool(pooler, own_maps, boxes, gradient))
        ours[name] = Ours(call, _pooling_checks(expected, call()), _shares(boxes[0]))
    return time_lines(stock, ours, timing)


def proposal_like(number: int, size: Size, generator: torch.Generator) -> Tensor:
    """(number, 4) boxes of all sizes, from 16 px to the whole image in equal steps of the logarithm.

    About half of them are pooled from P2, as of the proposals of a detector on photographs; all levels have a share.
    """
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    sides = 16 * (extent / 16) ** torch.rand(number, 1, generator=generator)
    start = torch.rand(number, 2, generator=generator) * (extent - sides)
    return torch.cat([start, start + sides], dim=1)


def _shares(boxes: Boxes) -> str:
    levels = (4 + (boxes.area().sqrt() / 224).log2()).floor().clamp(_LEVELS[0], _LEVELS[-1])
    return "RoIs of P2 to P5: " + ", ".join(str(int((levels == level).sum())) for level in _LEVELS)


def _pool(pool: ROIPooler, maps: list[Tensor], boxes: list[Boxes], gradient: Tensor | None) -> Call:
    """A call that gives [pooled], or with a gradient of it [pooled, gradient of each map]."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [pool(maps, boxes)]

    leaves = [one.detach().requires_grad_() for one in maps]

    def forward_and_backward() -> list[Tensor]:
        pooled = pool(leaves, boxes)
        return [pooled.detach(), *torch.autograd.grad(pooled, leaves, gradient)]

    return forward if gradient is None else forward_and_backward


def _with_implementation(name: str, call: Call) -> Call:
    def chosen() -> object:
        with _variable(VARIABLE, name):
            return call()

    return chosen


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _pooling_checks(expected: list[Tensor], came: list[Tensor]) -> list[Check]:
    allowed = Tolerance().relative
    checks = [map_check("pooled", expected[:1], came[:1], allowed)]
    return checks if len(expected) == 1 else [*checks, map_check("gradients", expected[1:], came[1:], allowed)]


def neck(
    timing: Timing, *, dtype: str, size: Size = (800, 1088), config: str = CONFIG, opts: Sequence[str] = ()
) -> list[dict]:
    """The neck on maps that are there: ours, optimised for inference, beside Detectron2's in float32.

    Args:
        timing: how often.
        dtype: "float32" or "bfloat16", of ours.
        size: (height, width) of the image in pixels.
        config: of the detectors whose necks they are.
        opts: KEY value pairs on top of it.
    """
    stock, own = build_twins(config, opts)
    fast = optimized(own.network, dtype)
    shapes = stock.network.backbone.bottom_up.output_shape()
    names = stock.cfg.MODEL.FPN.IN_FEATURES
    generator = torch.Generator().manual_seed(0)
    maps = {
        name: torch.rand(
            1, shapes[name].channels, *(math.ceil(side / shapes[name].stride) for side in size), generator=generator
        )
        for name in names
    }
    own_maps = {
        name: value.to(getattr(torch, dtype)).to(memory_format=torch.channels_last) for name, value in maps.items()
    }
    stock.network.backbone.bottom_up = GivenMaps(maps, shapes)
    fast.backbone.bottom_up = GivenMaps(own_maps, shapes)
    nothing = torch.zeros(1, 3, 1, 1)

    def run(backbone: torch.nn.Module) -> Call:
        def call() -> dict[str, Tensor]:
            with torch.no_grad():
                return backbone(nothing)

        return call

    calls = [run(network.backbone) for network in (stock.network, fast)]
    expected, came = (call() for call in calls)
    allowed = Tolerance().relative if dtype == "float32" else BFLOAT16_ALLOWED
    check = map_check("pyramid", list(expected.values()), [came[name] for name in expected], allowed)
    work = Work(count_macs(calls[0]), getattr(torch, dtype))
    return time_lines(calls[0], {f"optimised, {dtype}": Ours(calls[1], [check])}, timing, work=work)


def proposals(timing: Timing, *, size: Size, config: str = CONFIG, opts: Sequence[str] = ()) -> list[dict]:
    """Selection of proposals at test from the outputs of an RPN head, drawn at random.

    Args:
        timing: how often.
        size: (height, width) of the image in pixels, before it is padded to a multiple of 32.
        config: of the detectors whose RPNs they are.
        opts: KEY value pairs on top of it.
    """
    configs = [read_config(config, [*opts, *more], "cpu")[1] for more in (STOCK, [])]
    names = configs[0].MODEL.RPN.IN_FEATURES
    padded = [math.ceil(side / 32) * 32 for side in size]
    channels = configs[0].MODEL.FPN.OUT_CHANNELS
    shapes = {name: ShapeSpec(channels=channels, stride=2 ** int(name[1:])) for name in names}
    rpns = [build_proposal_generator(cfg, shapes).eval() for cfg in configs]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.zeros(1, 1, *(math.ceil(side / shapes[name].stride) for side in padded)) for name in names]
    anchors = rpns[0].anchor_generator(maps)
    logits = [torch.randn(1, len(level), generator=generator) for level in anchors]
    deltas = [torch.randn(1, len(level), 4, generator=generator) * 0.2 for level in anchors]

    def run(rpn: torch.nn.Module) -> Call:
        def call() -> list[Instances]:
            with torch.no_grad():
                return rpn.predict_proposals(anchors, logits, deltas, [size])

        return call

    calls = [run(rpn) for rpn in rpns]
    (expected,), (came,) = (call() for call in calls)
    checks = [
        equal_check("boxes", expected.proposal_boxes.tensor, came.proposal_boxes.tensor, "px"),
        equal_check("logits", expected.objectness_logits, came.objectness_logits, ""),
    ]
    note = f"{len(came)} kept of {sum(len(level) for level in anchors)} anchors"
    return time_lines(calls[0], {type(rpns[1]).__name__: Ours(calls[1], checks, note)}, timing)
