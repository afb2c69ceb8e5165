"""Plain vision transformers as bottom-up pathways: last map, maps from different depths, any size of image."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import ViTBackbone

timm = pytest.importorskip("timm")

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 64}


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def build(name="vit_tiny_patch16_224", options=None, **more):
    torch.manual_seed(0)
    return randomise(ViTBackbone(name, options=SMALL | (options or {}), **more)).eval()


@pytest.mark.parametrize(
    "name,options",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True, "pre_norm": True}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_equals_timm_at_the_trained_size(name, options):
    backbone = build(name, options)
    theirs = timm.create_model(name, num_classes=0, **(SMALL | options)).eval()
    theirs.load_state_dict(backbone.vit.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
        actual = backbone(images)
    assert list(actual) == ["res4"]
    torch.testing.assert_close(actual["res4"], tokens.reshape(2, 4, 4, 32).permute(0, 3, 1, 2))


def test_every_parameter_of_the_single_map_is_used():
    backbone = build(options={"global_pool": "avg"}).train()  # timm has a norm for the pooled vector here
    backbone(torch.randn(2, 3, 64, 64))["res4"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (16, 16), (1, 130)])
@pytest.mark.parametrize("out_blocks", [[], [1, 2, 3, 4]])
def test_any_size(size, out_blocks):
    backbone = build(out_blocks=out_blocks)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, *size))
    assert list(maps) == list(backbone.output_shape()) == (["res2", "res3", "res4", "res5"] if out_blocks else ["res4"])
    for key, shape in backbone.output_shape().items():
        assert maps[key].shape == (1, shape.channels, *(math.ceil(side / shape.stride) for side in size))


def test_other_sizes_by_hand():
    """75 x 101 pixels: padded to 80 x 112, a grid of 5 x 7, position embeddings bicubic, antialiased where smaller."""
    backbone = build()
    vit = backbone.vit
    images = torch.randn(1, 3, 75, 101)
    with torch.no_grad():
        patches = F.conv2d(
            F.pad(images, (0, 11, 0, 5)), vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=16
        )
        grid = vit.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(5, 7), mode="bicubic", antialias=True)
        tokens = (patches + grid).flatten(2).transpose(1, 2)
        tokens = torch.cat([vit.cls_token + vit.pos_embed[:, :1], tokens], dim=1)
        for block in vit.blocks:
            tokens = block(tokens)
        expected = vit.norm(tokens)[:, 1:].transpose(1, 2).reshape(1, 32, 5, 7)
        torch.testing.assert_close(backbone(images)["res4"], expected, rtol=1e-4, atol=1e-5)


def deconvolve(x, layer):
    """2x2 transposed convolution with stride 2 as a loop: each cell becomes a block of its own."""
    n, _, height, width = x.shape
    out = torch.zeros(n, layer.weight.shape[1], 2 * height, 2 * width)
    for i in range(2 * height):
        for j in range(2 * width):
            out[:, :, i, j] = x[:, :, i // 2, j // 2] @ layer.weight[:, :, i % 2, j % 2] + layer.bias
    return out


def channel_norm(x, layer):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    x = (x - mean) / (variance + 1e-6).sqrt()
    return x * layer.weight[:, None, None] + layer.bias[:, None, None]


def test_maps_of_different_depths_by_hand():
    backbone = build(out_blocks=[1, 2, 3, 4])
    images = torch.randn(2, 3, 48, 80)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **SMALL).eval()
    theirs.load_state_dict(backbone.vit.state_dict(), strict=False)
    with torch.no_grad():
        raw = theirs.forward_intermediates(images, norm=False, intermediates_only=True)
        up = backbone.rescale["res2"]
        res2 = deconvolve(F.gelu(channel_norm(deconvolve(raw[0], up[0]), up[1])), up[3])
        res3 = deconvolve(raw[1], backbone.rescale["res3"][0])
        res5 = F.max_pool2d(F.pad(raw[3], (0, 1, 0, 1), value=-1e9), 2)
        actual = backbone(images)
    for key, value in {"res2": res2, "res3": res3, "res4": raw[2], "res5": res5}.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5)


def test_blocks_after_the_last_that_is_asked_for_are_left_out():
    backbone = build(out_blocks=[1, 2, 3, 5], options={"depth": 7}).train()
    assert len(backbone.vit.blocks) == 5
    sum(value.square().sum() for value in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize("patch,channels", [(8, [16, 32, 32, 32]), (32, [4, 8, 16, 32]), (4, [32] * 4)])
def test_other_patch_sizes(patch, channels):
    backbone = build(out_blocks=[1, 2, 3, 4], options={"patch_size": patch})
    assert [shape.channels for shape in backbone.output_shape().values()] == channels
    maps = backbone(torch.randn(1, 3, 33, 70))
    assert [tuple(value.shape[2:]) for value in maps.values()] == [(9, 18), (5, 9), (3, 5), (2, 3)]
    assert [value.shape[1] for value in maps.values()] == channels
    assert list(build(options={"patch_size": patch}).output_shape()) == [f"res{int(math.log2(patch))}"]


def test_freezing_counts_embeddings_then_blocks():
    for freeze_at, frozen in (
        (0, ()),
        (1, ("vit.cls", "vit.pos", "vit.patch")),
        (3, ("vit.cls", "vit.pos", "vit.patch")),
    ):
        frozen += tuple(f"vit.blocks.{i}." for i in range(freeze_at - 1))
        parameters = dict(build(freeze_at=freeze_at).named_parameters())
        expected = {key for key in parameters if frozen and key.startswith(frozen)}
        assert {key for key, p in parameters.items() if not p.requires_grad} == expected


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    images = torch.randn(1, 3, 40, 70)
    gradients, calls = [], []
    for checkpointing in (False, True):
        backbone = build(out_blocks=[1, 2, 3, 4], gradient_checkpointing=checkpointing, freeze_at=2).train()
        count = []
        backbone.vit.blocks[3].attn.register_forward_hook(lambda *_: count.append(1))  # noqa: B023
        sum(value.square().sum() for value in backbone(images).values()).backward()
        gradients.append({key: p.grad for key, p in backbone.named_parameters() if p.requires_grad})
        calls.append(len(count))
    assert calls == [1, 2]
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value)


@pytest.mark.parametrize("classes", [1000, 0])
def test_weights_file(tmp_path, classes):
    torch.manual_seed(1)
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=classes, **SMALL))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = ViTBackbone("vit_tiny_patch16_224", options=SMALL, weights=str(tmp_path / "weights.pth"))
    for key, value in backbone.vit.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_builder_reads_every_key():
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    cfg.MODEL.TIMM.NAME = "vit_tiny_patch16_224"
    cfg.MODEL.TIMM.OPTIONS = [[key, value] for key, value in SMALL.items()]
    cfg.MODEL.TIMM.DROP_PATH = 0.3
    cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING = True
    cfg.MODEL.VIT.OUT_BLOCKS = [1, 2, 3, 4]
    backbone = BACKBONE_REGISTRY.get("fpn_d2.build_vit_backbone")(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == ["res2", "res3", "res4", "res5"]
    assert backbone.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert backbone.vit.grad_checkpointing
    assert not backbone.vit.pos_embed.requires_grad and backbone.vit.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("vit_tiny", {}, "did you mean vit_tiny_"),
        ("resnet18", {}, "has to name a plain ViT"),
        ("swin_tiny_patch4_window7_224", {}, "is no plain ViT"),
        ("vit_small_patch14_dinov2", {}, r"patches of 14 x 14; .*\"patch_size\", 16"),
        ("vit_tiny_patch16_224", {"out_blocks": [1, 2, 4]}, r"OUT_BLOCKS.*is \[1, 2, 4\]; .*four .*from 1 to 4"),
        ("vit_tiny_patch16_224", {"out_blocks": [0, 1, 2, 3]}, "OUT_BLOCKS"),
        ("vit_tiny_patch16_224", {"out_blocks": [1, 2, 4, 3]}, "OUT_BLOCKS"),
        ("vit_tiny_patch16_224", {"out_blocks": [1, 2, 3, 5]}, "OUT_BLOCKS"),
        ("vit_tiny_patch16_224", {"freeze_at": -1}, "FREEZE_AT"),
    ],
)
def test_construction_refuses(name, options, message):
    shape = SMALL if "vit" in name else {}
    with pytest.raises(UserError, match=message):
        ViTBackbone(name, options=shape | ({"img_size": 56} if "14" in name else {}), **options)
