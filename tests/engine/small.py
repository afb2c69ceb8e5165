"""A small detector on small scenes: configurations for the tests of the engine."""

from pathlib import Path

import yaml

from fpn_d2.engine import load_prepared
from fpn_d2.engine.device import on_this_machine

TRAIN, TEST = "engine_scenes_train", "engine_scenes_val"
ROOT = Path(__file__).resolve().parents[2]

MODEL = {
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
        "ROI_HEADS": {"NAME": "FPNROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"], "BATCH_SIZE_PER_IMAGE": 16},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64, "MAX_SIZE_TRAIN": 64, "MAX_SIZE_TEST": 64},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 4, "BASE_LR": 0.01, "WARMUP_ITERS": 0, "STEPS": []},
    "TEST": {"PICTURE_IMAGES": 3},
    "SEED": 1,
    "VERSION": 2,
}


def data_keys(scenes: Path) -> dict:
    """The DATASETS section for the scenes in a folder."""
    entries = [
        [name, f"{scenes}/annotations/instances_{split}.json", f"{scenes}/images/{split}"]
        for name, split in ((TRAIN, "train"), (TEST, "val"))
    ]
    return {"DATASETS": {"COCO_FORMAT": entries, "TRAIN": [TRAIN], "TEST": [TEST]}}


def write_config(path: Path, scenes: Path) -> Path:
    """Write the small detector's YAML file, whose outputs go beside it."""
    path.write_text(yaml.safe_dump({**MODEL, **data_keys(scenes), "OUTPUT_DIR": str(path.parent / "out")}))
    return path


def small_config(folder: Path, scenes: Path, *opts: object):
    """The configuration of the small detector, with its YAML file and its outputs in ``folder``."""
    folder.mkdir(exist_ok=True)
    cfg = on_this_machine(load_prepared(str(write_config(folder / "config.yaml", scenes)), [str(o) for o in opts]))
    cfg.freeze()
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    return cfg
