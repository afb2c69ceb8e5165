"""Gradient checkpointing: the same gradients from fewer maps that are kept."""

import pytest
import torch
from torch import nn

from fpn_d2.errors import UserError
from fpn_d2.modeling.bottom_up.checkpointing import checkpoint_stages
from tests.batches import seed_everything
from tests.modeling.test_backbone import build_backbone, config

PATHWAYS = {
    "resnet": {},
    "frozen": {"MODEL__BACKBONE__FREEZE_AT": 2},
    "bottleneck": {"MODEL__RESNETS__DEPTH": 50},
    "regnet": {
        "MODEL__FPN__BOTTOM_UP": "build_regnet_backbone",
        "MODEL__REGNET__DEPTH": 13,
        "MODEL__REGNET__W_A": 36.44,
        "MODEL__REGNET__W_0": 24,
        "MODEL__REGNET__W_M": 2.49,
        "MODEL__REGNET__GROUP_WIDTH": 8,
        "MODEL__RESNETS__NORM": "FrozenBN",
    },
    "hybrid": {"MODEL__FPN__BOTTOM_UP": "build_hybrid_resnet_vit_backbone", "MODEL__HYBRID__CHANNELS": 32},
}


def build(pathway, checkpointing):
    options = {"MODEL__BACKBONE__FREEZE_AT": 0, "MODEL__RESNETS__NORM": "GN"} | PATHWAYS[pathway]
    seed_everything()
    return build_backbone(config(**options, MODEL__BACKBONE__GRADIENT_CHECKPOINTING=checkpointing)).train()


def train(backbone, images):
    """Gradients by name, and the bytes that autograd kept for the backward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(p.square().mean() for p in backbone(images).values())
    loss.backward()
    parameters = {p.data_ptr() for p in backbone.parameters()}
    return {name: p.grad for name, p in backbone.named_parameters()}, sum(
        size for pointer, size in kept.items() if pointer not in parameters
    )


@pytest.mark.parametrize("pathway", PATHWAYS)
def test_same_gradients_from_less_memory(pathway):
    plain, sparing = build(pathway, False), build(pathway, True)
    assert list(plain.state_dict()) == list(sparing.state_dict())
    images = torch.randn(2, 3, 128, 128)
    expected, all_bytes = train(plain, images)
    actual, few_bytes = train(sparing, images)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, msg=name)
    assert few_bytes < 0.75 * all_bytes
    with torch.no_grad():
        for name, value in plain.eval()(images).items():
            torch.testing.assert_close(sparing.eval()(images)[name], value)


def test_a_pathway_without_stages():
    with pytest.raises(UserError, match="GRADIENT_CHECKPOINTING is True, but Sequential has no stages .*to False"):
        checkpoint_stages(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential()))
