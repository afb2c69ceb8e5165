"""How each project of tests/compatibility.py is imported, configured, fed and called."""

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One project.

    Args:
        name: of the project.
        repository: owner/name of its repository, and the commit that this was written for.
        config: its configuration file, in there.
        cfg: returns its configuration before that is merged, once its modules can be imported.
        paths: folders with its packages, in the folder of all projects.
        needs: called before any import of it: what today's libraries lack, or cannot be built here.
        options: keys and values that follow the file.
        files: keys whose values are files, in the folder of all projects.
        batch: what its model wants beside what Detectron2's have, in the format of tests/batches.py.
        build: its ``build_model``.
        predict: the model in evaluation mode and a batch -> detections.
        losses: the model in training mode and a batch -> losses by name.
        remarks: what was done for it to run at all, for the table.
    """

    name: str
    repository: str
    config: str
    cfg: Callable[[], CfgNode]
    paths: tuple[str, ...]
    needs: Callable[[], None] = lambda: None
    options: tuple = ()
    files: tuple[tuple[str, str], ...] = ()
    batch: Callable[[CfgNode, list[dict]], list[dict]] = lambda cfg, batch: batch
    build: Callable[[CfgNode], nn.Module] = build_model
    predict: Callable[[nn.Module, list[dict]], object] = lambda model, batch: model(batch)
    losses: Callable[[nn.Module, list[dict]], dict[str, Tensor]] = lambda model, batch: model(batch)
    remarks: str = ""

    def configure(self, projects: Path) -> CfgNode:
        """Import it and read its configuration.

        Args:
            projects: the folder of all checkouts.
        """
        sys.path[:0] = [str(projects / path) for path in self.paths]
        self.needs()
        cfg = self.cfg()
        cfg.merge_from_file(str(projects / self.config))
        files = [value for key, path in self.files for value in (key, str(projects / path))]
        cfg.merge_from_list([*_SMALL, *files, *self.options])
        return cfg


# What is slow on a CPU and shows nothing more with random weights: many proposals, RoIs and masks.
_SMALL = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.DETECTIONS_PER_IMAGE", 20)
_SMALL += ("MODEL.RPN.POST_NMS_TOPK_TEST", 200, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64)


def fake(*names: str) -> Callable[[], None]:
    """Stands in for modules that are not there: operations for GPUs alone, and what only other parts call."""
    return lambda: sys.modules.update({name: MagicMock(name=name) for name in names})


def detectron2s(*functions: str) -> Callable[[], CfgNode]:
    """Detectron2's defaults, and what each of ``module:function`` adds."""

    def cfg() -> CfgNode:
        node = get_cfg()
        for function in functions:
            module, name = function.split(":")
            getattr(importlib.import_module(module), name)(node)
        return node

    return cfg


def own(module: str, *others: str) -> Callable[[], CfgNode]:
    """The project's own ``get_cfg``, in ``module``; ``others`` are imported for what they register."""

    def cfg() -> CfgNode:
        for name in others:
            importlib.import_module(name)
        return importlib.import_module(module).get_cfg()

    return cfg


# --- unbiased-teacher


class _FastRCNNOutputs:
    """What the project's focal loss takes from a class of that name, which Detectron2 had until v0.5."""

    def __init__(self, box2box_transform, pred_class_logits, pred_proposal_deltas, proposals, beta, loss_type):
        self._no_instances = sum(map(len, proposals)) == 0
        self.pred_class_logits, self.pred_proposal_deltas = pred_class_logits, pred_proposal_deltas
        self.gt_classes = torch.cat([one.gt_classes for one in proposals])
        self.proposals = torch.cat([one.proposal_boxes.tensor for one in proposals])
        self.gt_boxes = torch.cat([one.gt_boxes.tensor for one in proposals])
        self.settings = box2box_transform, loss_type, beta

    def box_reg_loss(self) -> Tensor:
        """That of the foreground, over the number of all proposals."""
        classes = self.pred_class_logits.shape[1] - 1
        rows = ((self.gt_classes >= 0) & (self.gt_classes < classes)).nonzero()[:, 0]
        deltas = self.pred_proposal_deltas.view(len(self.gt_classes), -1, 4)[rows, self.gt_classes[rows]]
        loss = _dense_box_regression_loss(
            [Boxes(self.proposals[rows])],
            self.settings[0],
            [deltas[None]],
            [self.gt_boxes[rows]],
            torch.ones(1, len(rows), dtype=torch.bool),
            *self.settings[1:],
        )
        return loss / max(len(self.gt_classes), 1)


def _teachers() -> CfgNode:
    fast_rcnn.FastRCNNOutputs = _FastRCNNOutputs
    for name in ("meta_arch.rcnn", "proposal_generator.rpn", "roi_heads.roi_heads"):
        importlib.import_module(f"ubteacher.modeling.{name}")
    return detectron2s("ubteacher:add_ubteacher_config")()


# --- few-shot-object-detection and SparseR-CNN


def _build_few_shot(cfg: CfgNode) -> nn.Module:
    return importlib.import_module("fsdet.modeling").build_model(cfg)


def _short_version() -> None:
    torchvision.__version__ = "0.9"  # read as a number, from three characters


# --- DensePose


def _with_surface_points(cfg: CfgNode, batch: list[dict]) -> list[dict]:
    structures = importlib.import_module("densepose.structures")
    generator = torch.Generator().manual_seed(0)
    for one in batch:
        instances = one["instances"]
        points = []
        for _ in range(len(instances)):
            place, surface = torch.rand(2, 20, generator=generator), torch.rand(2, 20, generator=generator)
            annotation = {"dp_x": 256 * place[0], "dp_y": 256 * place[1], "dp_U": surface[0], "dp_V": surface[1]}
            annotation["dp_I"] = torch.randint(1, 25, (20,), generator=generator).float()
            annotation["dp_masks"] = torch.randint(15, (256, 256), generator=generator).float()
            points.append(structures.DensePoseDataRelative(annotation))
        boxes = instances.gt_boxes.tensor
        instances.gt_densepose = structures.DensePoseList(points, boxes, instances.image_size)
    return batch


# --- sahi


def _build_for_sahi(cfg: CfgNode) -> nn.Module:
    """The model that sahi itself builds from a configuration file and a weight file; it keeps its detector."""
    models = importlib.import_module("sahi.models.detectron2")
    with tempfile.TemporaryDirectory() as folder:
        config, weights = Path(folder) / "config.yaml", Path(folder) / "model.pth"
        config.write_text(cfg.dump())
        torch.save({"model": build_model(cfg).state_dict()}, weights)
        detector = models.Detectron2DetectionModel(
            model_path=str(weights), config_path=str(config), device="cpu", confidence_threshold=0.0, image_size=160
        )
    model = detector.model.model
    model.__dict__["of_sahi"] = detector
    return model


def _sliced(model: nn.Module, batch: list[dict]) -> list[Instances]:
    """Detections of sahi's sliced prediction."""
    predict = importlib.import_module("sahi.predict").get_sliced_prediction
    detector = model.of_sahi
    detector.model.model = model
    results = []
    for one in batch:
        image = one["image"].permute(1, 2, 0).numpy()
        found = predict(image, detector, slice_height=96, slice_width=96, verbose=0).object_prediction_list
        result = Instances((one["height"], one["width"]))
        result.pred_boxes = Boxes(torch.tensor([each.bbox.to_xyxy() for each in found]).view(-1, 4))
        result.scores = torch.tensor([each.score.value for each in found])
        result.pred_classes = torch.tensor([each.category.id for each in found])
        results.append(result)
    return results


_ALL_SCORES = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
_FCOS = ("MODEL.FCOS.INFERENCE_TH_TRAIN", 0.0, "MODEL.FCOS.INFERENCE_TH_TEST", 0.0)
_FCOS += ("MODEL.FCOS.POST_NMS_TOPK_TEST", 20)
_CENTERNET = (*_ALL_SCORES, "MODEL.CENTERNET.POST_NMS_TOPK_TEST", 64, "MODEL.CENTERNET.POST_NMS_TOPK_TRAIN", 200)

RECIPES = (
    Recipe(
        name="unbiased-teacher",
        repository="facebookresearch/unbiased-teacher@6977c6f",
        config="unbiased-teacher/configs/coco_supervision/faster_rcnn_R_50_FPN_sup1_run1.yaml",
        cfg=_teachers,
        paths=("unbiased-teacher",),
        options=_ALL_SCORES,
        losses=lambda model, batch: model(batch, branch="supervised")[0],
        remarks="A stand-in for `FastRCNNOutputs`, which Detectron2 0.6 has no more; losses of the supervised branch",
    ),
    Recipe(
        name="few-shot-object-detection",
        repository="ucbdrive/few-shot-object-detection@148a039",
        config="few-shot-object-detection/configs/COCO-detection/faster_rcnn_R_101_FPN_base.yaml",
        cfg=own("fsdet.config", "fsdet.modeling"),
        paths=("few-shot-object-detection",),
        options=("MODEL.RESNETS.DEPTH", 50, *_ALL_SCORES),
        build=_build_few_shot,
        remarks="ResNet-50 in the place of its ResNet-101",
    ),
    Recipe(
        name="SparseR-CNN",
        repository="PeizeSun/SparseR-CNN@0e5028d",
        config="SparseR-CNN/projects/SparseRCNN/configs/sparsercnn.res50.100pro.3x.yaml",
        cfg=detectron2s("sparsercnn:add_sparsercnn_config"),
        paths=("SparseR-CNN/projects/SparseRCNN",),
        needs=_short_version,
        remarks="Its test of torchvision's version takes 0.29 for 0.2",
    ),
    Recipe(
        name="CenterNet2",
        repository="xingyizhou/CenterNet2@bfc8b72",
        config="CenterNet2/configs/CenterNet2_R50_1x.yaml",
        cfg=detectron2s("centernet.config:add_centernet_config"),
        paths=("CenterNet2",),
        options=_CENTERNET,
    ),
    Recipe(
        name="Detic",
        repository="facebookresearch/Detic@436cda2",
        config="Detic/configs/BoxSup-C2_L_CLIP_R5021k_640b64_4x.yaml",
        cfg=detectron2s("centernet.config:add_centernet_config", "detic.config:add_detic_config"),
        paths=("CenterNet2", "Detic"),
        needs=fake("clip", "clip.simple_tokenizer"),
        files=(
            ("MODEL.ROI_BOX_HEAD.ZEROSHOT_WEIGHT_PATH", "Detic/datasets/metadata/lvis_v1_clip_a+cname.npy"),
            ("MODEL.ROI_BOX_HEAD.CAT_FREQ_PATH", "Detic/datasets/metadata/lvis_v1_train_cat_info.json"),
        ),
        options=("MODEL.TIMM.BASE_NAME", "resnet50", "FP16", False, *_CENTERNET),
        remarks="With CenterNet2; plain ResNet-50 of timm, in float32 training; CLIP, for captions alone, left out",
    ),
    Recipe(
        name="centermask2",
        repository="youngwanLEE/centermask2@6adabd6",
        config="centermask2/configs/centermask/centermask_R_50_FPN_ms_3x.yaml",
        cfg=own("centermask.config"),
        paths=("centermask2",),
        options=_FCOS,
    ),
    Recipe(
        name="AdelaiDet",
        repository="aim-uofa/AdelaiDet@3672122",
        config="AdelaiDet/configs/CondInst/MS_R_50_1x.yaml",
        cfg=own("adet.config", "adet.modeling"),
        paths=("AdelaiDet",),
        needs=fake("adet._C", "skimage"),
        options=_FCOS,
        predict=lambda model, batch: [model([one])[0] for one in batch],
        remarks="CondInst; compiled operations (for text) and scikit-image (for BoxInst) left out; images one by one",
    ),
    Recipe(
        name="PointRend",
        repository="facebookresearch/detectron2@02b5c4e",
        config="detectron2/projects/PointRend/configs/InstanceSegmentation/pointrend_rcnn_R_50_FPN_1x_coco.yaml",
        cfg=detectron2s("point_rend:add_pointrend_config"),
        paths=("detectron2/projects/PointRend",),
        options=_ALL_SCORES,
    ),
    Recipe(
        name="DensePose",
        repository="facebookresearch/detectron2@02b5c4e",
        config="detectron2/projects/DensePose/configs/densepose_rcnn_R_50_FPN_s1x.yaml",
        cfg=detectron2s("densepose:add_densepose_config"),
        paths=("detectron2/projects/DensePose",),
        needs=fake("av"),
        options=_ALL_SCORES,
        batch=_with_surface_points,
        remarks="PyAV, for video, left out",
    ),
    Recipe(
        name="vovnet-detectron2",
        repository="youngwanLEE/vovnet-detectron2@b81c813",
        config="vovnet-detectron2/configs/mask_rcnn_V_19_FPN_3x.yaml",
        cfg=detectron2s("vovnet:add_vovnet_config"),
        paths=("vovnet-detectron2",),
        options=_ALL_SCORES,
        remarks="Mask R-CNN, VoVNet-19",
    ),
    Recipe(
        name="sahi",
        repository="obss/sahi@9a4e569",
        config="detectron2/configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        cfg=get_cfg,
        paths=("sahi",),
        options=_ALL_SCORES,
        build=_build_for_sahi,
        predict=_sliced,
        remarks="Its own loading of the written configuration, after `import fpn_d2`; slices of 96 x 96 pixels",
    ),
)
