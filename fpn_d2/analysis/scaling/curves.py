"""How time and memory grow with the work: pooling, neck and whole detector, ours and Detectron2's side by side."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from tqdm import tqdm

from fpn_d2.engine import UserError
from fpn_d2.engine.device import known_device
from fpn_d2.fast.apply import make_fast
from fpn_d2.files import writable_folder, write_atomically
from fpn_d2.modeling.necks import build_neck
from fpn_d2.modeling.poolers import build_pooler

from ..compare.measure import inference_call, watch_for
from ..compare.run import environment, plain
from ..measure.given_maps import GivenMaps
from ..measure.memory import peak_on_gpu, raised_peak
from ..measure.timing import Call, paired, summarise
from ..subjects import build_pair, random_batch, read_config
from .figure import draw

OURS, STOCK = "fpn_d2", "Detectron2"
_CHANNELS = 256
_SIZE = (800, 1088)
# Twins: they differ in the two words that turn a config of Detectron2 into ours.
_CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
_AS_OURS = ["MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.ROI_HEADS.NAME", "FPNROIHeads"]
Pair = dict[str, Call]


@dataclass(frozen=True)
class Curve:
    """One part of a detector and the one quantity that it is measured against.

    Attributes:
        part, variable: what is measured, and against what.
        values: of the variable, ascending.
        calls: makes the calls to be timed from a value and a device.
        work: the size of the input that belongs to a value: the value itself, or its square for the side of an image.
    """

    part: str
    variable: str
    values: Sequence[int]
    calls: Callable[[int, torch.device], Pair]
    work: Callable[[int], float] = float

    @property
    def name(self) -> str:
        return f"{self.part} by {self.variable}"


def measure_curves(
    output: str,
    *,
    curves: Sequence[str] | None = None,
    rounds: int = 5,
    largest: int | None = None,
    device: str = "cpu",
    progress: bool | None = None,
) -> dict:
    """Measure every curve, write cost_curves.json and cost_curves.svg.

    Args:
        output: a folder.
        curves: names of some of ``CURVES``; None: all.
        rounds: measured rounds of each point, ours and Detectron2's in turn.
        largest: leave out values above it, and curves of which none is left; None: all.
        device: "cpu" or "cuda".
        progress: show a progress bar; None: where stderr is a terminal.

    Returns:
        The result, as it is in cost_curves.json: of each curve its "points" and of ours and Detectron2's the "growth".

    Raises:
        UserError: there is no such curve, no point up to ``largest``, or no GPU.
    """
    known = {curve.name: curve for curve in CURVES}
    unknown = [name for name in curves or () if name not in known]
    if unknown:
        raise UserError(f"there is no curve {unknown[0]!r}; there are {', '.join(known)}")
    where = known_device(device, "the device")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the device {device} was asked for, but there is no GPU that PyTorch can use: take cpu")
    asked_for = [known[name] for name in curves or known]
    chosen = [curve for curve in asked_for if largest is None or min(curve.values) <= largest]
    if not chosen:
        least = min(min(curve.values) for curve in asked_for)
        raise UserError(f"no point of these curves is at most {largest}: the least is {least}")
    folder = writable_folder(output)
    work = [(curve, value) for curve in chosen for value in curve.values if largest is None or value <= largest]
    points: dict[str, list[dict]] = {curve.name: [] for curve in chosen}
    with tqdm(work, unit="point", disable=None if progress is None else not progress) as bar:
        for curve, value in bar:
            bar.set_description(f"{curve.name} {value}")
            points[curve.name].append({"value": value, **measure_point(curve.calls(value, where), rounds, where)})
    found = {
        curve.name: {
            "part": curve.part,
            "variable": curve.variable,
            "points": points[curve.name],
            "growth": {name: growth(curve, points[curve.name], name) for name in (OURS, STOCK)},
        }
        for curve in chosen
    }
    result = plain({"environment": environment(where), "rounds": rounds, "curves": found})
    write_atomically(str(folder / "cost_curves.json"), json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(str(folder / "cost_curves.svg"), draw(result["curves"]))
    return result


def measure_point(calls: Pair, rounds: int, device: torch.device) -> dict:
    """Seconds (median, quartiles) and MB of peak memory of each call, and the ratios of their times."""
    peak = {}
    for name, call in calls.items():
        call()
        raised = peak_on_gpu(call, device) if device.type == "cuda" else raised_peak(call)
        peak[name] = None if isinstance(raised, str) else raised
    return summarise(paired(calls, rounds, 0, measure=watch_for(device))) | {"peak_mb": peak}


def growth(curve: Curve, points: list[dict], name: str) -> float | None:
    """Power of the work that the time grew with over the upper half of the points: 1 is in step with the input.

    It is the slope of a line fitted to the logarithms; None for fewer than two points.
    """
    upper = points[len(points) // 2 - (len(points) < 4) :] if len(points) > 1 else []
    xs = [math.log(curve.work(point["value"])) for point in upper]
    ys = [math.log(point["seconds"][name]["median"]) for point in upper]
    if len(xs) < 2:
        return None
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - mean_x) ** 2 for x in xs)


def table(result: dict) -> str:
    """One line per point, and the growth of each curve."""
    lines = []
    for name, curve in result["curves"].items():
        grown = {part: "-" if power is None else f"{power:.2f}" for part, power in curve["growth"].items()}
        lines.append(f"{name}: grows with the power {grown[OURS]} of its input, Detectron2's {grown[STOCK]}")
        for point in curve["points"]:
            ratio = point["times_as_fast"][STOCK]
            cells = [f"  {point['value']:>6}"]
            for part in (OURS, STOCK):
                peak = point["peak_mb"][part]
                shown = "-" if peak is None else f"{peak:.0f}"
                cells.append(f"{part} {point['seconds'][part]['median'] * 1e3:.1f} ms, {shown} MB")
            cells.append(f"{ratio['median']:.2f}x ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})")
            lines.append("; ".join(cells))
    return "\n".join(lines)


def _maps(size: tuple[int, int], levels: Sequence[int], number: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(number, _CHANNELS, *(math.ceil(side / 2**k) for side in size)) for k in levels]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _rois(number: int, size: tuple[int, int], device: torch.device) -> Boxes:
    """Boxes with sides of 16 px to half of the image, in equal steps of the logarithm: all levels have their share."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    sides = 16 * (extent / 32) ** torch.rand(number, 1, generator=generator)
    start = torch.rand(number, 2, generator=generator) * (extent - sides)
    return Boxes(torch.cat([start, start + sides], dim=1).to(device))


def _pooling(
    rois: int,
    device: torch.device,
    size: tuple[int, int] = _SIZE,
    levels: Sequence[int] = (2, 3, 4, 5),
    number: int = 1,
) -> Pair:
    cfg = _our_cfg(device)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [f"p{k}" for k in levels]
    shapes = {f"p{k}": ShapeSpec(channels=_CHANNELS, stride=2**k) for k in levels}
    ours = make_fast(build_pooler(cfg, shapes, output_size=7, sampling_ratio=0, pooler_type="ROIAlignV2"))
    stock = ROIPooler(7, [1 / 2**k for k in levels], 0, "ROIAlignV2")
    maps, boxes = _maps(size, levels, number, device), [_rois(rois, size, device) for _ in range(number)]
    own_maps = [_as_ours_gets_it(one) for one in maps]
    return {OURS: _no_grad(lambda: ours(own_maps, boxes)), STOCK: _no_grad(lambda: stock(maps, boxes))}


def _as_ours_gets_it(one: Tensor) -> Tensor:
    """A map in the memory format in which a backbone of ours, under MODEL.NUMERICS fast, hands it on."""
    return one.to(memory_format=torch.channels_last) if one.device.type == "cpu" else one


def _neck(size: tuple[int, int], number: int, device: torch.device) -> Pair:
    cfg = _our_cfg(device)
    names = cfg.MODEL.FPN.IN_FEATURES
    shapes = {name: ShapeSpec(channels=64 * 2**k, stride=2**k) for k, name in zip(range(2, 6), names, strict=True)}
    maps = {
        name: torch.randn(number, shape.channels, *(math.ceil(side / shape.stride) for side in size), device=device)
        for name, shape in shapes.items()
    }
    own = GivenMaps({name: _as_ours_gets_it(one) for name, one in maps.items()}, shapes)
    ours = make_fast(build_neck(cfg, own).to(device).eval())
    stock = FPN(GivenMaps(maps, shapes), names, _CHANNELS, top_block=LastLevelMaxPool()).to(device).eval()
    ours.load_state_dict(stock.state_dict())
    image = torch.zeros(number, 3, *size, device=device)
    return {name: _no_grad(lambda net=net: net(image)) for name, net in ((OURS, ours), (STOCK, stock))}


def _detector(device: torch.device, size: tuple[int, int] = (480, 640), number: int = 1, classes: int = 80) -> Pair:
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", str(classes), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    configs = [(_CONFIG, *read_config(_CONFIG, [*opts, *more], str(device))) for more in (_AS_OURS, [])]
    models = build_pair(tuple(configs), "")
    batch = random_batch(models[0].cfg, number, size)
    return {name: inference_call(m.network, batch) for name, m in zip((OURS, STOCK), models, strict=True)}


def _our_cfg(device: torch.device) -> CfgNode:
    return read_config(_CONFIG, _AS_OURS, str(device))[1]


def _no_grad(call: Call) -> Call:
    def without() -> object:
        with torch.no_grad():
            return call()

    return without


def _pixels(side: int) -> float:
    return float(side) ** 2


_SIDES = (256, 512, 1024, 2048, 4096)
CURVES = (
    Curve("pooling", "RoIs", (100, 300, 1000, 3000, 10000, 50000), lambda n, device: _pooling(n, device)),
    Curve("pooling", "image side", _SIDES, lambda side, device: _pooling(1000, device, (side, side)), _pixels),
    Curve("pooling", "levels", (1, 2, 3, 4), lambda n, device: _pooling(1000, device, levels=range(2, 2 + n))),
    Curve("pooling", "batch", (1, 2, 4, 8), lambda n, device: _pooling(500, device, number=n)),
    Curve("neck", "image side", _SIDES, lambda side, device: _neck((side, side), 1, device), _pixels),
    Curve("neck", "batch", (1, 2, 4, 8), lambda n, device: _neck((480, 640), n, device)),
    Curve("detector", "image side", _SIDES, lambda side, device: _detector(device, (side, side)), _pixels),
    Curve("detector", "batch", (1, 2, 4, 8), lambda n, device: _detector(device, number=n)),
    Curve("detector", "classes", (3, 20, 80, 365, 1203), lambda n, device: _detector(device, classes=n)),
)
