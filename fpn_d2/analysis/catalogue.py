"""The list of everything that is registered: necks, bottom-up pathways and RoI extractors, with what each costs.

The rows come from the registries: a component that is added to one appears by existing. Networks are built on the
"meta" device, which knows shapes but no numbers, so that even large ones take little time and memory.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.structures import Boxes
from tabulate import tabulate
from tqdm import tqdm

from fpn_d2.analysis.measure.complexity import count_macs, count_parameters
from fpn_d2.config import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY, Neck, build_pooler
from fpn_d2.modeling.bottom_up.names import known_bottom_ups

FORMATS = ("table", "markdown", "json")
# RoIs for which the multiply-adds of an extractor are given, and the few of them that are computed.
_ROIS = 1000
_COMPUTED_ROIS = 16

# What stands in the table of components that need other options than a ResNet-50 and its four maps, or of which several
# kinds are worth a row: for each a label and the keys that make it.
Options = dict[str, object]
_P3_P7 = {"MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"], "MODEL.FPN.TOP_BLOCK": "p6p7_c5"}
_VIT_B = {"MODEL.FPN.BOTTOM_UP": "build_vit_backbone", "MODEL.TIMM.NAME": "vit_base_patch16_224"}
_SIMPLE = {"MODEL.FPN.IN_FEATURES": ["res4"], "MODEL.FPN.NORM": "LN"}
_C4 = {"MODEL.FPN.IN_FEATURES": ["res4"], "MODEL.RESNETS.OUT_FEATURES": ["res4"]}
NECK_EXAMPLES: dict[str, list[tuple[str, Options]]] = {
    "FPN": [
        ("ResNet-50", {}),
        ("ResNet-50, P3-P7", _P3_P7),
        ("ResNet-50, no top-down", {"MODEL.FPN.TOP_DOWN": False}),
        ("ResNet-50, no lateral", {"MODEL.FPN.LATERAL": False}),
        ("ResNet-50, only P2", {"MODEL.FPN.OUT_FEATURES": ["p2"]}),
    ],
    "BiFPN": [("ResNet-50", {}), ("ResNet-50, P3-P7", _P3_P7 | {"MODEL.FPN.TOP_BLOCK": "p6p7_maxpool"})],
    "NASFPN": [("ResNet-50", {}), ("ResNet-50, P3-P7", _P3_P7 | {"MODEL.FPN.TOP_BLOCK": "p6p7_maxpool"})],
    "SimpleFeaturePyramid": [("ViT-B/16", _VIT_B | _SIMPLE)],
    "ImagePyramid": [("ResNet-50 to C4", _C4)],
}
BOTTOM_UP_EXAMPLES: dict[str, list[tuple[str, Options]]] = {
    "build_resnet_backbone": [
        ("ResNet-18", {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}),
        ("ResNet-50", {}),
        ("ResNet-101", {"MODEL.RESNETS.DEPTH": 101}),
    ],
    "build_regnet_backbone": [("RegNetX-4GF", {})],
    "build_hybrid_resnet_vit_backbone": [("ResNet-50 to C4, 4 blocks", {})],
    "build_timm_backbone": [
        (name, {"MODEL.TIMM.NAME": name})
        for name in (
            "resnet50",
            "efficientnet_b0",
            "mobilenetv4_conv_small",
            "convnext_tiny",
            "swin_tiny_patch4_window7_224",
            "swinv2_tiny_window8_256",
            "mvitv2_tiny",
            "hrnet_w18",
        )
    ],
    "build_vit_backbone": [
        ("ViT-B/16, last map", _VIT_B),
        ("ViT-B/16, blocks 3, 6, 9, 12", _VIT_B | {"MODEL.VIT.OUT_BLOCKS": [3, 6, 9, 12]}),
    ],
}


@dataclass
class Component:
    """A row of the list.

    Attributes:
        kind: "neck", "bottom_up" or "roi_extractor".
        name: in its registry.
        built_with: what it was built with, for people.
        parameters: of this part alone.
        macs: multiply-adds of this part alone: for a neck what it adds to one run of the bottom-up pathway, for an
            extractor those of 1000 RoIs in a box head of 7 x 7 cells.
        total_parameters, total_macs: of a neck with its bottom-up pathway.
        outputs: stride and channels of each map that it returns.
        levels_per_roi: mean number of levels that an extractor pools a RoI from.
        error: why it could not be built; everything else is then empty.
    """

    kind: str
    name: str
    built_with: str = ""
    parameters: int | None = None
    macs: float | None = None
    total_parameters: int | None = None
    total_macs: float | None = None
    outputs: dict[str, tuple[int, int]] = field(default_factory=dict)
    levels_per_roi: float | None = None
    error: str = ""


def list_components(
    size: tuple[int, int] = (800, 1088), *, names: Sequence[str] | None = None, progress: bool | None = False
) -> list[Component]:
    """Build and measure every neck, bottom-up pathway and RoI extractor that is registered.

    Args:
        size: (height, width) of the image in pixels.
        names: only these; all if None.
        progress: show a progress bar; None: where stderr is a terminal.

    Raises:
        UserError: the size is not positive.
    """
    if min(size) < 1:
        raise UserError(f"the image size is {size[0]}x{size[1]}; expected a positive height and width")
    work = [(row, measure) for row, measure in _work(size) if names is None or row.name in names]
    rows = []
    with tqdm(
        total=len(work), desc="Measuring", unit="part", disable=None if progress is None else not progress
    ) as bar:
        for empty, measure in work:
            bar.set_postfix_str(empty.name)
            rows.append(_measured(empty, measure))
            bar.update()
    return rows


def _work(size: tuple[int, int]) -> Iterator[tuple[Component, Callable[[Component], None]]]:
    for name in sorted(name for name, _ in NECK_REGISTRY):
        for label, options in NECK_EXAMPLES.get(name, [("ResNet-50", {})]):
            cfg = _config({"MODEL.FPN.NECK": name} | options)
            yield Component("neck", name, label), lambda row, cfg=cfg: _measure_neck(row, cfg, size)
    for name, build in sorted(known_bottom_ups().items()):
        for label, options in BOTTOM_UP_EXAMPLES.get(name, [("", {})]):
            cfg = _config({"MODEL.FPN.BOTTOM_UP": name} | options)
            yield (
                Component("bottom_up", name, label),
                lambda row, build=build, cfg=cfg: _measure_bottom_up(row, build, cfg, size),
            )
    for name in sorted(name for name, _ in ROI_RULE_REGISTRY):
        cfg = _config({"MODEL.ROI_LEVEL_ASSIGN.NAME": name})
        yield Component("roi_extractor", name, "P2 to P5"), lambda row, cfg=cfg: _measure_extractor(row, cfg)


def _config(options: Options) -> CfgNode:
    """Detectron2's and our defaults with what configs/Base-FPN.yaml says of the backbone, then ``options``."""
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.NUMERICS = "exact"  # Detectron2's operations can be counted and watched
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    for key, value in options.items():
        cfg.merge_from_list([key, value])
    return cfg


def _measured(row: Component, measure: Callable[[Component], None]) -> Component:
    try:
        measure(row)
    except Exception as error:  # whatever others have registered: the list goes on
        reason = " ".join(str(error).split()) or type(error).__name__
        return Component(row.kind, row.name, row.built_with, error=reason)
    return row


def _measure_neck(row: Component, cfg: CfgNode, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3)).eval()
    if not isinstance(backbone, Neck):
        raise TypeError(f"{cfg.MODEL.BACKBONE.NAME} builds no neck of fpn_d2")
    image = _image(size, backbone.size_divisibility)
    row.total_parameters = count_parameters(backbone)
    row.total_macs = count_macs(lambda: backbone(image))
    row.parameters = row.total_parameters - count_parameters(backbone.bottom_up)
    row.macs = row.total_macs - count_macs(lambda: backbone.bottom_up(image))
    row.outputs = _outputs(backbone.output_shape())


def _measure_bottom_up(row: Component, build: Callable, cfg: CfgNode, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        network = build(cfg, ShapeSpec(channels=3)).eval()
    row.parameters = count_parameters(network)
    row.macs = count_macs(lambda: network(_image(size, network.size_divisibility)))
    row.outputs = _outputs(network.output_shape())


def _measure_extractor(row: Component, cfg: CfgNode) -> None:
    # Real numbers, since a rule sorts RoIs by them; RoIAlign itself is not counted, so that the maps may be small.
    shapes = {f"p{k}": ShapeSpec(channels=cfg.MODEL.FPN.OUT_CHANNELS, stride=2**k) for k in range(2, 6)}
    pooler = build_pooler(cfg, shapes, output_size=7, sampling_ratio=0, pooler_type="ROIAlignV2").eval()
    maps = [torch.zeros(1, shape.channels, 128 // shape.stride, 128 // shape.stride) for shape in shapes.values()]
    # One octave on either side of the rule's own range, in equal steps.
    sides = torch.logspace(math.log2(28), math.log2(1792), _COMPUTED_ROIS, base=2)
    boxes = Boxes(torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], dim=1))
    pooled_from = []
    handles = [
        part.register_forward_hook(lambda module, inputs, output: pooled_from.append(len(output)))
        for part in pooler.level_poolers
    ]
    with torch.no_grad():
        row.macs = count_macs(lambda: pooled_from.append(-pooler(maps, [boxes]).shape[1])) * _ROIS / len(sides)
    for handle in handles:
        handle.remove()
    channels = -pooled_from.pop()
    row.parameters = count_parameters(pooler)
    row.levels_per_roi = sum(pooled_from) / len(sides)
    row.outputs = {name: (shape.stride, channels) for name, shape in shapes.items()}


def _image(size: tuple[int, int], divisibility: int) -> torch.Tensor:
    """An image without content, padded as Detectron2 pads."""
    height, width = (math.ceil(side / max(divisibility, 1)) * max(divisibility, 1) for side in size)
    return torch.zeros(1, 3, height, width, device="meta")


def _outputs(shapes: dict[str, ShapeSpec]) -> dict[str, tuple[int, int]]:
    return {name: (shape.stride, shape.channels) for name, shape in shapes.items()}


def show(rows: Sequence[Component], size: tuple[int, int], form: str = "table") -> str:
    """Lay out the rows for a terminal ("table"), a document ("markdown") or a program ("json").

    Raises:
        UserError: the form is none of these.
    """
    if form not in FORMATS:
        raise UserError(f"the format is {form!r}; expected one of {', '.join(FORMATS)}")
    if form == "json":
        return json.dumps({"height": size[0], "width": size[1], "components": [asdict(row) for row in rows]}, indent=1)
    image = f"image of {size[0]} x {size[1]}"
    parts = []
    for kind, title, headers, cells in (
        (
            "neck",
            f"Necks, {image}",
            ["neck", "bottom-up", "levels", "strides", "channels", "M parameters", "GMAC", "with bottom-up", "GMAC "],
            lambda r: [*_levels(r), _millions(r.parameters), _giga(r.macs), *_total(r)],
        ),
        (
            "bottom_up",
            f"Bottom-up pathways, {image}",
            ["bottom-up", "kind", "maps", "strides", "channels", "M parameters", "GMAC"],
            lambda r: [*_levels(r), _millions(r.parameters), _giga(r.macs)],
        ),
        (
            "roi_extractor",
            f"RoI extractors, {_ROIS} RoIs of 7 x 7 cells",
            [
                "extractor",
                "pools from",
                "levels",
                "strides",
                "channels to head",
                "levels of a RoI",
                "M parameters",
                "GMAC",
            ],
            lambda r: [*_levels(r), f"{r.levels_per_roi:.2f}", _millions(r.parameters), _giga(r.macs)],
        ),
    ):
        own = [row for row in rows if row.kind == kind]
        lines = [[row.name, row.built_with, *cells(row)] for row in own if not row.error]
        parts.append(_layout(title, headers, lines, form))
        parts += [f"Not built: {row.name}. {row.error}" for row in own if row.error]
    return "\n\n".join(parts)


def _layout(title: str, headers: list[str], lines: list[list[str]], form: str) -> str:
    if form == "table":
        return f"{title}\n{tabulate(lines, headers=headers, tablefmt='simple', disable_numparse=True)}"
    rule = "| --- | --- | --- | --- | ---: |" + " ---: |" * (len(headers) - 5)
    rows = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in [headers, *lines]]
    return "\n".join([f"### {title}", "", rows[0], rule, *rows[1:]])


def _levels(row: Component) -> list[str]:
    names = list(row.outputs)
    strides = [stride for stride, _ in row.outputs.values()]
    channels = [channels for _, channels in row.outputs.values()]
    shown = sorted(set(channels)) if len(set(channels)) == 1 else channels
    return [", ".join(names), ", ".join(map(str, strides)), ", ".join(map(str, shown))]


def _total(row: Component) -> list[str]:
    return [_millions(row.total_parameters), _giga(row.total_macs)]


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.1f}"
