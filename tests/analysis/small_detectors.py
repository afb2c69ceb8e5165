"""Configurations of small detectors for the tests of the comparison: GN, ResNet-18, 16 channels, five classes."""

import copy
from pathlib import Path

import yaml

RCNN = {
    "MODEL": {
        "BACKBONE": {"NAME": "build_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 18,
            "RES2_OUT_CHANNELS": 64,
            "NORM": "GN",
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[16], [32], [64], [128], [256]]},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "PRE_NMS_TOPK_TRAIN": 50,
            "PRE_NMS_TOPK_TEST": 50,
            "POST_NMS_TOPK_TRAIN": 20,
            "POST_NMS_TOPK_TEST": 20,
        },
        "ROI_HEADS": {
            "NAME": "FPNROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "BATCH_SIZE_PER_IMAGE": 16,
            "NUM_CLASSES": 5,
        },
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
        "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 1, "CONV_DIM": 8, "POOLER_RESOLUTION": 4},
        "DEVICE": "cpu",
        "NUMERICS": "exact",
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "TEST": {"DETECTIONS_PER_IMAGE": 10},
    "VERSION": 2,
}
# What turns them into Detectron2's own.
STOCK = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
STOCK_RETINANET = ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "5", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5']", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64], [128]]"),
]


def write(path: Path, **sections: dict) -> str:
    """Write the small detector's YAML file, with more sections."""
    path.write_text(yaml.safe_dump({**copy.deepcopy(RCNN), **sections}))
    return str(path)
