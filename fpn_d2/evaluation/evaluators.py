"""Which evaluator a data set gets, by the ``evaluator_type`` in its metadata."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from fpn_d2.errors import UserError

from .coco import COCOS_LIMIT, FastCOCOEvaluator, ReadableCOCOEvaluator, fast_evaluation_is_there

logger = logging.getLogger(__name__)

_TYPES = {
    "coco": ("coco",),
    "coco_panoptic_seg": ("sem_seg", "coco", "panoptic"),
    "sem_seg": ("sem_seg",),
    "cityscapes_instance": ("cityscapes_instance",),
    "cityscapes_sem_seg": ("cityscapes_sem_seg",),
    "pascal_voc": ("pascal_voc",),
    "lvis": ("lvis",),
}


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """Evaluator of ``dataset_name`` for every type that Detectron2 knows; COCO's where the metadata names none.

    Args:
        cfg: The configuration; OUTPUT_DIR, TEST.KEYPOINT_OKS_SIGMAS and TEST.DETECTIONS_PER_IMAGE are read: of more
            than COCO's 100 detections of an image, all count.
        dataset_name: A registered data set.
        output_folder: Where predictions are kept; by default the folder "inference" in OUTPUT_DIR.

    Raises:
        UserError: For an evaluator type that Detectron2 does not have.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in _TYPES:
        raise UserError(
            f"data set {dataset_name} asks for the evaluator type {kind!r}; there are {', '.join(sorted(_TYPES))}"
        )
    coco_evaluator = FastCOCOEvaluator if fast_evaluation_is_there() else ReadableCOCOEvaluator
    make = {
        "coco": lambda: coco_evaluator(
            dataset_name,
            output_dir=folder,
            kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
            max_dets_per_image=max(COCOS_LIMIT, cfg.TEST.DETECTIONS_PER_IMAGE),
        ),
        "sem_seg": lambda: SemSegEvaluator(dataset_name, distributed=True, output_dir=folder),
        "panoptic": lambda: COCOPanopticEvaluator(dataset_name, folder),
        "cityscapes_instance": lambda: CityscapesInstanceEvaluator(dataset_name),
        "cityscapes_sem_seg": lambda: CityscapesSemSegEvaluator(dataset_name),
        "pascal_voc": lambda: PascalVOCDetectionEvaluator(dataset_name),
        "lvis": lambda: LVISEvaluator(dataset_name, output_dir=folder),
    }
    parts = [make[part]() for part in _TYPES[kind]]
    if "coco" in _TYPES[kind] and cfg.TEST.DETECTIONS_PER_IMAGE > COCOS_LIMIT:
        logger.info(
            "AP of %s counts up to %d detections of an image (TEST.DETECTIONS_PER_IMAGE), not COCO's %d",
            dataset_name, cfg.TEST.DETECTIONS_PER_IMAGE, COCOS_LIMIT,
        )
    return parts[0] if len(parts) == 1 else DatasetEvaluators(parts)
