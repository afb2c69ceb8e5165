"""Our names of bottom-up pathways beside other projects' in one registry, whichever is imported first."""

import subprocess
import sys

import pytest
from detectron2.modeling.backbone import BACKBONE_REGISTRY

from fpn_d2.errors import UserError
from fpn_d2.modeling.bottom_up.names import PREFIX, find_bottom_up, known_bottom_ups

# A project as Detic is: it registers names that we have too, before or after fpn_d2.
PROJECT = """
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.layers import ShapeSpec
from torch import nn
class Theirs(Backbone):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
    def forward(self, x):
        return {"layer2": self.conv(x)}
    def output_shape(self):
        return {"layer2": ShapeSpec(channels=8, stride=4)}
def build(cfg, input_shape):
    return Theirs()
for name in NAMES:
    BACKBONE_REGISTRY._do_register(name, build)
"""
USE = """
import logging
logging.basicConfig(format="%(message)s")
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
cfg = get_cfg()
fpn_d2.add_fpn_d2_config(cfg)
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.BOTTOM_UP = "build_fpn_backbone", "build_timm_backbone"
cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["layer2"], 8
print(type(build_backbone(cfg).bottom_up).__name__)
cfg.MODEL.FPN.BOTTOM_UP, cfg.MODEL.RESNETS.NORM = "fpn_d2.build_regnet_backbone", "BN"
cfg.MODEL.REGNET.DEPTH, cfg.MODEL.REGNET.W_A, cfg.MODEL.REGNET.W_0 = 13, 36.44, 24
cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.REGNET.OUT_FEATURES = ["res2"]
print(type(build_backbone(cfg).bottom_up).__name__)
"""


@pytest.mark.parametrize("first", ["project", "fpn_d2"])
def test_a_project_with_the_same_names(first):
    parts = {"project": PROJECT, "fpn_d2": "import fpn_d2"}
    ours = [name.removeprefix(PREFIX) for name, _ in BACKBONE_REGISTRY if name.startswith(PREFIX)]
    assert {"build_timm_backbone", "build_vit_backbone", "build_regnet_backbone"} <= set(ours)
    order = [parts.pop(first), *parts.values()]
    code = "\n".join([f"NAMES = {ours}", *order, USE])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Theirs", "RegNetBackbone"]
    assert "that of __main__; the one of fpn_d2 is called fpn_d2.build_timm_backbone" in done.stderr
    assert "called fpn_d2.build_regnet_backbone" not in done.stderr


def test_short_and_long_names_mean_the_same():
    known = known_bottom_ups()
    assert "build_resnet_backbone" in known and "build_timm_backbone" in known
    assert not any(name.startswith(PREFIX) for name in known) and "build_fpn_backbone" not in known
    for name in ("build_timm_backbone", "build_hybrid_resnet_vit_backbone"):
        assert find_bottom_up(name) is find_bottom_up(PREFIX + name) is BACKBONE_REGISTRY.get(PREFIX + name)
        assert name not in BACKBONE_REGISTRY


@pytest.mark.parametrize("name,hint", [("build_tim_backbone", "did you mean build_timm_backbone"), ("x", "expected")])
def test_unknown_names_are_refused(name, hint):
    with pytest.raises(UserError, match=f"MODEL.FPN.BOTTOM_UP is '{name}'.*{hint}.*build_resnet_backbone"):
        find_bottom_up(name)
