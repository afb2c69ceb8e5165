"""The graph that is exported against the model that it is made from, in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torchvision.ops import batched_nms

from fpn_d2 import add_fpn_d2_config
from fpn_d2.analysis.exported import all_within, eager_stages, random_batches, stages_of, text
from fpn_d2.analysis.parity import compare
from fpn_d2.errors import UserError
from fpn_d2.inference.export.boxes import NOTHING, Anchors, highest
from fpn_d2.inference.export.graph import graph_of
from fpn_d2.inference.export.nms import nms_mask
from fpn_d2.inference.export.pooling import LevelPooling
from fpn_d2.inference.export.runner_shapes import keypoints_of, pasted
from fpn_d2.modeling.level_assign import CanonicalLevelAssigner, FinestLevelAssigner
from fpn_d2.modeling.poolers import PyramidROIPooler

STOCK = {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.ROI_HEADS.NAME": "StandardROIHeads"}
OURS = {"MODEL.BACKBONE.NAME": "build_fpn_backbone", "MODEL.ROI_HEADS.NAME": "FPNROIHeads"}
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "FPNCascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0]] * 3,
}
RETINA = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 50,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (0.3, 0.3, 0.3, 0.3),
}
KINDS = {
    "faster": OURS | {"MODEL.PROPOSAL_GENERATOR.NAME": "FPNRPN"},
    "stock": STOCK,
    "stock mask": STOCK | {"MODEL.MASK_ON": True},
    "one mask for all classes": OURS | {"MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True},
    "keypoint": OURS | {"MODEL.KEYPOINT_ON": True},
    "stock mask and keypoint": STOCK | {"MODEL.MASK_ON": True, "MODEL.KEYPOINT_ON": True},
    "cascade mask": OURS | CASCADE | {"MODEL.MASK_ON": True},
    "stock cascade": STOCK | CASCADE | {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"},
    "fast": OURS | {"MODEL.NUMERICS": "fast", "MODEL.PROPOSAL_GENERATOR.NAME": "FPNRPN", "MODEL.MASK_ON": True},
    "PAFPN": OURS | {"MODEL.FPN.NECK": "PAFPN"},
    "BiFPN": OURS | {"MODEL.FPN.NECK": "BiFPN", "MODEL.FPN.NORM": "BN"},
    "finest": OURS | {"MODEL.ROI_LEVEL_ASSIGN.NAME": "finest"},
    "torchvision's": OURS
    | {"MODEL.ANCHOR_GENERATOR.NAME": "TorchvisionAnchorGenerator", "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5}
    | {"MODEL.ANCHOR_GENERATOR.SIZES": [[16], [16], [24], [32], [24]]},
    "retinanet": RETINA,
    "torchvision's retinanet": RETINA | {"MODEL.META_ARCHITECTURE": "TorchvisionRetinaNet"},
}

# For what is written to a file: as few operations as a Mask R-CNN with a pyramid can have.
SMALLEST = OURS | {
    "MODEL.MASK_ON": True,
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4"],
    "MODEL.FPN.TOP_BLOCK": "none",
    "MODEL.RPN.IN_FEATURES": ["p3", "p4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32]],
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 128,
}
CLASSES = ("ant", "bee", "fly")


def config(options: dict):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    retina = "Retina" in options.get("MODEL.META_ARCHITECTURE", "")
    maps = ["res3", "res4", "res5"] if retina else ["res2", "res3", "res4", "res5"]
    small = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.NUMERICS": "exact",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.OUT_FEATURES": maps,
        "MODEL.FPN.IN_FEATURES": maps,
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.2,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 4,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16],
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE": 64,
        "TEST.DETECTIONS_PER_IMAGE": 20,
    }
    cfg.merge_from_list([item for pair in (small | options).items() for item in pair])
    return cfg


def build(options: dict):
    torch.manual_seed(0)
    return spread(build_model(config(options)).eval())


def spread(model, scale=1.0):
    """Weights with which scores and boxes differ from place to place, as those of a trained model."""
    for module in model.modules():
        deviations = dict.fromkeys(("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred"), 0.03)
        for name, deviation in (deviations | {"predictor": 0.1, "score_lowres": 0.003}).items():
            layer = getattr(module, name, None)
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.ConvTranspose2d)):
                torch.nn.init.normal_(layer.weight, std=scale * deviation)
    return model


def differences(model, run, batches) -> list:
    found = []
    for images in batches:
        eager, theirs = eager_stages(model, images), stages_of(run, images)
        found.append(compare({stage: eager[stage] for stage in theirs}, theirs))
    return found


def heads_of(model) -> set[str]:
    """The stages behind the detections."""
    heads = getattr(model, "roi_heads", None)
    return {stage for stage in ("masks", "keypoints") if getattr(heads, f"{stage[:-1]}_on", False)}


def in_torch(graph):
    graph.with_stages = True

    @torch.no_grad()
    def run(images, image_sizes):
        outputs = graph(torch.from_numpy(images), torch.from_numpy(image_sizes))
        return {name: value.numpy() for name, value in zip(graph.output_names, outputs, strict=True)}

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_graph_gives_what_the_model_gives_stage_by_stage(kind):
    model, batches = build(KINDS[kind]), random_batches(96, 128)
    run = in_torch(graph_of(model))
    found = differences(model, run, batches)
    assert all_within({"torch": found}), text({"torch": found}, batches)
    stages = {difference.stage for difference in found[0]}
    expected = {"input", "pyramid", "detections"} | ({"proposals"} if "Retina" not in type(model).__name__ else set())
    assert expected | heads_of(model) == stages
    counts = [len(stages_of(run, images)["detections"]["image 0"]) for images in batches]
    assert max(counts) > 3


@pytest.mark.parametrize("kind", ["stock mask", "retinanet"])
def test_nothing_found(kind):
    key = "RETINANET" if kind == "retinanet" else "ROI_HEADS"
    model = build(KINDS[kind] | {f"MODEL.{key}.SCORE_THRESH_TEST": 1.0})
    run = in_torch(graph_of(model))
    (images,) = random_batches(96, 128)[1:2]
    assert all_within({"torch": differences(model, run, [images])})
    found = stages_of(run, images)["detections"]
    assert [len(found[f"image {i}"]) for i in range(3)] == [0, 0, 0]


REFUSED = {
    "PanopticFPN": OURS | {"MODEL.META_ARCHITECTURE": "PanopticFPN", "MODEL.MASK_ON": True},
    "ProposalNetwork": OURS | {"MODEL.META_ARCHITECTURE": "ProposalNetwork"},
    "RoIPool": OURS | {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"},
    "CombiningROIPooler": OURS | {"MODEL.ROI_LEVEL_ASSIGN.NAME": "all_max"},
    "Res5ROIHeads": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32]],
    },
}


@pytest.mark.parametrize("part", REFUSED)
def test_what_cannot_be_exported_is_named(part):
    with pytest.raises(UserError, match=f"{part}.* cannot be exported"):
        graph_of(build(REFUSED[part]))


def test_a_class_of_someone_else_is_refused_whatever_its_name():
    model = build(KINDS["stock"])
    model.proposal_generator.__class__ = type("RPN", (type(model.proposal_generator),), {})
    with pytest.raises(UserError, match="the proposal generator RPN cannot be exported"):
        graph_of(model)


@pytest.mark.parametrize("rule", ["detectron2", "canonical", "finest", "gaps"])
def test_levels_by_area_are_those_of_the_rule_at_its_boundaries_too(rule):
    scales = [1 / 4, 1 / 16, 1 / 32] if rule == "gaps" else [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assigner = FinestLevelAssigner if rule == "finest" else CanonicalLevelAssigner
    pooler = PyramidROIPooler(1, scales, 1, "ROIAlignV2", assigner)
    pooling = LevelPooling(ROIPooler(1, scales, 1, "ROIAlignV2") if rule == "detectron2" else pooler)
    sides = torch.tensor([0.0, 1, 56, 111.99, 112, 112.01, 223.99999, 224, 224.00002, 448, 500, 895.9, 896, 5000])
    boxes = torch.cat([torch.zeros(len(sides), 2), sides[:, None].expand(-1, 2)], dim=1)
    # On the map of level i every cell is i: what is pooled of a box is its level.
    maps = [torch.full((1, 1, 8, 8), float(i)) for i in range(len(scales))]
    boxes = torch.cat([boxes, boxes.flip(0)])
    pooled = pooling(maps, boxes, torch.zeros(len(boxes), dtype=torch.int64))
    inside = boxes[:, 2] < 7 * 4 * 2
    levels = pooler.assigner([Boxes(boxes)])
    assert pooling.first_areas == sorted(pooling.first_areas)
    found = sum((boxes[:, 2] ** 2 >= area).to(torch.int64) for area in pooling.first_areas)
    assert torch.equal(levels, found)
    assert torch.equal(pooled[inside].flatten(), levels[inside].float())


@pytest.mark.parametrize("name", ["DefaultAnchorGenerator", "TorchvisionAnchorGenerator"])
def test_anchors_by_number_are_the_generators(name):
    kind = ANCHOR_GENERATOR_REGISTRY.get(name)
    generator = kind(sizes=[[16], [32, 40]], aspect_ratios=[[0.5, 1.0]], strides=[8, 64], offset=0.5)
    maps = [torch.zeros(2, 1, 12, 7), torch.zeros(2, 1, 2, 1)]  # the coarser of 1.5 and 0.9 cells
    anchors = Anchors(generator)
    for level, expected in enumerate(generator(maps)):
        numbers = torch.randperm(len(expected)).expand(2, -1)
        assert torch.equal(anchors(level, numbers, maps), expected.tensor[numbers])


def test_suppression_by_group_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 50, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(2, 50, 2, generator=generator) * 30], dim=2)
    scores = torch.rand(2, 3, 50, generator=generator) - 0.3
    kept = nms_mask(boxes, scores, 0.4)
    for image in range(2):
        groups, members = torch.nonzero(scores[image] > 0, as_tuple=True)
        rows = batched_nms(boxes[image, members], scores[image, groups, members], groups, 0.4)
        expected = torch.zeros(3, 50, dtype=torch.bool)
        expected[groups[rows], members[rows]] = True
        assert torch.equal(kept[image], expected) and 0 < len(rows) < len(groups)
    assert not nms_mask(boxes, -scores.abs(), 0.4).any()


def test_masks_and_keypoints_of_the_runner_are_detectron2s():
    generator = torch.Generator().manual_seed(0)
    maps = F.interpolate(torch.randn(12, 3, 7, 7, generator=generator), size=(28, 28), mode="bicubic")
    corners = torch.rand(12, 2, generator=generator) * torch.tensor([90.0, 60.0]) - 3
    boxes = torch.cat([corners, corners + 0.4 + torch.rand(12, 2, generator=generator) * 50], dim=1)
    boxes[0] = torch.tensor([0.0, 0, 100, 70])
    masks = maps[:, 0].sigmoid()
    ours = torch.from_numpy(pasted(masks.numpy(), boxes.numpy(), 100, 70))
    theirs = paste_masks_in_image(masks, boxes, (70, 100))
    assert theirs.any(dim=(1, 2)).sum() > 8
    assert (ours != theirs).sum() <= 2  # where the probability is 0.5 to the last bits
    found = torch.from_numpy(keypoints_of(maps.numpy(), boxes.numpy()))
    torch.testing.assert_close(found, heatmaps_to_keypoints(maps, boxes)[..., [0, 1, 3]], atol=1e-4, rtol=1e-5)


def test_highest_pads_where_there_are_too_few():
    values, numbers = highest(torch.tensor([[1.0, 3.0, 2.0]]), 5)
    assert values.tolist() == [[3.0, 2.0, 1.0, NOTHING, NOTHING]]
    assert numbers[0, :3].tolist() == [1, 2, 0] and numbers.max() <= 2
