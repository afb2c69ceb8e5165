"""The picture of detections beside ground truth."""

import pickle

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from fpn_d2.engine import Trainer, draw_detections
from fpn_d2.errors import UserError
from tests.engine.small import TEST, small_config


class _Finds(nn.Module):
    """Stands for a detector: it finds one object with each of the scores, in the same place."""

    def __init__(self, scores, masks=False):
        super().__init__()
        self.scores = scores
        self.masks = masks
        self.calls = []

    def forward(self, batch):
        assert not self.training
        height, width = batch[0]["height"], batch[0]["width"]
        self.calls.append(batch[0]["file_name"])
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.tensor([[8.0, 8.0, width / 2, height / 2]] * len(self.scores)))
        found.scores = torch.tensor(self.scores)
        found.pred_classes = torch.zeros(len(self.scores), dtype=torch.long)
        if self.masks:
            found.pred_masks = torch.zeros(len(self.scores), height, width, dtype=torch.bool)
            found.pred_masks[:, 10:20, 10:20] = True
        return [{"instances": found}]


def _drawn(tmp_path, scenes, model, *opts):
    cfg = small_config(tmp_path, scenes, *opts)
    path = tmp_path / "new" / "picture.png"
    draw_detections(cfg, model, TEST, str(path))
    return cv2.imread(str(path))


def _sides(picture):
    """Ground truth and detections of the first image."""
    return picture[28 : 28 + 360, :480], picture[28 : 28 + 360, 484:964]


def test_the_images_are_spread_over_the_set(tmp_path, scenes):
    small_config(tmp_path, scenes)  # registers the set
    files = [record["file_name"] for record in DatasetCatalog.get(TEST)]
    for count, chosen in ((2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])):
        model = _Finds([])
        _drawn(tmp_path, scenes, model, "TEST.PICTURE_IMAGES", count)
        assert model.calls == [files[i] for i in chosen]
        assert model.training


def test_only_detections_of_the_score_are_drawn(tmp_path, scenes):
    truth, none = _sides(_drawn(tmp_path, scenes, _Finds([])))
    truth_again, low = _sides(_drawn(tmp_path, scenes, _Finds([0.4])))
    _, high = _sides(_drawn(tmp_path, scenes, _Finds([0.6])))
    assert np.array_equal(truth, truth_again)  # the same colours each time
    assert np.array_equal(none, low)
    assert not np.array_equal(none, high)
    assert not np.array_equal(truth, none)  # the ground truth has objects
    _, at_it = _sides(_drawn(tmp_path, scenes, _Finds([0.5])))
    assert not np.array_equal(none, at_it)
    _, lowered = _sides(_drawn(tmp_path, scenes, _Finds([0.4]), "TEST.PICTURE_SCORE", 0.3))
    assert not np.array_equal(none, lowered)


def test_masks_are_drawn_where_the_model_has_them(tmp_path, scenes):
    _, plain = _sides(_drawn(tmp_path, scenes, _Finds([0.9])))
    _, masked = _sides(_drawn(tmp_path, scenes, _Finds([0.9], masks=True)))
    assert not np.array_equal(plain, masked)


@pytest.mark.parametrize("meta", ["GeneralizedRCNN", "ProposalNetwork"])
def test_real_models_are_drawn(tmp_path, scenes, meta):
    cfg = small_config(tmp_path, scenes, "MODEL.META_ARCHITECTURE", meta)
    model = Trainer.build_model(cfg)
    draw_detections(cfg, model, TEST, str(tmp_path / "p.png"))
    assert cv2.imread(str(tmp_path / "p.png")).shape == (28 + 2 * 364, 2 * 964 + 12, 3)
    assert model.training


def test_a_model_that_reads_its_proposals_from_files_is_drawn(tmp_path, scenes):
    file = tmp_path / "proposals.pkl"
    cfg = small_config(
        tmp_path, scenes, "MODEL.LOAD_PROPOSALS", "True", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
        "DATASETS.PROPOSAL_FILES_TEST", f"('{file}',)", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    )
    ids = [record["image_id"] for record in DatasetCatalog.get(TEST)]
    box, score = np.array([[4.0, 4.0, 40.0, 40.0]], np.float32), np.array([1.0], np.float32)
    content = {"ids": ids, "boxes": [box] * len(ids), "objectness_logits": [score] * len(ids)}
    file.write_bytes(pickle.dumps(content))
    draw_detections(cfg, Trainer.build_model(cfg), TEST, str(tmp_path / "p.png"))
    assert cv2.imread(str(tmp_path / "p.png")) is not None


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes)
    (tmp_path / "p.png").mkdir()
    with pytest.raises(UserError, match="p.png"):
        draw_detections(cfg, _Finds([]), TEST, str(tmp_path / "p.png"))
