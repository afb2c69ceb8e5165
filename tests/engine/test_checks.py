"""Names that do not exist and files that are not there."""

import itertools

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import get_norm

from fpn_d2.engine import LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY, Trainer, UserError, checks, load_config
from fpn_d2.engine.checks import check_data_files, check_test_augmentation, check_weight_file

from .small import TEST, TRAIN, small_config

WRONG = [
    ("MODEL.META_ARCHITECTURE", "GeneralizedRCN", "GeneralizedRCNN"),
    ("MODEL.BACKBONE.NAME", "build_fpn_backbon", "build_fpn_backbone"),
    ("MODEL.FPN.BOTTOM_UP", "build_resnt_backbone", "build_resnet_backbone"),
    ("MODEL.FPN.NECK", "FPM", "FPN"),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RPM", "RPN"),
    ("MODEL.RPN.HEAD_NAME", "StandardRPNHed", "StandardRPNHead"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGen", "DefaultAnchorGenerator"),
    ("MODEL.ROI_HEADS.NAME", "FPNRoIHead", "FPNROIHeads"),
    ("MODEL.ROI_LEVEL_ASSIGN.NAME", "canonicle", "canonical"),
    ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHed", "FastRCNNConvFCHead"),
    ("MODEL.PARTIAL_WEIGHTS", "alow", "allow"),
    ("INPUT.RANDOM_FLIP", "horizontl", "horizontal"),
    ("DATASETS.TEST", f"('{TEST[:-1]}',)", TEST),
]


@pytest.mark.parametrize(("key", "value", "meant"), WRONG)
def test_a_name_that_does_not_exist_names_the_nearest(tmp_path, scenes, key, value, meant):
    with pytest.raises(UserError) as error:
        small_config(tmp_path, scenes, key, value)
    assert key in str(error.value)
    assert f"did you mean {meant}" in str(error.value)


WRONG_VALUES = [
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosLR", "WarmupCosineLR", ()),
    ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetSampler", "RandomSubsetTrainingSampler", ()),
    ("MODEL.RESNETS.NORM", "FrozenBM", "FrozenBN", ()),
    ("MODEL.RESNETS.DEPTH", 1010, "101", ()),
    ("MODEL.FPN.NORM", "SynBN", "SyncBN", ()),
    ("MODEL.ROI_BOX_HEAD.NORM", "SynBN", "SyncBN",
     ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1)),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoiAlign", "ROIAlign", ()),
    ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPol", "ROIPool", ("MODEL.MASK_ON", True)),
    ("MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIPol", "ROIPool", ("MODEL.KEYPOINT_ON", True)),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smoothl1", "smooth_l1", ()),
    ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "g_iou", "giou", ()),
    ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "g_iou", "giou", ("MODEL.META_ARCHITECTURE", "RetinaNet")),
    ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "g_iou", "giou", ("MODEL.META_ARCHITECTURE", "FPNRetinaNet")),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "values", "value", ("SOLVER.CLIP_GRADIENTS.ENABLED", True)),
    ("INPUT.MASK_FORMAT", "polygons", "polygon", ("MODEL.MASK_ON", True)),
]
# The two words that make a Detectron2 configuration ours, with Detectron2's own defaults for the rest.
OURS = ["MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.ROI_HEADS.NAME", "FPNROIHeads"]


@pytest.mark.parametrize(("key", "value", "meant", "where_read"), WRONG_VALUES)
def test_a_value_that_does_not_exist_names_the_nearest_where_it_is_read(key, value, meant, where_read):
    wrong, read = [key, str(value)], [str(option) for option in where_read]
    with pytest.raises(UserError, match=f"{key} is .*did you mean {meant}") as error:
        load_config("", [*OURS, *read, *wrong])
    assert "; there are " in str(error.value)
    if read:
        load_config("", [*OURS, *wrong])


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.RESNETS.NORM", ""],
        ["MODEL.FPN.NORM", "naiveSyncBN_N", "MODEL.RESNETS.NORM", "nnSyncBN", "MODEL.RESNETS.DEPTH", "152"],
        ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""],
        ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated", "MODEL.ROI_BOX_HEAD.NORM", "LN"],
        ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.NECK", "mine"],
    ],
)
def test_what_detectron2_accepts_passes(opts):
    load_config("", [*OURS, *opts])


def test_a_scheduler_and_a_sampler_of_ones_own_are_accepted_and_used(tmp_path, scenes, monkeypatch):
    for registry in (LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", {})
    with pytest.raises(UserError, match="LR_SCHEDULER_NAME is 'Falling', which does not exist"):
        small_config(tmp_path, scenes, "SOLVER.LR_SCHEDULER_NAME", "Falling")

    @LR_SCHEDULER_REGISTRY.register()
    def Falling(cfg, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    @TRAIN_SAMPLER_REGISTRY.register()
    def Last(cfg, records):
        return itertools.repeat(len(records) - 1)

    own = ["SOLVER.LR_SCHEDULER_NAME", "Falling", "DATALOADER.SAMPLER_TRAIN", "Last", "SOLVER.MAX_ITER", 2]
    cfg = small_config(tmp_path, scenes, *own, "DATASETS.TEST", "()", "TEST.BEST_METRIC", "")
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == cfg.SOLVER.BASE_LR / 4
    last = DatasetCatalog.get(TRAIN)[-1]["image_id"]
    batches = iter(Trainer.build_train_loader(cfg))
    assert [record["image_id"] for record in next(batches)] == [last, last]
    batches.close()


def test_what_only_the_installed_detectron2_knows_is_accepted(monkeypatch):
    monkeypatch.setattr(checks, "_SCHEDULERS", ())
    monkeypatch.setattr(checks, "_SAMPLERS", ())
    load_config("", ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "DATALOADER.SAMPLER_TRAIN", "TrainingSampler"])
    load_config("", ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"])  # which looks at the records
    with pytest.raises(UserError, match="SAMPLER_TRAIN is 'NoSampler', which does not exist"):
        load_config("", ["DATALOADER.SAMPLER_TRAIN", "NoSampler"])


def test_layer_norm_is_known_where_detectron2_knows_it():
    opts = [*OURS, "MODEL.FPN.NORM", "LN"]
    try:
        get_norm("LN", 8)
    except KeyError:
        with pytest.raises(UserError, match="MODEL.FPN.NORM is 'LN'"):
            load_config("", opts)
    else:
        load_config("", opts)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet", "RetinaNet"),
        ("MODEL.META_ARCHITECTURE", "PanopticFPN", "PanopticFPN"),
        ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "ProposalNetwork"),
        ("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "SemanticSegmentor"),
        ("MODEL.KEYPOINT_ON", "True", "MODEL.KEYPOINT_ON"),
        ("MODEL.LOAD_PROPOSALS", "True", "MODEL.LOAD_PROPOSALS"),
    ],
)
def test_a_model_that_cannot_be_augmented_is_refused(key, value, named):
    opts = [key, value]
    check_test_augmentation(load_config("", opts))
    with pytest.raises(UserError, match=f"TEST.AUG.ENABLED .*{named}"):
        check_test_augmentation(load_config("", [*opts, "TEST.AUG.ENABLED", "True"]))


def test_models_that_can_be_augmented_pass():
    for opts in ([], OURS, ["MODEL.MASK_ON", "True"]):
        check_test_augmentation(load_config("", [*opts, "TEST.AUG.ENABLED", "True"]))


@pytest.mark.parametrize(
    ("switch", "key"),
    [
        ("MODEL.MASK_ON", "MODEL.ROI_MASK_HEAD.NAME"),
        ("MODEL.KEYPOINT_ON", "MODEL.ROI_KEYPOINT_HEAD.NAME"),
    ],
)
def test_the_name_of_a_head_matters_only_where_it_is_built(switch, key):
    load_config("", [key, "Nothing"])
    with pytest.raises(UserError, match=f"{key} is 'Nothing', which does not exist.*; there are "):
        load_config("", [key, "Nothing", switch, "True"])


def test_files_of_the_data_that_are_there_pass(tmp_path, scenes):
    check_data_files(small_config(tmp_path, scenes), train=True)


@pytest.mark.parametrize("what", ["json_file", "image_root"])
def test_missing_files_of_a_registered_set_are_named(tmp_path, what):
    present = tmp_path / "there"
    present.mkdir()
    (present / "a.json").write_text("{}")
    metadata = {"json_file": str(present / "a.json"), "image_root": str(present), what: str(tmp_path / "gone")}
    DatasetCatalog.register("half_a_set", list)
    MetadataCatalog.get("half_a_set").set(thing_classes=["a"], **metadata)
    try:
        cfg = load_config("", ["DATASETS.TRAIN", "('half_a_set',)"])
        with pytest.raises(UserError, match=f"half_a_set: its {what} does not exist: looked for {tmp_path}/gone"):
            check_data_files(cfg, train=True)
    finally:
        DatasetCatalog.remove("half_a_set")
        MetadataCatalog.remove("half_a_set")


def test_a_builtin_set_without_files_says_which_variable_names_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("", ["DATASETS.TEST", "('coco_2017_val',)"])
    with pytest.raises(UserError, match="coco_2017_val.*looked for .*instances_val2017.json"):
        check_data_files(cfg, train=False)


@pytest.mark.parametrize(("train", "key"), [(True, "DATASETS.TRAIN"), (False, "DATASETS.TEST")])
def test_no_data_set_at_all_is_refused(train, key):
    with pytest.raises(UserError, match=f"{key} is empty"):
        check_data_files(load_config(), train=train)


def test_only_the_test_sets_are_needed_to_evaluate(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, "DATASETS.TRAIN", "()")
    check_data_files(cfg, train=False)
    with pytest.raises(UserError, match="DATASETS.TRAIN"):
        check_data_files(cfg, train=True)
    assert TRAIN not in cfg.DATASETS.TRAIN


def test_a_missing_weight_file_is_named_and_addresses_pass(tmp_path):
    (tmp_path / "model_final.pth").touch()
    file = str(tmp_path / "model_final.pth")
    for path in ("", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", file, f"{file}?matching_heuristics=True"):
        check_weight_file(path)
    with pytest.raises(UserError, match=f"looked for {tmp_path}/model_finl.pth .did you mean model_final.pth"):
        check_weight_file(str(tmp_path / "model_finl.pth"))
    with pytest.raises(UserError, match="weights of a package .* name them in MODEL.TIMM.WEIGHTS"):
        check_weight_file("package:efficientnet_lite0")
