"""A detector compiled by AOTInductor, and one written for OpenVINO, by the command line and run by their runners."""

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_d2.cli import main
from fpn_d2.errors import UserError
from fpn_d2.inference import load
from fpn_d2.inference.export.nms import nms_mask
from fpn_d2.inference.export.pt2_file import write_aoti
from tests.inference.runners import detector_of, run_alone
from tests.inference.test_export import CLASSES, SMALLEST, build, config


@pytest.mark.slow  # a minute of compiling
@pytest.mark.parametrize("to", ["aoti", "openvino"])
def test_the_command_compares_what_it_wrote_and_its_runner_gives_what_our_predictor_gives(to, tmp_path, capsys):
    if to == "openvino":
        pytest.importorskip("openvino")
        pytest.importorskip("onnxscript")
    torch.save({"model": build(SMALLEST).state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(config(SMALLEST).dump())
    output = tmp_path / "exported"
    command = ["export", str(tmp_path / "weights.pth"), "--to", to, "--output", str(output), "--classes", *CLASSES]
    assert main(command) == 0, capsys.readouterr().out
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0] for row in rows} == {{"aoti": "inductor"}.get(to, to)} and all(row[-1] == "yes" for row in rows)
    path = output / {"aoti": "detector.pt2", "openvino": "detector.xml"}[to]
    words = run_alone(to, path, tmp_path, without=("torch",) if to == "openvino" else ())
    assert words and all(row[1] in CLASSES and len(row) == 7 for row in words)
    detector, predictor = detector_of(to, path), load(tmp_path / "weights.pth", device="cpu", optimize=False)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image = noise.resize((150, 110), Image.BICUBIC)
    (found,), expected = detector([image]), predictor(image)
    assert len(expected) == len(found["scores"]) > 3 and detector.info["classes"] == list(CLASSES)
    torch.testing.assert_close(torch.from_numpy(found["boxes"]), expected.pred_boxes.tensor, atol=0.02, rtol=0)
    assert (found["masks"] != expected.pred_masks.numpy()).mean() < 1e-3


@pytest.mark.slow  # half a minute of compiling
def test_suppression_that_keeps_one_box_or_none_when_compiled(tmp_path):
    class Suppression(torch.nn.Module):
        def forward(self, boxes, scores):
            return nms_mask(boxes, scores, 0.5)

    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 1, 10, 10], [30, 0, 40, 10]]])
    program = torch.export.export(Suppression(), (boxes, torch.ones(1, 1, 3)))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "nms.pt2"))
    compiled = torch._inductor.aoti_load_package(str(tmp_path / "nms.pt2"))
    for scores, kept in (([3, 2, 1], [1, 0, 1]), ([2, 3, 0], [0, 1, 0]), ([0, 0, -1], [0, 0, 0])):
        assert compiled(boxes, torch.tensor([[scores]]).float()).tolist() == [[[bool(k) for k in kept]]]


def test_compiling_without_a_compiler_is_told_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-compiler-of-this-name")
    with pytest.raises(UserError, match="--to aoti compiles C.*no-compiler-of-this-name"):
        write_aoti(None, tmp_path / "detector.pt2", {})
    assert not list(tmp_path.iterdir())
