"""Every configuration key that fpn_d2 adds to Detectron2's own, with its meaning, unit and options."""

from detectron2.config import CfgNode


def add_fpn_d2_config(cfg: CfgNode) -> None:
    """Add the keys of fpn_d2, with their defaults, to ``cfg`` in place.

    Detectron2's own keys keep their names, meanings and defaults: with these defaults every configuration of
    Detectron2 builds what it built before. Adding the keys twice changes nothing.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> add_fpn_d2_config(cfg)
        >>> cfg.MODEL.FPN.NECK
        'FPN'
    """
    new = CfgNode()

    # ---- The pyramid: MODEL.BACKBONE.NAME "build_fpn_backbone" -----------------------------------------------
    new.MODEL = CfgNode()
    new.MODEL.FPN = CfgNode()
    # Bottom-up pathway: a name in Detectron2's BACKBONE_REGISTRY whose maps include MODEL.FPN.IN_FEATURES.
    new.MODEL.FPN.BOTTOM_UP = "build_resnet_backbone"
    # Neck: a name in fpn_d2's NECK_REGISTRY. FPN (Lin et al., CVPR 2017).
    new.MODEL.FPN.NECK = "FPN"
    # Top-down up-sampling by 2: "nearest", "bilinear" or "deconv" (a learned 2x2 transposed convolution that
    # starts out as nearest).
    new.MODEL.FPN.UPSAMPLE = "nearest"
    # Levels above the last map of IN_FEATURES: "maxpool" (one level, every second cell of the last output),
    # "p6p7_c5" (two levels, 3x3 stride-2 convolutions on the last bottom-up map), "p6p7_p5" (the same on the
    # last output), "none", or "auto": p6p7_c5 for the RetinaNet meta-architecture, maxpool for all others.
    new.MODEL.FPN.TOP_BLOCK = "auto"

    # ---- RoI level assignment and pooling: MODEL.ROI_HEADS.NAME "FPNROIHeads" or "FPNCascadeROIHeads" --------
    new.MODEL.ROI_LEVEL_ASSIGN = CfgNode()
    # Rule that names the pyramid level of a RoI. "canonical": k = floor(k0 + log2(sqrt(w * h) / s0)), clamped to
    # the levels in MODEL.ROI_HEADS.IN_FEATURES (Lin et al., CVPR 2017, equation 1).
    new.MODEL.ROI_LEVEL_ASSIGN.NAME = "canonical"
    # s0: side of a RoI, in pixels of the network's input, that belongs on CANONICAL_LEVEL. Greater than 0.
    new.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE = 224
    # k0: level, as log2 of its stride, on which a RoI of side CANONICAL_BOX_SIZE is pooled.
    new.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_LEVEL = 4
    new.MODEL.ROI_BOX_HEAD = CfgNode()
    # (height, width) in cells of what the box head sees of a RoI; empty: POOLER_RESOLUTION on both sides.
    new.MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE = []

    # ---- Weights ----------------------------------------------------------------------------------------------
    # What to do with a weight file that does not match the whole model. "auto": accept it when whole parts are
    # absent from the file (a bottom-up pathway alone) or when only the layers whose size is the number of
    # classes differ, refuse it otherwise; "allow": load what fits; "refuse": every tensor must match.
    # All three print how much was loaded.
    new.MODEL.PARTIAL_WEIGHTS = "auto"

    # ---- Data ---------------------------------------------------------------------------------------------------
    new.DATASETS = CfgNode()
    # COCO-format data sets to register, each [name, json file, image folder] or a dictionary with the keys NAME,
    # JSON and IMAGES. The names can then be used in DATASETS.TRAIN and DATASETS.TEST.
    new.DATASETS.COCO_FORMAT = []
    # Pascal VOC folders to register, each [name, folder with Annotations, ImageSets and JPEGImages, split] or a
    # dictionary with the keys NAME, DIR, SPLIT and, if the classes shall not be read from the annotations,
    # CLASSES.
    new.DATASETS.VOC_FORMAT = []
    new.INPUT = CfgNode()
    # Flip upside down with probability 0.5, in addition to INPUT.RANDOM_FLIP: for images without an up or down.
    new.INPUT.VERTICAL_FLIP = False
    # Change brightness, contrast and saturation, each by a factor drawn from [1 - c, 1 + c]. 0: off. In [0, 1).
    new.INPUT.COLOR_JITTER = 0.0

    # ---- Training and evaluation ----------------------------------------------------------------------------
    new.SOLVER = CfgNode()
    # "SGD", as Detectron2 has it, or "AdamW", which wants a BASE_LR of about 1e-4 to 1e-3 and learns faster from
    # scratch.
    new.SOLVER.OPTIMIZER = "SGD"
    new.SOLVER.AMP = CfgNode()
    # Precision under SOLVER.AMP.ENABLED: "float16" (GPUs only, with loss scaling), "bfloat16", or "auto":
    # float16 on a GPU, as Detectron2 has it, and bfloat16 on a CPU.
    new.SOLVER.AMP.DTYPE = "auto"
    new.TEST = CfgNode()
    # Iterations between two computations of the validation loss over DATASETS.TEST; 0: never.
    new.TEST.VAL_LOSS_PERIOD = 0
    # Metric whose best value so far decides which checkpoint is kept as model_best.pth, as
    # "bbox/AP", or "NAME/bbox/AP" with several test sets; empty: keep none. Read at each TEST.EVAL_PERIOD and at the
    # end.
    new.TEST.BEST_METRIC = "bbox/AP"
    # Number of images in the picture grid of detections beside ground truth; 0: no picture.
    new.TEST.PICTURE_IMAGES = 8
    # Detections with a score of at least this are drawn.
    new.TEST.PICTURE_SCORE = 0.5

    _add_missing(cfg, new)


def _add_missing(cfg: CfgNode, new: CfgNode) -> None:
    for key, value in new.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CfgNode):
            _add_missing(cfg[key], value)
