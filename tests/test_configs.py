"""Every file in configs/: it loads, equals its twin in the model zoo, builds, steps, and says how to run it."""

import re
import shlex
from pathlib import Path

import detectron2
import pytest
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.utils.events import EventStorage

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.modeling import without_timm_weights

from .batches import random_batch

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
BASES = [name for name in ALL if Path(name).name.startswith("Base-")]
LEAVES = [name for name in ALL if name not in BASES]
# Complete recipes: they hold a data set and a schedule of their own, not only what differs from the base.
RECIPES = ("quick_schedules/", "own_data/", "study/paper/fpn.yaml", "study/small_objects/fpn.yaml")
# Single-level baselines: Detectron2's own backbones and heads.
BASELINES = ("small_objects/c4.yaml", "small_objects/c5.yaml", "R_50_C4_1x.yaml", "R_50_C5_1x.yaml", "R_50_DC5_1x.yaml")
# Children of the backbone that no head of a config reads, by config.
UNUSED: dict[str, str] = {}
# Too large for the quick tests.
LARGE = ("_101_", "ViT_B", "NASFPN", "image_pyramid", "ConvNeXt", "Swin", "hybrid", "R_50_C4", "R_50_DC5", "roi_ext")


def default_cfg() -> CfgNode:
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    return cfg


def load(name: str) -> CfgNode:
    cfg = default_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def header(name: str) -> list[str]:
    """The comment lines at the top, without their '#'."""
    lines = []
    for line in (CONFIGS / name).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return lines


def header_field(name: str, field: str) -> str:
    values = [line.split(":", 1)[1].strip() for line in header(name) if line.startswith(f"{field}:")]
    assert len(values) == 1, f"{name} has {len(values)} header lines '{field}:'"
    return values[0]


def zoo_file(name: str) -> Path:
    """The file in the installed Detectron2, or in the checkout that it is imported from."""
    package = Path(detectron2.__file__).parent
    for folder in (package / "model_zoo" / "configs", package.parent / "configs"):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"this Detectron2 comes without its model zoo's {name}")


def flat(node: CfgNode, prefix: str = "") -> dict:
    out = {}
    for key, value in node.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return out


def test_the_families_are_there():
    assert BASES == ["Base-FPN.yaml"]
    kinds = {load(name).MODEL.META_ARCHITECTURE for name in LEAVES}
    assert kinds == {"GeneralizedRCNN", "FPNRetinaNet", "TorchvisionRetinaNet", "ProposalNetwork", "PanopticFPN"}


@pytest.mark.parametrize("name", ALL)
def test_loads_and_every_base_is_there(name):
    path = CONFIGS / name
    while True:
        raw = yaml.safe_load(path.read_text())  # plain YAML: nothing that needs the unsafe loader
        if "_BASE_" not in raw:
            break
        path = path.parent / raw["_BASE_"]
        assert path.is_file(), path
    assert path.name == "Base-FPN.yaml"
    cfg = load(name)
    if name.endswith(BASELINES):
        assert cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone"
        assert cfg.MODEL.ROI_HEADS.NAME in ("Res5ROIHeads", "StandardROIHeads")
    else:
        assert cfg.MODEL.BACKBONE.NAME == "build_fpn_backbone"
        assert cfg.MODEL.ROI_HEADS.NAME in ("FPNROIHeads", "FPNCascadeROIHeads")


@pytest.mark.parametrize("name", LEAVES)
def test_header_states_the_command(name):
    words = shlex.split(header_field(name, "Run"))
    assert words[:2] == ["python", "train_net.py"]
    assert (ROOT / words[words.index("--config-file") + 1]) == CONFIGS / name
    # What follows the config file are pairs KEY VALUE that the configuration takes.
    opts = words[words.index("--config-file") + 2 :]
    load(name).merge_from_list(opts)


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_is_short(name):
    lines = [line for line in (CONFIGS / name).read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= (32 if name.startswith(RECIPES) else 10), len(lines)
    assert len(header(name)) <= 8


@pytest.mark.parametrize("name", LEAVES)
def test_equals_its_twin_in_the_zoo(name):
    twin = header_field(name, "Twin")
    if twin.startswith("none"):
        assert not name.startswith("COCO") or not _exists_in_zoo(name), f"the zoo has {name}"
        return
    twin_name, figures = twin.split(";", 1)
    assert twin_name == name
    assert re.fullmatch(r" published for stock Detectron2: (, )?([a-zA-Z ]+ \d\d\.\d(, )?)+\.", figures), figures

    theirs_cfg = get_cfg()
    theirs_cfg.merge_from_file(str(zoo_file(twin_name)))
    ours, theirs, defaults = flat(load(name)), flat(theirs_cfg), flat(default_cfg())
    assert ours.pop("TEST.EVAL_PERIOD") == 5000 and theirs.pop("TEST.EVAL_PERIOD") == 0  # for the best checkpoint
    if ours["MODEL.PROPOSAL_GENERATOR.NAME"] == "FPNRPN":  # the same proposals; tests/modeling/test_rpn.py
        assert theirs["MODEL.PROPOSAL_GENERATOR.NAME"] == "RPN"
        ours["MODEL.PROPOSAL_GENERATOR.NAME"] = "RPN"
    if name.endswith(BASELINES):
        # The one base sets these for pyramids and mask heads; these models read none of them.
        unread = ("MODEL.FPN.IN_FEATURES", "MODEL.ROI_MASK_HEAD.")
        ours = {key: value for key, value in ours.items() if not key.startswith(unread)}
        theirs = {key: value for key, value in theirs.items() if not key.startswith(unread)}
        heads = "their own"
    else:
        assert ours.pop("MODEL.BACKBONE.NAME") == "build_fpn_backbone"
        assert theirs.pop("MODEL.BACKBONE.NAME") in ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
        heads = theirs.pop("MODEL.ROI_HEADS.NAME")
    if theirs["MODEL.META_ARCHITECTURE"] == "RetinaNet":
        assert ours.pop("MODEL.META_ARCHITECTURE") == "FPNRetinaNet" and theirs.pop("MODEL.META_ARCHITECTURE")
        # The one base sets these for two-stage detectors; RetinaNet reads none of them.
        unread = ("MODEL.RPN.", "MODEL.ROI_HEADS.", "MODEL.ROI_BOX_HEAD.", "MODEL.ROI_MASK_HEAD.")
        ours = {key: value for key, value in ours.items() if not key.startswith(unread)}
        theirs = {key: value for key, value in theirs.items() if not key.startswith(unread)}
    elif heads != "their own":
        expected = {"StandardROIHeads": "FPNROIHeads", "CascadeROIHeads": "FPNCascadeROIHeads"}[heads]
        assert ours.pop("MODEL.ROI_HEADS.NAME") == expected
    assert {key: ours[key] for key in theirs} == theirs
    added = {key: value for key, value in ours.items() if key not in theirs}
    assert added == {key: defaults[key] for key in added}


def _exists_in_zoo(name: str) -> bool:
    return (zoo_file("Base-RCNN-FPN.yaml").parent / name).exists()


def test_fifteen_anchors_shared_by_one_head():
    model = build(load("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    rpn = model.proposal_generator
    sides = [cells.prod(-1).sqrt() for cells in ((a[:, 2:] - a[:, :2]) for a in rpn.anchor_generator.cell_anchors)]
    assert [len(level) for level in sides] == [3] * 5
    for level, side in zip(sides, (32, 64, 128, 256, 512), strict=True):
        torch.testing.assert_close(level, torch.full((3,), float(side)))
    first = next(iter(rpn.anchor_generator.cell_anchors))
    ratios = (first[:, 3] - first[:, 1]) / (first[:, 2] - first[:, 0])
    torch.testing.assert_close(ratios, torch.tensor([0.5, 1.0, 2.0]))
    assert rpn.rpn_head.objectness_logits.out_channels == 3
    assert list(rpn.in_features) == ["p2", "p3", "p4", "p5", "p6"]


def build(cfg: CfgNode) -> torch.nn.Module:
    """Build on the CPU with few proposals; weights are drawn, the same in each run."""
    cfg = without_timm_weights(cfg)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 50
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    torch.manual_seed(0)
    model = build_model(cfg)
    # Blocks with frozen norms and random weights double the variance one after the other, until the heads overflow.
    # Pretrained weights do not; scaling down what each block adds stands in for them.
    for block in model.modules():
        if isinstance(block, BasicBlock | BottleneckBlock):
            with torch.no_grad():
                getattr(block, "conv3", block.conv2).norm.weight.mul_(0.1)
    return model


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if any(part in name for part in LARGE) else name for name in LEAVES],
)
def test_builds_trains_a_step_and_detects(name):
    cfg = load(name)
    model = build(cfg)
    batch = random_batch(cfg)

    model.train()
    with EventStorage():
        losses = model(batch)
    assert losses and all(torch.isfinite(loss) for loss in losses.values()), losses
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    sum(losses.values()).backward()
    # Too small a step to leave the finite numbers, large enough to see that every trained part gets a gradient.
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    for part, module in model.backbone.named_children():
        gradients = {key: p.grad for key, p in module.named_parameters() if p.requires_grad}
        assert all(g is None or torch.isfinite(g).all() for g in gradients.values()), part
        if not (unused := UNUSED.get(name)) or not re.fullmatch(unused, part):
            missing = [key for key, g in gradients.items() if g is None]
            assert not missing, (part, missing)
    assert any(not torch.equal(before[key], value) for key, value in model.named_parameters() if key in before)

    model.eval()
    with torch.no_grad():
        results = model(batch)
    assert len(results) == len(batch)
    for result, item in zip(results, batch, strict=True):
        found = result["proposals" if "proposals" in result else "instances"]
        assert found.image_size == (item["height"], item["width"])
        boxes = found.proposal_boxes if found.has("proposal_boxes") else found.pred_boxes
        assert torch.isfinite(boxes.tensor).all()
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            assert result["panoptic_seg"][0].shape == (item["height"], item["width"])


def load_lazy():
    """Load the example, which starts from the model zoo's own LazyConfigs."""
    model_zoo = pytest.importorskip("detectron2.model_zoo", reason="this Detectron2's model_zoo needs setuptools < 81")
    if not (Path(model_zoo.__file__).parent / "configs").exists():
        pytest.skip("this Detectron2 is not installed: model_zoo/configs is missing")
    return LazyConfig.load(str(CONFIGS / "lazy" / "faster_rcnn_fpn_R_50.py"))


def test_lazy_config_is_the_same_model():
    """configs/lazy: plain arguments build the parameters of the YAML twin and, with its weights, its outputs."""
    lazy_cfg = load_lazy()
    torch.manual_seed(1)
    lazy = instantiate(lazy_cfg.model)
    cfg = load("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.NUMERICS = "cpu", "", "exact"
    torch.manual_seed(2)
    from_yaml = build_model(cfg)
    assert list(lazy.state_dict()) == list(from_yaml.state_dict())
    lazy.load_state_dict(from_yaml.state_dict(), strict=True)

    batch = random_batch(cfg)
    losses = []
    for model in (lazy, from_yaml):
        model.train()
        torch.manual_seed(3)  # both sample anchors and proposals
        with EventStorage():
            losses.append(model(batch))
    assert losses[0].keys() == losses[1].keys()
    for key in losses[0]:
        assert torch.equal(losses[0][key], losses[1][key]), key

    maps = []
    for model in (lazy, from_yaml):
        model.eval()
        # Random heads score every class about 1/81, below the threshold; without one there are detections to compare.
        assert model.roi_heads.box_predictor.test_score_thresh == 0.05
        model.roi_heads.box_predictor.test_score_thresh = 0.0
        with torch.no_grad():
            images = model.preprocess_image(batch)
            maps.append((model.backbone(images.tensor), model(batch)))
    for key in maps[1][0]:
        assert torch.equal(maps[0][0][key], maps[1][0][key]), key
    for ours, theirs in zip(maps[0][1], maps[1][1], strict=True):
        assert len(theirs["instances"]) > 0
        assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
        assert torch.equal(ours["instances"].scores, theirs["instances"].scores)
        assert torch.equal(ours["instances"].pred_classes, theirs["instances"].pred_classes)


def test_lazy_config_trains_like_its_twin():
    lazy_cfg = load_lazy()
    cfg = load("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    assert lazy_cfg.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy_cfg.optimizer.lr == cfg.SOLVER.BASE_LR
    assert lazy_cfg.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy_cfg.dataloader.train.dataset.names == cfg.DATASETS.TRAIN[0]
    assert lazy_cfg.train.init_checkpoint == cfg.MODEL.WEIGHTS
