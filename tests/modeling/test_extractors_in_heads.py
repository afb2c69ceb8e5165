"""Every rule and extractor that is registered in every head: trained, saved, refused where it does not fit."""

import pytest
import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances

from fpn_d2.errors import UserError
from tests.batches import random_batch, seed_everything

from .test_extractors import EXTRACTORS, NAMES, WITH_PARAMETERS
from .test_poolers import box_lists, maps
from .test_roi_heads import SHAPES, config


def build_heads(name, cascade, *options):
    cfg = config("MODEL.ROI_LEVEL_ASSIGN.NAME", name, *options, cascade=cascade)
    seed_everything()
    return cfg, ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, SHAPES)


def features(images=2):
    x = maps((2, 3, 4, 5, 6), images=images, channels=16, size=(96, 128))
    return {f"p{k}": m for k, m in zip((2, 3, 4, 5, 6), x, strict=True)}


def branches(heads):
    return {"box": heads.box_pooler, "mask": heads.mask_pooler, "keypoint": heads.keypoint_pooler}


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_head_trains_a_step_and_infers(name, cascade):
    cfg, heads = build_heads(name, cascade)
    assert not [module for module in heads.modules() if type(module) is ROIPooler]
    batch = random_batch(cfg)
    targets = [item["instances"] for item in batch]
    for target in targets:  # objects of all sizes, so that every level has RoIs
        target.gt_boxes.tensor[0] = torch.tensor([0.0, 0.0, 80.0, 79.0])
    x = {key: value.requires_grad_() for key, value in features().items()}
    _, losses = heads(None, x, [item["proposals"] for item in batch], targets)
    assert len(losses) == (8 if cascade else 4)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for key, parameter in heads.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    before = {key: value.clone() for key, value in heads.state_dict().items()}
    torch.optim.SGD(heads.parameters(), lr=0.1).step()
    trained = {key.split(".")[0] for key, value in heads.state_dict().items() if not torch.equal(value, before[key])}
    wanted = {f"{branch}_pooler" for branch in branches(heads)} if name in WITH_PARAMETERS else set()
    assert {key for key in trained if key.endswith("_pooler")} == wanted
    assert {"box_head", "mask_head", "keypoint_head", "box_predictor"} <= trained
    if name in EXTRACTORS:
        assert all(x[f"p{k}"].grad.abs().sum() > 0 for k in ((2, 3) if name == "soft" else (2, 3, 4, 5)))

    heads.eval()
    with torch.no_grad():
        found, _ = heads(None, features(), [item["proposals"] for item in batch])
    assert {"pred_boxes", "pred_masks", "pred_keypoints"} <= set(found[0].get_fields())


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name, cascade):
    few = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.NUM_CLASSES", 3, "TEST.DETECTIONS_PER_IMAGE", 4]
    _, heads = build_heads(name, cascade, *few)
    for parameter in heads.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    _, other = build_heads(name, cascade, *few)
    other.load_state_dict(heads.state_dict(), strict=True)
    proposals = Instances((96, 128), proposal_boxes=box_lists((6,), (96, 128))[0], objectness_logits=torch.zeros(6))
    results = []
    for one in (heads.eval(), other.eval()):
        with torch.no_grad():
            results.append(one(None, features(1), [proposals])[0][0])
    assert len(results[0]) > 0
    for field in ("scores", "pred_masks", "pred_keypoints"):
        assert torch.equal(results[0].get(field), results[1].get(field)), field
    stock = set(build_heads("canonical", cascade, *few)[1].state_dict())
    added = set(heads.state_dict()) - stock
    assert stock <= set(heads.state_dict())
    assert {key.split(".extractor.")[0] for key in added} == (
        {"box_pooler", "mask_pooler", "keypoint_pooler"} if name in WITH_PARAMETERS else set()
    )


def test_heads_start_from_the_weights_that_they_have_without_an_extractor():
    _, plain = build_heads("canonical", False)
    _, adaptive = build_heads("all_max", False)
    for key, value in plain.state_dict().items():
        assert torch.equal(adaptive.state_dict()[key], value), key


@pytest.mark.parametrize("cascade", [False, True])
def test_concatenated_levels_widen_the_heads_alone(cascade):
    _, heads = build_heads(
        "all_concat",
        cascade,
        "MODEL.ROI_HEADS.IN_FEATURES",
        ["p2", "p4", "p5"],
        "MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE",
        [5, 9],
    )
    first = heads.box_head[0] if cascade else heads.box_head
    assert first.fc1.in_features == 3 * 16 * 5 * 9
    assert heads.mask_head.mask_fcn1.in_channels == heads.keypoint_head.conv_fcn1.in_channels == 3 * 16
    assert heads.box_pooler.levels == (2, 4, 5)


def test_a_head_that_pools_by_itself_cannot_have_concatenated_levels():
    with pytest.raises(UserError, match="64 channels, but MODEL.ROI_MASK_HEAD.POOLER_TYPE is empty.* maps of 16"):
        build_heads("all_concat", False, "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "")
