"""A detector written as ONNX by the command line, run without Detectron2, against the model it was made from."""

import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_d2.analysis.exported import all_within, check_exported, random_batches, text
from fpn_d2.cli import main
from fpn_d2.cli.export import EXAMPLE
from fpn_d2.inference import Predictor, load
from fpn_d2.inference.export import export_detector
from tests.inference.runners import detector_of, run_alone
from tests.inference.test_export import CLASSES, SMALLEST, build, config

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow  # half a minute of tracing


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with model_best.pth, config.yaml, and in exported/ what the example wrote; and what it printed."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "output" / "my").mkdir(parents=True)
    torch.save({"model": build(SMALLEST).state_dict()}, folder / "output" / "my" / "model_best.pth")
    (folder / "output" / "my" / "config.yaml").write_text(config(SMALLEST).dump())
    command = [*shlex.split(EXAMPLE)[1:], "--classes", *CLASSES]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        status = main(command)
    return folder / "output" / "my", status, "\n".join(printed)


@pytest.fixture(scope="module")
def detector(written):
    return detector_of("onnx", written[0] / "exported" / "detector.onnx")


def test_the_command_compares_every_stage_and_finds_no_difference(written):
    _, status, printed = written
    assert status == 0, printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("onnxruntime")]
    assert {"input", "pyramid", "proposals", "detections", "masks"} <= {word for row in rows for word in row}
    assert all(row[-1] == "yes" for row in rows) and len(rows) == 4 * 7
    assert "nothing there" not in printed


def test_the_file_holds_standard_operators_and_what_its_user_has_to_know(written, detector):
    model = onnx.load(written[0] / "exported" / "detector.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert {"NonMaxSuppression", "RoiAlign", "TopK"} <= {node.op_type for node in model.graph.node}
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "classes", "counts", "masks"]
    assert detector.info["classes"] == list(CLASSES) and detector.info["channels"] == "BGR"
    assert (detector.info["short_side"], detector.info["long_side"]) == (96, 128)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_its_runner_gives_what_our_predictor_gives(written, detector):
    predictor = load(written[0] / "model_best.pth", device="cpu", optimize=False)
    generator = np.random.default_rng(0)
    images = []
    for size in ((150, 110), (64, 200)):
        noise = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        images.append(noise.resize(size, Image.BICUBIC))
    for image in images:
        (found,), expected = detector([image]), predictor(image)
        assert len(expected) == len(found["scores"]) > 3
        torch.testing.assert_close(torch.from_numpy(found["scores"]), expected.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.from_numpy(found["boxes"]), expected.pred_boxes.tensor, atol=0.02, rtol=0)
        assert found["classes"].tolist() == expected.pred_classes.tolist()
        assert found["masks"].shape == expected.pred_masks.shape and expected.pred_masks.any()
        assert (found["masks"] != expected.pred_masks.numpy()).mean() < 1e-3
    together = list(detector(images))
    assert [tuple(found["boxes"].shape) for found in together] == [(len(found["scores"]), 4) for found in together]
    for found, (width, height) in zip(together, ((150, 110), (64, 200)), strict=True):
        assert found["boxes"][:, 2].max() <= width + 0.01 and found["boxes"][:, 3].max() <= height + 0.01
        assert found["boxes"][:, 2].max() > width / 2 and found["boxes"][:, 3].max() > height / 2


def test_its_runner_needs_neither_detectron2_nor_this_package_nor_torch(written, tmp_path):
    words = run_alone("onnx", written[0] / "exported" / "detector.onnx", tmp_path, without=("torch",))
    assert words and all(row[1] in CLASSES and len(row) == 7 for row in words)


def test_keypoints_are_the_models_in_every_engine(tmp_path):
    options = SMALLEST | {"MODEL.MASK_ON": False, "MODEL.KEYPOINT_ON": True}
    model, batches = build(options), random_batches(96, 128)[:2]
    exported = export_detector(Predictor(model, config(options), class_names=CLASSES), tmp_path)
    found = check_exported(exported, model, batches)
    assert "onnxruntime" in found and all_within(found), text(found, batches)
    for differences in found.values():
        assert {"detections", "keypoints"} <= {one.stage for batch in differences for one in batch}
