"""The order of a training and its augmentation: the same for any number of workers, and from any iteration."""

import itertools

import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler

from fpn_d2.engine import Trainer

from .small import small_config

MIXED = ["INPUT.MOSAIC", 0.5, "INPUT.COPY_PASTE", 0.5, "INPUT.SCALE_JITTER", [0.5, 1.5]]
REPEATED = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9]


def _batches(cfg, count, state=None, seed=5):
    loader = Trainer.build_train_loader(cfg)
    loader.seed = seed
    if state is not None:
        loader.load_state_dict(state)
    batches = list(itertools.islice(iter(loader), count))
    state = loader.state_dict()
    loader.close()
    return batches, state


def _same(one, other):
    assert len(one) == len(other)
    for a, b in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)


@pytest.mark.parametrize("options", [MIXED, REPEATED], ids=["mixed", "repeated"])
def test_the_same_images_for_any_number_of_workers_and_from_any_iteration(tmp_path, scenes, options):
    whole, _ = _batches(small_config(tmp_path, scenes, *options), 6)
    _same(whole, _batches(small_config(tmp_path, scenes, *options, "DATALOADER.NUM_WORKERS", 2), 6)[0])
    cfg = small_config(tmp_path, scenes, *options)
    first, state = _batches(cfg, 2)
    later, _ = _batches(cfg, 4, state)
    _same(whole, first + later)
    other, _ = _batches(cfg, 6, seed=6)
    assert [x["file_name"] for x in itertools.chain(*whole)] != [x["file_name"] for x in itertools.chain(*other)]


def test_mixed_images_have_objects_of_others(tmp_path, scenes):
    keys = ["INPUT.RANDOM_FLIP", "none"]
    mixed, _ = _batches(small_config(tmp_path, scenes, *keys, "INPUT.MOSAIC", 1.0), 3)
    plain, _ = _batches(small_config(tmp_path, scenes, *keys), 3)
    for a, b in zip(itertools.chain(*mixed), itertools.chain(*plain), strict=True):
        assert a["file_name"] == b["file_name"] and a["image"].shape == b["image"].shape
        assert not torch.equal(a["image"], b["image"])


def test_repeat_factors_are_read(tmp_path, scenes):
    """What the sampler repeats is what Detectron2 computes from the records."""
    cfg = small_config(tmp_path, scenes, *REPEATED)
    loader = Trainer.build_train_loader(cfg)
    records = [loader._data[k] for k in range(len(loader._data))]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.9)
    assert factors.max() > 1
    order = itertools.islice(loader._build_sampler()._infinite_indices(), 3000)
    counts = torch.bincount(torch.tensor(list(order)), minlength=len(records)).float()
    torch.testing.assert_close(counts / counts.sum(), factors / factors.sum(), atol=0.02, rtol=0)
