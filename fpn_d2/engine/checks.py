"""Checks before any work starts: names of components and data sets, files of the data, the weight file."""

import inspect
import os
from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data import build as data_build
from detectron2.layers import get_norm
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
)
from detectron2.solver import build as solver_build

from fpn_d2.data.findings import ON_BAD_DATA
from fpn_d2.errors import UserError, did_you_mean, not_found
from fpn_d2.fast.apply import NUMERICS
from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY
from fpn_d2.modeling.bottom_up.names import known_bottom_ups
from fpn_d2.modeling.bottom_up.packaged_weights import is_packaged

from .optimizer import OPTIMIZERS
from .registries import LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY

# Registry names that each of Detectron2's own meta-architectures reads; others may read anything.
_READ_BY = {
    "GeneralizedRCNN": ("PROPOSALS", "ROI"),
    "ProposalNetwork": ("PROPOSALS",),
    "PanopticFPN": ("PROPOSALS", "ROI", "SEM_SEG"),
    "SemanticSegmentor": ("SEM_SEG",),
    "RetinaNet": ("ANCHORS",),
    "FPNRetinaNet": ("ANCHORS",),
    "TorchvisionRetinaNet": ("ANCHORS",),
}
_OPTIONS = {
    "MODEL.NUMERICS": NUMERICS,
    "DATASETS.ON_BAD_DATA": ON_BAD_DATA,
    "MODEL.PARTIAL_WEIGHTS": ("auto", "allow", "refuse"),
    "SOLVER.OPTIMIZER": OPTIMIZERS,
    "SOLVER.AMP.DTYPE": ("auto", "float16", "bfloat16"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
}
# Names of Detectron2's that are told to who mistypes one; whether there is another one it is asked itself.
_SCHEDULERS = (
    "WarmupMultiStepLR",
    "WarmupCosineLR",
    # Only its main branch has these, and the samplers below.
    *(["WarmupStepWithFixedGammaLR"] if hasattr(solver_build, "StepWithFixedGammaParamScheduler") else []),
)
_SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    *(
        ["WeightedTrainingSampler", "WeightedCategoryTrainingSampler"]
        if hasattr(data_build, "_build_weighted_sampler")
        else []
    ),
)
_NORMS = ("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "GN", "LN")
_POOLERS = ("ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_RESNET_FPNS = ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
# RoI heads whose box, mask and keypoint branches have poolers of their own.
_POOLING_HEADS = ("StandardROIHeads", "CascadeROIHeads", "FPNROIHeads", "FPNCascadeROIHeads")


def check_names(cfg: CfgNode) -> None:
    """Check every name in the configuration that stands for a component or an option.

    Raises:
        UserError: Names what exists nearest to it.
    """
    for key, choices in _OPTIONS.items():
        _check(key, _value(cfg, key), choices, list_all=True)
    _check_components(cfg)
    _check_values(cfg)
    scheduler, sampler = cfg.SOLVER.LR_SCHEDULER_NAME, cfg.DATALOADER.SAMPLER_TRAIN
    if not _detectron2_has(lambda: _build_scheduler(cfg), scheduler, _SCHEDULERS):
        _check("SOLVER.LR_SCHEDULER_NAME", scheduler, {*_SCHEDULERS, *_names(LR_SCHEDULER_REGISTRY)}, list_all=True)
    if not _detectron2_has(lambda: _build_sampler(cfg), sampler, _SAMPLERS):
        _check("DATALOADER.SAMPLER_TRAIN", sampler, {*_SAMPLERS, *_names(TRAIN_SAMPLER_REGISTRY)}, list_all=True)


def check_data_names(cfg: CfgNode, *, train: bool = True) -> None:
    """Check the names of data sets; those of DATASETS.COCO_FORMAT and VOC_FORMAT are registered.

    Args:
        cfg: The configuration.
        train: Whether DATASETS.TRAIN is used as well as DATASETS.TEST.

    Raises:
        UserError: Names what exists nearest to it.
    """
    known = DatasetCatalog.list()
    for key in ("DATASETS.TRAIN", "DATASETS.TEST") if train else ("DATASETS.TEST",):
        for name in _value(cfg, key):
            if name not in known:
                raise UserError(
                    f"{key} names {name!r}, which is no registered data set{did_you_mean(name, known)}. Sets of your "
                    "own are named in DATASETS.COCO_FORMAT or DATASETS.VOC_FORMAT"
                )


def _check_components(cfg: CfgNode) -> None:
    model = cfg.MODEL
    _check("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, _names(META_ARCH_REGISTRY))
    _check("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, _names(BACKBONE_REGISTRY))
    if model.BACKBONE.NAME == "build_fpn_backbone":
        _check("MODEL.FPN.BOTTOM_UP", model.FPN.BOTTOM_UP, {*known_bottom_ups(), *_names(BACKBONE_REGISTRY)})
        _check("MODEL.FPN.NECK", model.FPN.NECK, _names(NECK_REGISTRY), list_all=True)
    read = _READ_BY.get(model.META_ARCHITECTURE, ())
    if "PROPOSALS" in read:
        _check(
            "MODEL.PROPOSAL_GENERATOR.NAME",
            model.PROPOSAL_GENERATOR.NAME,
            [*_names(PROPOSAL_GENERATOR_REGISTRY), "PrecomputedProposals"],
            list_all=True,
        )
        if model.RPN.LEVEL_LOSS_WEIGHTS and model.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN", "PrecomputedProposals"):
            raise UserError(
                f"MODEL.RPN.LEVEL_LOSS_WEIGHTS is {list(model.RPN.LEVEL_LOSS_WEIGHTS)}, which "
                f"{model.PROPOSAL_GENERATOR.NAME} does not read: set MODEL.PROPOSAL_GENERATOR.NAME to FPNRPN"
            )
        if model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
            _check("MODEL.RPN.HEAD_NAME", model.RPN.HEAD_NAME, _names(RPN_HEAD_REGISTRY), list_all=True)
            read = (*read, "ANCHORS")
    if "ANCHORS" in read:
        _check("MODEL.ANCHOR_GENERATOR.NAME", model.ANCHOR_GENERATOR.NAME, _names(ANCHOR_GENERATOR_REGISTRY), True)
    if "ROI" in read:
        _check("MODEL.ROI_HEADS.NAME", model.ROI_HEADS.NAME, _names(ROI_HEADS_REGISTRY), list_all=True)
        if model.ROI_HEADS.NAME.startswith("FPN"):
            rule = model.ROI_LEVEL_ASSIGN.NAME
            _check("MODEL.ROI_LEVEL_ASSIGN.NAME", rule, _names(ROI_RULE_REGISTRY), list_all=True)
        if model.ROI_BOX_HEAD.NAME:  # empty for the heads that have none, as Res5ROIHeads
            _check("MODEL.ROI_BOX_HEAD.NAME", model.ROI_BOX_HEAD.NAME, _names(ROI_BOX_HEAD_REGISTRY), list_all=True)
        if model.MASK_ON:
            _check("MODEL.ROI_MASK_HEAD.NAME", model.ROI_MASK_HEAD.NAME, _names(ROI_MASK_HEAD_REGISTRY), True)
        if model.KEYPOINT_ON:
            _check(
                "MODEL.ROI_KEYPOINT_HEAD.NAME", model.ROI_KEYPOINT_HEAD.NAME, _names(ROI_KEYPOINT_HEAD_REGISTRY), True
            )
    if "SEM_SEG" in read:
        _check("MODEL.SEM_SEG_HEAD.NAME", model.SEM_SEG_HEAD.NAME, _names(SEM_SEG_HEADS_REGISTRY), list_all=True)


def _check_values(cfg: CfgNode) -> None:
    """Check options that Detectron2 reads only for some models, where the model is one of those."""
    model = cfg.MODEL
    ours = model.BACKBONE.NAME == "build_fpn_backbone"
    read = _READ_BY.get(model.META_ARCHITECTURE, ())
    values: dict[str, Iterable[str]] = {}
    if (model.FPN.BOTTOM_UP if ours else model.BACKBONE.NAME) in ("build_resnet_backbone", *_RESNET_FPNS):
        values["MODEL.RESNETS.DEPTH"] = ("18", "34", "50", "101", "152")
        values["MODEL.RESNETS.NORM"] = _norms()
    if model.BACKBONE.NAME in _RESNET_FPNS or (ours and model.FPN.NECK == "FPN"):
        values["MODEL.FPN.NORM"] = _norms()
    if "PROPOSALS" in read and model.PROPOSAL_GENERATOR.NAME in ("RPN", "RRPN", "FPNRPN"):
        values["MODEL.RPN.BBOX_REG_LOSS_TYPE"] = _BOX_LOSSES
    if model.META_ARCHITECTURE.endswith("RetinaNet"):
        values["MODEL.RETINANET.BBOX_REG_LOSS_TYPE"] = _BOX_LOSSES
    if "ROI" in read and model.ROI_HEADS.NAME in ("Res5ROIHeads", *_POOLING_HEADS):
        values["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"] = _BOX_LOSSES
        values["MODEL.ROI_BOX_HEAD.POOLER_TYPE"] = _POOLERS
    if "ROI" in read and model.ROI_HEADS.NAME in _POOLING_HEADS:
        if model.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead" and model.ROI_BOX_HEAD.NUM_CONV > 0:
            values["MODEL.ROI_BOX_HEAD.NORM"] = _norms()
        for branch, there in (("MASK", model.MASK_ON), ("KEYPOINT", model.KEYPOINT_ON)):
            if there:
                values[f"MODEL.ROI_{branch}_HEAD.POOLER_TYPE"] = ("", *_POOLERS)  # empty: the head pools by itself
    if model.MASK_ON:
        values["INPUT.MASK_FORMAT"] = ("polygon", "bitmask")
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        values["SOLVER.CLIP_GRADIENTS.CLIP_TYPE"] = [kind.value for kind in solver_build.GradientClipType]
    for key, choices in values.items():
        _check(key, _value(cfg, key), choices, list_all=True)


def _detectron2_has(build: Callable[[], object], name: str, known: Iterable[str]) -> bool:
    """Whether Detectron2 does not call ``name`` unknown when it builds what is called so."""
    if name in known:
        return True
    try:
        build()
    except ValueError as error:
        return not (str(error).startswith("Unknown") and name in str(error))
    except Exception:  # of what it builds
        return True
    return True


def _build_scheduler(cfg: CfgNode) -> object:
    return solver_build.build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR))


def _build_sampler(cfg: CfgNode) -> object:
    return build_detection_train_loader.from_config(cfg, mapper=id, dataset=[{}])


def _norms() -> list[str]:
    """The names that the installed Detectron2 knows; "" stands for no norm."""

    def known(name: str) -> bool:
        try:
            get_norm(name, 32)
        except KeyError:
            return False
        return True

    return ["", *filter(known, _NORMS)]


def _names(registry: Iterable) -> list[str]:
    return [name for name, _ in registry]


def _value(cfg: CfgNode, key: str) -> object:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _check(key: str, name: object, choices: Iterable[str], list_all: bool = False) -> None:
    choices = sorted(choices)
    if str(name) in choices:
        return
    there = f"; there are {', '.join(choice or repr(choice) for choice in choices)}" if list_all else ""
    raise UserError(f"{key} is {name!r}, which does not exist{did_you_mean(str(name), choices)}{there}")


def check_test_augmentation(cfg: CfgNode) -> None:
    """Check that the model can be evaluated with test-time augmentation, if TEST.AUG.ENABLED asks for it.

    Raises:
        UserError: It is a model that Detectron2's `GeneralizedRCNNWithTTA` refuses, after the training.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    built = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if not (inspect.isclass(built) and issubclass(built, GeneralizedRCNN) and _takes_detections(built)):
        raise UserError(
            "TEST.AUG.ENABLED is True, but test-time augmentation is for the meta-architecture GeneralizedRCNN, not "
            f"for {cfg.MODEL.META_ARCHITECTURE}: set it to False"
        )
    for key in ("MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"):
        if _value(cfg, key):
            raise UserError(f"TEST.AUG.ENABLED does not go with {key}: set one of them to False")


def _takes_detections(built: type) -> bool:
    """Whether a model's inference can be called as test-time augmentation does; PanopticFPN's cannot."""
    try:
        inspect.signature(built.inference).bind("self", "inputs", "detections", do_postprocess=False)
    except TypeError:
        return False
    return True


def check_data_files(cfg: CfgNode, *, train: bool) -> None:
    """Check that the annotation files and image folders of the data sets are there.

    Args:
        cfg: The configuration; its data sets are registered.
        train: Whether DATASETS.TRAIN is used as well as DATASETS.TEST.

    Raises:
        UserError: Says what was looked for and where, and how Detectron2 finds the folder of its builtin sets.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name the data sets to train on")
    if not train and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name the data sets to evaluate on")
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        for what, present in (("json_file", os.path.isfile), ("image_root", os.path.isdir), ("dirname", os.path.isdir)):
            path = metadata.get(what, None)
            if not path or "://" in path or present(path):
                continue
            hint = ""
            if not os.path.isabs(path):
                hint = ". The folder of Detectron2's builtin sets is named by the environment variable " + (
                    f"DETECTRON2_DATASETS, now {os.environ.get('DETECTRON2_DATASETS', 'unset: ./datasets')}"
                )
            raise UserError(f"data set {name}: its {what} does not exist: {not_found(path)}{hint}")


def check_weight_file(path: str) -> None:
    """Check that ``path`` (MODEL.WEIGHTS) is a file, unless it is empty or an address as ``detectron2://...``.

    Raises:
        UserError: Says what was looked for and where.
    """
    file = path.split("?", 1)[0]  # Detectron2's main branch reads options after the question mark
    if is_packaged(file):
        raise UserError(
            f"MODEL.WEIGHTS is {file}, but weights of a package are for the bottom-up pathway alone: name them in "
            "MODEL.TIMM.WEIGHTS"
        )
    if file and "://" not in file and not os.path.isfile(os.path.expanduser(file)):
        raise UserError(f"MODEL.WEIGHTS: no file {file}: {not_found(file)}")
