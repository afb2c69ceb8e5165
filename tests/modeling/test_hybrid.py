"""The ResNet with a C5 of transformer blocks: names, shapes, position embedding, what attends to what."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, build_resnet_backbone
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import HybridResNetViT
from fpn_d2.modeling.bottom_up.hybrid import TransformerStage, sine_position_embedding

pytest.importorskip("timm")
IMAGES = ShapeSpec(channels=3)


def config(*options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "GN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.HYBRID.DEPTH, cfg.MODEL.HYBRID.CHANNELS, cfg.MODEL.HYBRID.NUM_HEADS = 2, 32, 4
    cfg.merge_from_list(list(options))
    return cfg


def build(*options):
    torch.manual_seed(0)
    return BACKBONE_REGISTRY.get("fpn_d2.build_hybrid_resnet_vit_backbone")(config(*options), IMAGES)


def test_c2_to_c4_are_the_resnets_under_its_names():
    hybrid = build().eval()
    cfg = config("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"])
    resnet = build_resnet_backbone(cfg, IMAGES).eval()
    keys = [key for key in hybrid.state_dict() if not key.startswith("res5")]
    assert keys == list(resnet.state_dict())
    resnet.load_state_dict({key: hybrid.state_dict()[key] for key in keys})
    images = torch.randn(2, 3, 75, 101)
    with torch.no_grad():
        maps, expected = hybrid(images), resnet(images)
    assert list(maps) == list(hybrid.output_shape()) == ["res2", "res3", "res4", "res5"]
    for key, value in expected.items():
        assert torch.equal(maps[key], value)
    for key, shape in hybrid.output_shape().items():
        assert maps[key].shape == (2, shape.channels, *(math.ceil(side / shape.stride) for side in (75, 101)))


def test_builder_reads_every_key():
    hybrid = build("MODEL.HYBRID.MLP_RATIO", 3.0, "MODEL.HYBRID.DROP_PATH", 0.4, "MODEL.HYBRID.DEPTH", 3)
    blocks = hybrid.res5.blocks
    assert len(blocks) == 3 and blocks[0].mlp.fc1.out_features == 96 and blocks[0].attn.num_heads == 4
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    assert hybrid.output_shape()["res5"] == ShapeSpec(channels=32, stride=32)
    assert list(build("MODEL.RESNETS.OUT_FEATURES", ["res3", "res5"]).output_shape()) == ["res3", "res5"]


def test_position_embedding_by_hand():
    embedding = sine_position_embedding(3, 5, 8).reshape(3, 5, 8)
    for row in range(3):
        for column in range(5):
            expected = []
            for position in (row, column):
                angles = [position / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(embedding[row, column], torch.tensor(expected))
    # A larger grid has the same embeddings where both have cells, and no two cells share one.
    larger = sine_position_embedding(20, 30, 8).reshape(20, 30, 8)
    torch.testing.assert_close(larger[:3, :5], embedding)
    assert len(larger.reshape(-1, 8).unique(dim=0)) == 600


def test_stage_by_hand():
    torch.manual_seed(0)
    stage = TransformerStage(6, 16, depth=2, num_heads=2).eval()
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 6, 5, 9)
    with torch.no_grad():
        conv = nn.functional.conv2d(x, stage.conv.weight, stage.conv.bias, stride=2, padding=1)
        tokens = torch.stack([conv[:, :, i, j] for i in range(3) for j in range(5)], dim=1)
        tokens = tokens + sine_position_embedding(3, 5, 16)
        for block in stage.blocks:
            tokens = block(tokens)
        tokens = nn.functional.layer_norm(tokens, (16,), stage.norm.weight, stage.norm.bias)
        actual = stage(x)
        for i in range(3):
            for j in range(5):
                torch.testing.assert_close(actual[:, :, i, j], tokens[:, i * 5 + j], rtol=1e-4, atol=1e-5)
        # Attention: one cell of C4 reaches every cell of C5, of its own image only.
        x[0, :, 0, 0] += 5
        changed = (stage(x) - actual).abs().amax(dim=1)
    assert (changed[0] > 1e-4).all() and (changed[1] == 0).all()


@pytest.mark.parametrize(
    "freeze_at,frozen",
    [(0, ()), (2, ("stem", "res2")), (4, ("stem", "res2", "res3", "res4")), (5, ("stem", "res"))],
)
def test_freezing(freeze_at, frozen):
    parameters = dict(build("MODEL.BACKBONE.FREEZE_AT", freeze_at).named_parameters())
    expected = {key for key in parameters if frozen and key.startswith(frozen)}
    assert {key for key, p in parameters.items() if not p.requires_grad} == expected


@pytest.mark.parametrize(
    "options,message",
    [
        (["MODEL.RESNETS.OUT_FEATURES", ["res4"]], r"OUT_FEATURES.*\['res4'\], without the res5"),
        (["MODEL.HYBRID.CHANNELS", 34], "CHANNELS.* is 34; .*multiple of 4"),
        (["MODEL.HYBRID.NUM_HEADS", 5], "CHANNELS.* is 32; .*which is 5"),
        (["MODEL.HYBRID.DEPTH", 0], "DEPTH.* is 0"),
    ],
)
def test_builder_refuses(options, message):
    with pytest.raises(UserError, match=message):
        build(*options)


def test_is_built_with_plain_arguments():
    resnet = build_resnet_backbone(config("MODEL.RESNETS.OUT_FEATURES", ["res4"]), IMAGES)
    hybrid = HybridResNetViT(resnet, TransformerStage(256, 16, depth=1, num_heads=2), out_features=["res4", "res5"])
    assert hybrid(torch.randn(1, 3, 64, 64))["res5"].shape == (1, 16, 2, 2)
