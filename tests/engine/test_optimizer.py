"""The optimizer that SOLVER.OPTIMIZER names."""

import pytest
import torch
from detectron2 import solver
from detectron2.config import get_cfg
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.engine.optimizer import build_optimizer
from fpn_d2.errors import UserError


def config(*options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.merge_from_list(list(options))
    return cfg


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))


def step(optimizer, network):
    optimizer.zero_grad()
    (100 * network(torch.ones(1, 3, 5, 5)).square().sum() + 100 * network[0].weight.square().sum()).backward()
    optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_detectron2s(numerics, nesterov):
    cfg = config(
        *["MODEL.NUMERICS", numerics, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.NESTEROV", nesterov],
        *["SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.2, "SOLVER.WEIGHT_DECAY_NORM", 0.1],
    )
    ours, stock = model(), model()
    a, b = build_optimizer(cfg, ours), solver.build_optimizer(cfg, stock)
    for _ in range(3):
        for x, y in zip(step(a, ours), step(b, stock), strict=True):
            assert torch.equal(x, y) if numerics == "exact" else torch.allclose(x, y, atol=1e-4)
    assert any(group["fused"] for group in a.param_groups) == (numerics == "fast")


@pytest.mark.parametrize("clip", [False, True])
def test_adamw_reads_the_keys(clip):
    cfg = config(
        *["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.01, "SOLVER.WEIGHT_DECAY", 0.5],
        *["SOLVER.WEIGHT_DECAY_NORM", 0.0, "SOLVER.CLIP_GRADIENTS.ENABLED", clip],
        *["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.001],
    )
    ours, reference = model(), model()
    optimizer = build_optimizer(cfg, ours)
    assert isinstance(optimizer, torch.optim.AdamW)
    expected = torch.optim.AdamW(
        [{"params": reference[0].parameters(), "weight_decay": 0.5}, {"params": reference[1].parameters()}],
        lr=0.01,
        weight_decay=0.0,
    )
    before = [p.grad for p in ours.parameters()]
    assert before == [None] * 4
    for actual, wanted in zip(step(optimizer, ours), step(expected, reference), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)
    assert max(p.grad.abs().max() for p in ours.parameters()) > 0.001 or clip
    if clip:
        assert max(p.grad.abs().max() for p in ours.parameters()) <= 0.001


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("meta", False)])
def test_fused_on_cpus_alone(name, device, fused):
    optimizer = build_optimizer(config("SOLVER.OPTIMIZER", name), model().to(device))
    assert all(bool(group["fused"]) == fused for group in optimizer.param_groups)


def test_unknown_name():
    with pytest.raises(UserError, match="'Adam'; expected one of SGD, AdamW"):
        build_optimizer(config("SOLVER.OPTIMIZER", "Adam"), model())
