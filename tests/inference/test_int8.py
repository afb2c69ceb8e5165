"""Detectors in 8-bit integers: which layers stay as they are, and what a small one gives."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_d2 import cli
from fpn_d2.cli.export import EXAMPLE_INT8
from tests.inference.runners import run_alone
from tests.inference.test_export import CLASSES, SMALLEST, build, config

openvino = pytest.importorskip("openvino")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def test_last_layers_and_what_works_with_boxes_stay_in_float32():
    from openvino import opset13 as op

    from fpn_d2.inference.export.int8 import kept_in_float32

    def conv(x, name: str):
        weight = op.constant(np.ones((2, 2, 1, 1), np.float32))
        return op.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1], name=name)

    image = op.parameter([1, 2, 8, 8], np.float32, name="image")
    first = conv(op.add(image, op.constant(np.float32(1)), name="shift"), "first")
    head = op.relu(conv(first, "head"), name="relu")
    scores, boxes = conv(head, "scores"), conv(head, "boxes")
    best = op.topk(op.reshape(scores, op.constant([-1]), False), op.constant(3), 0, "max", "value", name="best")
    rois = op.multiply(op.reshape(boxes, op.constant([-1, 4]), False), op.constant(np.float32(2)), name="decoded")
    pooled = op.roi_align(first, rois, op.constant(np.zeros(32, np.int64)), 2, 2, 1, 1.0, "avg")
    flat = op.reshape(pooled, op.constant([32, -1]), False, name="flat")
    hidden = op.matmul(flat, op.constant(np.ones((8, 8), np.float32)), False, False, name="hidden")
    last = op.matmul(hidden, op.constant(np.ones((8, 3), np.float32)), False, False, name="last")
    model = openvino.Model([op.softmax(last, 1, name="softmax").output(0), best.output(0)], [image])
    kept = set(kept_in_float32(model))
    assert {"scores", "boxes", "decoded", "best", pooled.get_friendly_name(), "last", "softmax", "relu"} <= kept
    assert not {"shift", "first", "head", "flat", "hidden"} & kept


def test_layers_that_cost_too_much_get_their_float32_back():
    pytest.importorskip("nncf")
    from openvino import opset13 as op

    from fpn_d2.inference.export.int8 import kept_in_float32, layers_in_float32, quantized, quantized_within

    rng = np.random.default_rng(0)
    x = image = op.parameter([1, 4, 8, 8], np.float32, name="images")
    image.output(0).set_names({"images"})
    for scale in (1.0, 1.0, 1.0, 1.0):
        weight = op.constant((scale * rng.standard_normal((4, 4, 3, 3)) / 6).astype(np.float32))
        x = op.relu(op.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1]))
    model = openvino.Model([x.output(0)], [image])
    items = [rng.standard_normal((1, 4, 8, 8)).astype(np.float32) for _ in range(4)]
    core = openvino.Core()
    exact = core.compile_model(model, "CPU", FLOAT32)
    expected = {item.tobytes(): exact(item)[0] for item in items}

    def validate(compiled, some) -> float:
        return 1 - max(float(np.abs(compiled(item)[0] - expected[item.tobytes()]).max()) for item in some)

    kept = kept_in_float32(model)
    all_of_it = quantized(model, items, lambda item: {"images": item}, kept)
    drop = 1 - validate(core.compile_model(all_of_it, "CPU", FLOAT32), items)
    assert layers_in_float32(all_of_it) == (1, 4) and drop > 0
    found = quantized_within(model, items, lambda item: {"images": item}, kept, items, validate, drop / 2)
    assert layers_in_float32(found)[0] > 1
    assert 1 - validate(core.compile_model(found, "CPU", FLOAT32), items) <= drop / 2 + 1e-6


def data_set(folder, images: int) -> None:
    """A COCO set folder.json, folder/ of noise in which the boxes are anywhere."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth: dict = {"images": [], "annotations": []}
    truth["categories"] = [{"id": 7 + n, "name": name} for n, name in enumerate(CLASSES)]
    for number in range(images):
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        noise.resize((90, 70), Image.BICUBIC).save(folder / f"{number}.png")
        truth["images"].append({"id": number, "file_name": f"{number}.png", "width": 90, "height": 70})
        box = {"id": number + 1, "image_id": number, "category_id": 7, "bbox": [5, 5, 60, 50], "area": 3000}
        truth["annotations"].append(box | {"iscrowd": 0})
    folder.with_suffix(".json").write_text(json.dumps(truth))


@pytest.mark.slow
def test_example_of_the_help(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("nncf")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "output" / "my"
    folder.mkdir(parents=True)
    torch.save({"model": build(SMALLEST).state_dict()}, folder / "model_best.pth")
    (folder / "config.yaml").write_text(config(SMALLEST).dump())
    for name in ("train", "val"):
        data_set(tmp_path / "my" / name, 4)
    words = shlex.split(EXAMPLE_INT8)[1:]
    status = cli.main([*words, "--classes", *CLASSES, "--max-drop", "100"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "calibrated on 4 images" in said and "in float32" in said and "in int8" in said
    output = folder / "int8"
    rows = run_alone("openvino", output / "detector.xml", tmp_path, without=("torch", "nncf"))
    assert all(row[1] in CLASSES for row in rows)
    kept, layers = (int(word) for word in said.split("images; ")[1].split(" layers")[0].split(" of "))
    assert 0 < kept < layers / 2


def test_images_to_calibrate_with_have_to_be_named(tmp_path, capsys):
    folder = tmp_path / "my"
    folder.mkdir()
    torch.save({"model": build(SMALLEST).state_dict()}, folder / "weights.pth")
    (folder / "config.yaml").write_text(config(SMALLEST).dump())
    command = ["export", str(folder / "weights.pth"), "--to", "openvino-int8", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "openvino-int8 needs images to find its ranges: --calibrate" in capsys.readouterr().err
    assert cli.main([*command, "--calibrate", "no.json", str(tmp_path)]) == 2
    assert "no annotations no.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
