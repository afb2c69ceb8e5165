"""SOLVER.BOTTOM_UP_*: learning rates of the bottom-up pathway and its layers, and iterations without it."""

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from fpn_d2.engine import Trainer, UserError
from fpn_d2.engine.bottom_up_rates import lr_factors

from .small import small_config

OPTS = ["DATASETS.TEST", "()", "TEST.BEST_METRIC", "", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4]


def _rates(trainer):
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_bottom_up_pathway_has_its_factor(tmp_path, scenes, optimizer, numerics):
    keys = [*OPTS, "SOLVER.OPTIMIZER", optimizer, "MODEL.NUMERICS", numerics, "SOLVER.BIAS_LR_FACTOR", 2.0]
    plain = _rates(Trainer(small_config(tmp_path, scenes, *keys)))
    trainer = Trainer(small_config(tmp_path, scenes, *keys, "SOLVER.BOTTOM_UP_LR_FACTOR", 0.1))
    rates = _rates(trainer)
    assert rates.keys() == plain.keys() and set(plain.values()) == {0.01, 0.02}
    for name, rate in rates.items():
        assert rate == pytest.approx(plain[name] * (0.1 if ".bottom_up." in name else 1.0))
    assert any(".bottom_up." in name for name in rates)
    trainer.train()  # the schedule too takes a factor for each group
    assert _rates(trainer) == pytest.approx(rates)


def test_layers_of_known_models():
    """Written out by hand: a layer's number is that of its block, and 0 before the first block."""
    vit = ["pos_embed", "patch_embed.proj.weight", "blocks.0.a", "blocks.0.b", "blocks.1.a", "norm.w", "rescale.0.w"]
    assert list(lr_factors(vit, 0.5).values()) == [0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0]
    resnet = ["stem.conv1.weight", "res2.0.conv1.weight", "res2.1.conv1.norm.weight", "res3.0.conv1.weight"]
    assert list(lr_factors(resnet, 0.1).values()) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    swin = ["embed.w", "layers_0.blocks.0.w", "layers_1.downsample.w", "layers_1.blocks.0.w", "layers_1.blocks.1.w"]
    assert list(lr_factors(swin, 0.5).values()) == [0.0625, 0.125, 0.125, 0.25, 0.5]
    lite = ["body.conv_stem.w", "body.blocks.0.0.conv_dw.w", "body.blocks.1.0.conv_pw.w", "body.blocks.1.1.conv_pw.w"]
    assert list(lr_factors(lite, 0.5).values()) == [0.0625, 0.125, 0.25, 0.5]
    assert list(lr_factors(["s1.b1.conv.w", "s1.b2.conv.w"], 0.5).values()) == [0.25, 0.5]
    assert set(lr_factors(["conv.w"], 1.0).values()) == {1.0}
    with pytest.raises(UserError, match="show no blocks, as conv.w: set it to 1"):
        lr_factors(["conv.w"], 0.5)


def test_layers_of_every_kind_of_model_rise_from_first_to_last():
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "efficientnet_lite0", "convnext_atto", "regnetx_002", "vit_tiny_patch16_224"):
        names = [key for key, _ in timm.create_model(name).named_parameters()]
        factors = list(lr_factors(names, 0.9).values())
        assert factors == sorted(factors) and len(set(factors)) > 8, name


def test_decay_is_in_the_groups(tmp_path, scenes):
    rates = _rates(Trainer(small_config(tmp_path, scenes, *OPTS, "SOLVER.BOTTOM_UP_LAYER_DECAY", 0.5)))
    blocks = 8  # of a ResNet-18
    assert rates["backbone.bottom_up.stem.conv1.weight"] == pytest.approx(0.01 * 0.5 ** (blocks + 1))
    assert rates["backbone.bottom_up.res2.0.conv1.weight"] == pytest.approx(0.01 * 0.5**blocks)
    assert rates["backbone.bottom_up.res5.1.conv2.weight"] == pytest.approx(0.01 * 0.5)
    assert rates["backbone.fpn_output2.weight"] == 0.01


class _Watch(HookBase):
    def __init__(self):
        self.weights, self.training = [], []

    def after_step(self):
        self.weights.append({name: value.clone() for name, value in self.trainer.model.state_dict().items()})
        self.training.append(self.trainer.model.backbone.bottom_up.training)


def _run(folder, scenes, *opts, upto=4, resume=False):
    torch.manual_seed(0)
    trainer = Trainer(small_config(folder, scenes, *OPTS, *opts))
    watch = _Watch()
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=resume)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.max_iter = upto
    trainer.train()
    return [before, *watch.weights], watch.training


FROZEN = ["SOLVER.BOTTOM_UP_FROZEN_ITERS", 3, "MODEL.RESNETS.NORM", "BN", "SOLVER.WEIGHT_DECAY", 0.1]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_bottom_up_pathway_stays_for_as_long_and_resuming_changes_nothing(tmp_path, scenes, optimizer):
    keys = [*FROZEN, "SOLVER.OPTIMIZER", optimizer]
    weights, training = _run(tmp_path / "whole", scenes, *keys)
    assert training == [False, False, False, True]
    for step in range(4):
        moved = {n for n, value in weights[step + 1].items() if not torch.equal(value, weights[step][n])}
        below = {n for n in moved if ".bottom_up." in n}
        assert moved - below
        if step < 3:
            assert not below, f"moved in iteration {step}: {sorted(below)[:3]}"
        else:
            trained = {n for n in weights[0] if ".bottom_up." in n}
            assert len(below) > 0.9 * len(trained)  # statistics of norms as well
    for stop in (2, 3):
        _run(tmp_path / str(stop), scenes, *keys, "SOLVER.CHECKPOINT_PERIOD", stop, upto=stop)
        resumed, _ = _run(tmp_path / str(stop), scenes, *keys, "SOLVER.CHECKPOINT_PERIOD", stop, resume=True)
        for name, value in weights[-1].items():
            assert torch.equal(resumed[-1][name], value), (stop, name)


def test_what_freeze_at_froze_stays_frozen(tmp_path, scenes):
    weights, _ = _run(tmp_path, scenes, *FROZEN[2:], "SOLVER.BOTTOM_UP_FROZEN_ITERS", 1, "MODEL.BACKBONE.FREEZE_AT", 2)
    moved = {name for name, value in weights[-1].items() if not torch.equal(value, weights[0][name])}
    assert any(".res3." in name for name in moved)
    assert not any(".stem." in name or ".res2." in name for name in moved)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("BOTTOM_UP_LR_FACTOR", 0.0, "expected more than 0. To train nothing .* MODEL.BACKBONE.FREEZE_AT"),
        ("BOTTOM_UP_LAYER_DECAY", 0.0, "expected more than 0 and at most 1"),
        ("BOTTOM_UP_LAYER_DECAY", 1.1, "expected more than 0 and at most 1"),
        ("BOTTOM_UP_FROZEN_ITERS", -1, "expected a number of iterations, or 0"),
    ],
)
def test_bad_values(tmp_path, scenes, key, value, message):
    with pytest.raises(UserError, match=f"SOLVER.{key} is {value}; {message}"):
        Trainer(small_config(tmp_path, scenes, *OPTS, f"SOLVER.{key}", value))


def test_a_model_without_a_backbone_is_told():
    from fpn_d2.engine.bottom_up_rates import bottom_up_of

    with pytest.raises(UserError, match="for models with a backbone, which Linear has not"):
        bottom_up_of(nn.Linear(1, 1))
