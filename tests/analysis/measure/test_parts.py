"""Parameters and multiply-adds by part against counts by hand."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn

from fpn_d2.analysis.compare.measure import keep_size, torchvision_detector, torchvision_images
from fpn_d2.analysis.measure.complexity import count_parameters
from fpn_d2.analysis.measure.parts import PARTS, macs_by_part, parameters_by_part
from fpn_d2.analysis.subjects import build_one, random_batch, read_config

from ..small_detectors import RETINANET, STOCK, STOCK_RETINANET, write

SIZE = (64, 96)


def model_of(folder, *opts, rule="canonical"):
    path, cfg = read_config(write(folder / "small.yaml"), list(opts), "cpu")
    cfg.MODEL.ROI_LEVEL_ASSIGN.NAME = rule
    return build_one("A", path, path, cfg, "")


def test_parameters_are_those_of_the_names(tmp_path):
    model = model_of(tmp_path, "MODEL.MASK_ON", "True", rule="all_max").network
    found = parameters_by_part(model)
    by_name = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = "bottom-up" if ".bottom_up." in name else "neck" if name.startswith("backbone.") else "heads"
        part = "pooling" if "pooler" in name else "RPN" if name.startswith("proposal_generator.") else part
        by_name[part] += parameter.numel()
    assert by_name["pooling"] > 0  # the extractor's convolutions
    assert found == by_name | {"total": count_parameters(model)}


def test_multiply_adds_by_hand(tmp_path):
    model = model_of(tmp_path)
    found = macs_by_part(model.network, random_batch(model.cfg, 1, SIZE))
    cells = [SIZE[0] * SIZE[1] // 4**k for k in range(2, 6)]
    lateral = sum(c * n * 16 for c, n in zip((64, 128, 256, 512), cells, strict=True))
    assert found["neck"] == lateral + sum(n * 16 * 16 * 9 for n in cells)
    every = [*cells, 2 * 1]  # p6: 2 x 3 cells of p5, every other one
    every[4] = 1 * 2
    assert found["RPN"] == sum(n * 16 * (16 * 9 + 3 + 3 * 4) for n in every)
    fully_connected = 20 * (16 * 3 * 3 * 16 + 16 * (5 + 1) + 16 * 5 * 4)
    assert found["heads"] == fully_connected
    assert found["other"] == 0
    assert found["total"] == sum(found[part] for part in PARTS)
    assert found["pooling"] > 0


def test_pooling_counts_the_samples_of_its_definition():
    class Detector(nn.Module):
        def __init__(self, sampling_ratio, output_size=(2, 3), levels=1):
            super().__init__()
            self.roi_heads = nn.Module()
            self.roi_heads.box_pooler = ROIPooler(output_size, [1 / 4, 1 / 8][:levels], sampling_ratio, "ROIAlignV2")
            self.roi_heads.forward = lambda maps, boxes: self.roi_heads.box_pooler(maps, boxes)

        def forward(self, batch):
            return self.roi_heads(*batch)

    boxes = [Boxes(torch.tensor([[0.0, 0.0, 30.0, 20.0]])), Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(2, 1))]
    maps = [torch.zeros(2, 5, 16, 16)]
    cells = 2 * 3
    # On the map of stride 4 the first is 7.5 x 5 cells: 3 samples across and 3 down in each of 3 x 2 bins.
    assert macs_by_part(Detector(0), (maps, boxes))["pooling"] == 4 * 5 * cells * (3 * 3 + 2 * 1)
    assert macs_by_part(Detector(2), (maps, boxes))["pooling"] == 4 * 5 * cells * 3 * 4
    # A box without an extent has one sample in each bin.
    empty = [Boxes(torch.tensor([[7.0, 7.0, 7.0, 7.0]])), Boxes(torch.zeros(0, 4))]
    assert macs_by_part(Detector(0), (maps, empty))["pooling"] == 4 * 5 * cells
    large = [Boxes(torch.tensor([[0.0, 0.0, 448.0, 448.0]]))]
    # Larger than 224 pixels: from the second level, whose cells are 8 pixels.
    two_maps = [torch.zeros(1, 5, 128, 128), torch.zeros(1, 5, 64, 64)]
    assert macs_by_part(Detector(0, (2, 2), 2), (two_maps, large))["pooling"] == 4 * 5 * 4 * 28 * 28


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_pooling_from_all_levels_counts_every_level(tmp_path, numerics):
    batch = None
    found = {}
    for rule in ("canonical", "all_sum", "all_max"):
        opts = ["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2", "MODEL.NUMERICS", numerics]
        model = model_of(tmp_path, *opts, rule=rule)
        batch = batch or random_batch(model.cfg, 1, SIZE)
        found[rule] = macs_by_part(model.network, batch)
        assert not any(level._forward_pre_hooks for level in model.network.roi_heads.box_pooler.level_poolers)
    pooled = {rule: parts["pooling"] for rule, parts in found.items()}
    assert pooled["all_sum"] == 4 * pooled["canonical"] == 4 * (20 * 4 * 4 * 3 * 3 * 16)
    # Convolutions of an extractor belong to pooling, not to the heads: one of 3 x 3 per RoI and level.
    assert pooled["all_max"] - pooled["all_sum"] == 4 * 20 * 3 * 3 * 16 * 16 * 9
    assert found["all_max"]["heads"] == found["canonical"]["heads"] and found["all_max"]["other"] == 0


def test_ours_and_stock_cost_the_same(tmp_path):
    # Fast: the same sums in other operations.
    ours, stock = model_of(tmp_path, "MODEL.NUMERICS", "fast"), model_of(tmp_path, *STOCK)
    batch = random_batch(ours.cfg, 1, SIZE)
    stock.network.load_state_dict(ours.network.state_dict())
    assert macs_by_part(ours.network, batch) == macs_by_part(stock.network, batch)
    assert parameters_by_part(ours.network) == parameters_by_part(stock.network)


def test_one_stage_detector(tmp_path):
    model = model_of(tmp_path, *RETINANET, *STOCK_RETINANET)
    found = macs_by_part(model.network, random_batch(model.cfg, 1, SIZE))
    assert found["heads"] > 0 and found["RPN"] == found["pooling"] == found["other"] == 0


@pytest.mark.slow
def test_torchvision():
    network = torchvision_detector(torch.device("cpu"))
    keep_size(network, SIZE)
    cfg = read_config("COCO-Detection/faster_rcnn_R_50_FPN_1x", [], "cpu")[1]
    images = torchvision_images(random_batch(cfg, 1, SIZE), "cpu")
    found = macs_by_part(network, images)
    assert found["other"] == 0 and all(found[part] > 0 for part in PARTS if part != "other")
    assert parameters_by_part(network)["total"] == count_parameters(network)
