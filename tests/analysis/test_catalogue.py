"""The list of components: complete, its numbers those of the parts, and what cannot be built says why."""

import json

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from torch import nn

from fpn_d2.analysis import catalogue as components
from fpn_d2.analysis import count_macs, count_parameters
from fpn_d2.analysis.catalogue import Component, list_components, show
from fpn_d2.errors import UserError
from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY, Neck
from fpn_d2.modeling.bottom_up.names import known_bottom_ups

SIZE = (128, 192)


@pytest.fixture(scope="module")
def rows():
    """One timm model instead of eight, one ResNet instead of three; the others are measured in the slow tests."""
    few = {name: examples[:1] for name, examples in components.BOTTOM_UP_EXAMPLES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "BOTTOM_UP_EXAMPLES", few)
        return list_components(SIZE)


def test_everything_registered_is_listed_and_built(rows):
    def names(kind):
        return {row.name for row in rows if row.kind == kind}

    assert names("neck") == {name for name, _ in NECK_REGISTRY}
    assert names("bottom_up") == set(known_bottom_ups())
    assert names("roi_extractor") == {name for name, _ in ROI_RULE_REGISTRY}
    # Detectron2's main branch has what these need.
    assert all(not row.error or row.name.startswith("build_d2_") for row in rows), [row for row in rows if row.error]


def test_numbers_are_those_of_the_parts(rows):
    """The FPN's, by formula: 1x1 laterals and 3x3 outputs on ResNet-50's maps."""
    fpn = next(row for row in rows if row.name == "FPN" and row.built_with == "ResNet-50")
    resnet = next(row for row in rows if row.name == "build_resnet_fpn_backbone")
    channels = {2: 256, 3: 512, 4: 1024, 5: 2048}
    cells = {k: (SIZE[0] >> k) * (SIZE[1] >> k) for k in channels}
    assert fpn.parameters == sum((c + 1) * 256 + (9 * 256 + 1) * 256 for c in channels.values())
    assert fpn.macs == sum(cells[k] * (c * 256 + 9 * 256 * 256) for k, c in channels.items())
    assert fpn.outputs == {f"p{k}": (2**k, 256) for k in (2, 3, 4, 5, 6)}
    assert (fpn.total_parameters, fpn.total_macs) == (resnet.parameters, resnet.macs)


def test_images_are_padded_as_the_network_asks():
    row = list_components((97, 161), names=["FPN"])[0]
    same = list_components((128, 192), names=["FPN"])[0]
    assert row.total_macs == same.total_macs


def test_extractors(rows):
    by_name = {row.name: row for row in rows if row.kind == "roi_extractor"}
    assert by_name["canonical"].levels_per_roi == 1.0 and by_name["all_sum"].levels_per_roi == 4.0
    assert 1.0 < by_name["soft"].levels_per_roi < 2.0
    assert by_name["all_concat"].outputs["p2"] == (4, 1024) and by_name["all_sum"].outputs["p2"] == (4, 256)
    # One 3x3 convolution for each of four levels, on 49 cells.
    assert by_name["all_max"].macs == 1000 * 4 * 49 * 9 * 256 * 256
    assert by_name["all_max"].parameters == 4 * (9 * 256 + 1) * 256


def test_what_cannot_be_built_says_why(monkeypatch):
    class NeedsMore(Neck):
        def __init__(self, cfg, input_shape):
            raise ValueError("NeedsMore wants\nMODEL.SOMETHING")

    monkeypatch.setitem(NECK_REGISTRY._obj_map, "NeedsMore", NeedsMore)
    (row,) = list_components(SIZE, names=["NeedsMore"])
    assert row.error == "NeedsMore wants MODEL.SOMETHING" and row.parameters is None
    assert "Not built: NeedsMore. NeedsMore wants MODEL.SOMETHING" in show([row], SIZE)


def test_a_foreign_backbone_does_not_end_the_list(monkeypatch):
    # A plain module has no size_divisibility; another fails without a word.
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "foreign", lambda cfg, shape: nn.Conv2d(3, 8, 1))
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "mute", lambda cfg, shape: next(iter(())))
    foreign, mute = list_components((64, 64), names=["foreign", "mute"])
    assert "size_divisibility" in foreign.error and mute.error == "StopIteration"


def test_a_new_component_appears_by_existing(monkeypatch):
    class OneMap(Neck):
        def __init__(self, cfg, bottom_up):
            super().__init__()
            self.conv = nn.Conv2d(bottom_up.output_shape()["res4"].channels, 8, 1)
            self.own(bottom_up, ["res4"], {"p4": ShapeSpec(channels=8, stride=16)})

        def fuse(self, features):
            return {"p4": self.conv(features["res4"])}

    monkeypatch.setitem(NECK_REGISTRY._obj_map, "OneMap", OneMap)
    (row,) = list_components((64, 64), names=["OneMap"])
    assert (row.parameters, row.macs, row.outputs) == (1024 * 8 + 8, 16 * 1024 * 8, {"p4": (16, 8)})


def test_layouts(rows):
    data = json.loads(show(rows, SIZE, "json"))
    assert (data["height"], data["width"], len(data["components"])) == (*SIZE, len(rows))
    table, markdown = show(rows, SIZE), show(rows, SIZE, "markdown")
    for row in rows:
        assert row.name in table and row.name in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("| FPN | ResNet-50 |")]
    assert lines[0].startswith("| FPN | ResNet-50 | p2, p3, p4, p5, p6 | 4, 8, 16, 32, 64 | 256 | 3.34 |")
    for block in markdown.split("### ")[1:]:
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) == 1, block
    with pytest.raises(UserError, match="table, markdown, json"):
        show([Component("neck", "x")], SIZE, "html")
    with pytest.raises(UserError, match="0x5"):
        list_components((0, 5))


def test_the_count_is_that_of_a_real_network():
    """What is found on meta tensors is what a network with weights and an image does."""
    cfg = components._config({"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64})
    backbone = BACKBONE_REGISTRY.get("build_fpn_backbone")(cfg, ShapeSpec(channels=3)).eval()
    row = Component("neck", "FPN")
    components._measure_neck(row, cfg, (64, 96))
    assert row.total_parameters == count_parameters(backbone)
    assert row.total_macs == count_macs(lambda: backbone(torch.rand(1, 3, 64, 96)))
