"""A detector written as a ``torch.export`` program, read back, against the model that it was made from."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fpn_d2.analysis.exported import all_within, check_exported, random_batches, text
from fpn_d2.inference import Predictor
from fpn_d2.inference.export import export_detector
from tests.inference.runners import detector_of, run_alone
from tests.inference.test_export import CLASSES, SMALLEST, build, config


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What was written of a detector that finds something in the first of two images, and nothing in the second."""
    model = build(SMALLEST)
    # As large as the runner wants them.
    images = [F.interpolate(batch[0][None].float(), (96, 120))[0].byte() for batch in random_batches(96, 128)[:2]]
    predictor = model.roi_heads.box_predictor
    predictor.test_score_thresh = 0.0
    with torch.no_grad():
        best = [float(found["instances"].scores.max()) for found in model([{"image": image} for image in images])]
    images = images if best[0] > best[1] else images[::-1]
    predictor.test_score_thresh = sum(best) / 2
    folder = tmp_path_factory.mktemp("pt2")
    return export_detector(Predictor(model, config(SMALLEST), class_names=CLASSES), folder, "pt2"), model, images


def test_program_gives_what_the_model_gives_for_many_sizes_and_for_nothing(written):
    exported, model, (something, nothing) = written
    batches = [[something, nothing], [nothing], [something], *random_batches(96, 128, seed=1)]
    batches.append([torch.zeros(3, 20, 9, dtype=torch.uint8)])
    found = check_exported(exported, model, batches)
    assert list(found) == ["torch"] and all_within(found), text(found, batches)
    boxes = [d.note for d in found["torch"][0] if d.stage == "detections" and d.item.endswith("boxes")]
    assert {"input", "pyramid", "proposals", "masks"} <= {d.stage for d in found["torch"][0]}
    assert not boxes[0].startswith("0 of 0") and boxes[1].startswith("0 of 0")


def test_its_runner_reads_the_metadata_and_the_image(written):
    exported, model, (something, _) = written
    detector = detector_of("pt2", exported.path)
    assert detector.info["classes"] == list(CLASSES)
    image = Image.fromarray(something.permute(1, 2, 0).numpy()[:, :, ::-1].copy())
    (found,), expected = detector([image]), Predictor(model, config(SMALLEST))(image)
    assert len(expected) == len(found["scores"]) > 0
    assert (found["masks"] == expected.pred_masks.numpy()).all(axis=(1, 2)).mean() > 0.9
    torch.testing.assert_close(torch.from_numpy(found["scores"]), expected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.from_numpy(found["boxes"]), expected.pred_boxes.tensor, atol=0.01, rtol=0)
    assert found["classes"].tolist() == expected.pred_classes.tolist()


def test_its_runner_needs_neither_detectron2_nor_this_package(written, tmp_path):
    run_alone("pt2", written[0].path, tmp_path)
