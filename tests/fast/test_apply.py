"""The switch MODEL.NUMERICS: what "fast" changes, what it keeps, and that it computes the same."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from fpn_d2.errors import UserError
from fpn_d2.fast import cpu_maps
from fpn_d2.fast.apply import make_fast, make_plain, speed_up
from fpn_d2.fast.convolution import FastConvolution
from fpn_d2.fast.guard import Fast
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


HEADS = ["MODEL.ROI_HEADS.NAME", "FPNROIHeads"]
AGNOSTIC = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
CONVOLUTIONS = ["MODEL.ROI_BOX_HEAD.NUM_CONV", 2, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32]
RETINANET = [
    *["MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]],
    *["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], "MODEL.FPN.TOP_BLOCK", "maxpool"],
]
MODELS = {
    "FPNROIHeads": [*HEADS, *AGNOSTIC],
    "FPNCascadeROIHeads": ["MODEL.ROI_HEADS.NAME", "FPNCascadeROIHeads", *AGNOSTIC, *CONVOLUTIONS],
    "masks": [*HEADS, "MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2, *CONVOLUTIONS],
    "key points": [*HEADS, "MODEL.KEYPOINT_ON", True],
    "FPNRetinaNet": ["MODEL.META_ARCHITECTURE", "FPNRetinaNet", *RETINANET],
    "TorchvisionRetinaNet": ["MODEL.META_ARCHITECTURE", "TorchvisionRetinaNet", *RETINANET],
    "its GN": ["MODEL.META_ARCHITECTURE", "TorchvisionRetinaNet", *RETINANET, "MODEL.RETINANET.NORM", "GN"],
}


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
@pytest.mark.parametrize("kind", MODELS)
def test_fast_trains_as_exact_does(norm, kind):
    losses, gradients = [], []
    for numerics in ("exact", "fast"):
        cfg, model = build(numerics, norm, *MODELS[kind])
        batch = random_batch(cfg)
        seed_everything()
        found = model(batch)
        sum(found.values()).backward()
        losses.append(found)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0].keys() == losses[1].keys() and gradients[0].keys() == gradients[1].keys()
    for name, exact in losses[0].items():
        torch.testing.assert_close(losses[1][name], exact, rtol=1e-4, atol=1e-5)
    # With group norms a unit may lie at its threshold: weights changed by 1e-6 change exact's own gradients by 2e-3.
    allowed = 5e-3 if norm == "GN" or kind == "its GN" else 5e-4
    for name, exact in gradients[0].items():
        scale = float(exact.abs().max())
        torch.testing.assert_close(gradients[1][name], exact, rtol=1e-3, atol=allowed * max(scale, 1e-2), msg=name)


def test_fast_is_fast_and_exact_is_detectron2s():
    _, exact = build("exact")
    _, fast = build("fast")
    assert list(exact.state_dict()) == list(fast.state_dict())
    fast.load_state_dict(exact.state_dict(), strict=True)

    assert not any(isinstance(module, Fast) for module in exact.modules())
    assert isinstance(fast.roi_heads.box_pooler, Fast) and isinstance(fast.roi_heads.box_head, Fast)
    x = torch.randn(1, 3, 64, 96)
    assert fast.backbone(x)["p3"].is_contiguous(memory_format=torch.channels_last)
    assert exact.backbone(x)["p3"].is_contiguous()


@pytest.mark.parametrize("kind", MODELS)
def test_every_convolution_is_fast(kind):
    for numerics in ("fast", "exact"):
        _, model = build(numerics, "FrozenBN", "MODEL.PROPOSAL_GENERATOR.NAME", "FPNRPN", *MODELS[kind])
        found = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        fast = {name for name, module in model.named_modules() if isinstance(module, FastConvolution)}
        assert fast == (found if numerics == "fast" else set())


def test_a_mask_head_computes_on_maps_that_are_channels_last():
    cfg, model = build("fast", "FrozenBN", *MODELS["masks"])
    seen = []
    for module in (model.roi_heads.mask_head.mask_fcn2, model.roi_heads.box_head.conv2):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(cpu_maps.is_channels_last(inputs[0])))
    model(random_batch(cfg))
    assert seen == [True, True]


def test_parameters_and_gradients_keep_their_layout():
    cfg, model = build("fast")
    sum(model(random_batch(cfg)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous() and (parameter.grad is None or parameter.grad.is_contiguous()), name


def test_a_module_stays_the_object_that_it_is():
    _, model = build("exact")
    before = dict(model.named_modules())
    hooked = model.backbone.fpn_output2
    make_fast(model)
    assert all(a is b for a, b in zip(before.values(), model.modules(), strict=True))
    assert isinstance(hooked, FastConvolution)
    make_plain(model)
    assert not any(isinstance(module, Fast) for module in model.modules())


def test_other_words_are_refused():
    with pytest.raises(UserError, match="MODEL.NUMERICS is 'quick'; expected one of fast, exact"):
        build("quick")
    with pytest.raises(UserError, match="numerics is 'quick'; expected one of fast, exact"):
        speed_up(nn.Conv2d(3, 4, 3), "quick")
