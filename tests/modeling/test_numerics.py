"""The switch MODEL.NUMERICS: what "fast" changes, what it keeps, and that it computes the same."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from fpn_d2.modeling.fast_conv import FastConv2d
from fpn_d2.modeling.numerics import speed_up
from fpn_d2.modeling.ops.linear import OneDNNLinear
from tests.batches import random_batch, seed_everything
from tests.modeling.test_roi_heads import config


def build(numerics, norm="FrozenBN", *options):
    cfg = config(
        *["MODEL.NUMERICS", numerics, "MODEL.RESNETS.NORM", norm, "MODEL.ROI_HEADS.NUM_CLASSES", 3],
        *["MODEL.PIXEL_STD", [57.0, 57.0, 57.0], "MODEL.BACKBONE.FREEZE_AT", 0, *options],
    )
    seed_everything()
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return cfg, model


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
@pytest.mark.parametrize("heads", ["FPNROIHeads", "FPNCascadeROIHeads"])
def test_fast_trains_as_exact_does(norm, heads):
    losses, gradients = [], []
    for numerics in ("exact", "fast"):
        agnostic = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
        cfg, model = build(numerics, norm, "MODEL.ROI_HEADS.NAME", heads, *agnostic)
        batch = random_batch(cfg)
        seed_everything()
        found = model(batch)
        sum(found.values()).backward()
        losses.append(found)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0].keys() == losses[1].keys() and gradients[0].keys() == gradients[1].keys()
    for name, exact in losses[0].items():
        torch.testing.assert_close(losses[1][name], exact, rtol=1e-4, atol=1e-5)
    for name, exact in gradients[0].items():
        scale = float(exact.abs().max())
        torch.testing.assert_close(gradients[1][name], exact, rtol=1e-3, atol=1e-4 * max(scale, 1e-3), msg=name)


def test_fast_is_fast_and_exact_is_detectron2s():
    _, exact = build("exact")
    _, fast = build("fast")
    assert list(exact.state_dict()) == list(fast.state_dict())
    fast.load_state_dict(exact.state_dict(), strict=True)

    def kinds(model):
        return {type(module) for module in model.modules()}

    assert not {FastConv2d, OneDNNLinear} & kinds(exact)
    assert {FastConv2d, OneDNNLinear} <= kinds(fast)
    assert exact.roi_heads.box_pooler.exact and not fast.roi_heads.box_pooler.exact
    x = torch.randn(1, 3, 64, 96)
    assert fast.backbone(x)["p3"].is_contiguous(memory_format=torch.channels_last)
    assert exact.backbone(x)["p3"].is_contiguous()


def test_group_norm_stays_channels_first():
    _, model = build("fast", "GN")
    assert model.backbone(torch.randn(1, 3, 64, 96))["p3"].is_contiguous()


def test_on_a_gpu_weights_stay_as_they_are():
    weight = speed_up(nn.Sequential(nn.Conv2d(3, 4, 3)), "cuda")[0].weight
    assert weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="MODEL.NUMERICS is 'quick'; expected one of fast, exact"):
        build("quick")
