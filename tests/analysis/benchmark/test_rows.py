"""Lines and rows of the benchmarks, at tiny size: what is timed gave Detectron2's results."""

import os

import pytest
import torch

from fpn_d2.analysis.benchmark import data as benchmark_data
from fpn_d2.analysis.benchmark import detector as benchmark_detector
from fpn_d2.analysis.benchmark import line as benchmark_line
from fpn_d2.analysis.benchmark import parts as benchmark_parts
from fpn_d2.analysis.benchmark.line import Check, Ours, Timing, Work, equal_check, line, map_check, time_lines
from fpn_d2.analysis.measure import peak
from fpn_d2.data import enlarge
from fpn_d2.fast.roi_align.roi_align import VARIABLE
from fpn_d2.modeling.rpn import FPNRPN

from ..small_detectors import write

ONCE = Timing(rounds=1, warmup=0)
FAST = ["MODEL.NUMERICS", "fast", "MODEL.PROPOSAL_GENERATOR.NAME", "FPNRPN"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write(tmp_path_factory.mktemp("benchmarks") / "small.yaml")


def same(one):
    """Whether a line was measured, on results that are the same."""
    return "not_measured" not in one and one["checks"] and all(check["within"] for check in one["checks"])


# ---- Lines -----------------------------------------------------------------------------------------------------------


def test_a_line_has_the_ratios_of_pairs():
    one = line("fast", [0.4, 0.9, 0.6], [0.2, 0.3, 0.3], "s")
    assert one["ratio"] == {"median": 2.0, "quartiles": [2.0, 2.5], "n": 3, "of_medians": pytest.approx(2.0)}
    assert one["theirs"]["median"] == 0.6 and one["own"]["median"] == 0.3
    memory = line("fast", [200.0], [150.0], "MB")
    assert memory["ratio"]["median"] == memory["ratio"]["of_medians"] == 0.75


def test_what_is_not_equal_or_cannot_be_measured_is_not_timed():
    calls = []
    good, bad = Check("maps", 0.0, 1.0, "px", True), Check("boxes", 3.0, 1.0, "px", False)
    ours = {
        "far": Ours(lambda: calls.append("far"), [good, bad]),
        "missing": "there is no compiler",
        "near": Ours(lambda: calls.append("near"), [good], "a note"),
    }
    steps = []
    timing = Timing(2, 1, lambda done, total: steps.append((done, total)))
    far, missing, near = time_lines(lambda: calls.append("stock"), ours, timing)
    assert far["not_measured"] == "the results differ: boxes 3 px (1 is allowed)" and len(far["checks"]) == 2
    assert missing == {"ours": "missing", "not_measured": "there is no compiler"}
    assert calls == ["stock", "near"] * 3 and steps == [(n, 6) for n in range(1, 7)]
    assert near["ratio"]["n"] == 2 and near["note"] == "a note" and same(near)


def test_nothing_is_timed_where_nothing_can_be():
    def stock():
        raise AssertionError("nobody to compare with")

    assert time_lines(stock, {"missing": "why"}, ONCE) == [{"ours": "missing", "not_measured": "why"}]


def test_map_check_takes_the_worst_map_by_its_own_scale():
    theirs = [torch.tensor([100.0, 50.0]), torch.tensor([1.0, -2.0])]
    check = map_check("maps", theirs, [theirs[0] + 1, theirs[1] + torch.tensor([0.0, 0.1])], 0.04)
    assert check.difference == pytest.approx(0.05) and not check.within
    assert map_check("maps", theirs, [theirs[0] + 1, theirs[1]], 0.04).within
    assert not map_check("maps", theirs, [theirs[0] * float("nan"), theirs[1]], 0.04).within
    with pytest.raises(ValueError, match="maps: Detectron2's have the shapes"):
        map_check("maps", theirs, theirs[:1], 0.04)


def test_equal_check_is_of_values():
    boxes = torch.ones(2, 4)
    assert equal_check("boxes", boxes, boxes.clone(), "px").within
    near = equal_check("boxes", boxes, boxes + 1e-6, "px")
    assert not near.within and near.difference == pytest.approx(1e-6, rel=0.1)
    assert not equal_check("boxes", boxes, boxes[:1], "px").within


# ---- Rows at tiny size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_pooling(backward, monkeypatch):
    used, real = [], benchmark_parts.PyramidROIPooler.forward

    def spy(self, *args):
        used.append(os.environ.get(VARIABLE))
        return real(self, *args)

    monkeypatch.setattr(benchmark_parts.PyramidROIPooler, "forward", spy)
    monkeypatch.setenv(VARIABLE, "torchvision")
    names = ("torch", "torchvision")
    lines = benchmark_parts.pooling(ONCE, rois=24, backward=backward, size=(64, 96), channels=6, implementations=names)
    assert [one["ours"] for one in lines] == list(names) and all(map(same, lines))
    assert used == ["torch", "torchvision"] * 2 and os.environ[VARIABLE] == "torchvision"
    what = ["pooled", "gradients"] if backward else ["pooled"]
    assert [check["what"] for check in lines[0]["checks"]] == what
    assert sum(map(int, lines[0]["note"].split(": ")[1].split(", "))) == 24


def test_pooling_without_a_compiler_says_so(monkeypatch):
    def choose(name, maps):
        if name == "compiled":
            raise RuntimeError("it could not be built")
        return name

    monkeypatch.setattr(benchmark_parts, "choose", choose)
    pure, compiled = benchmark_parts.pooling(ONCE, rois=5, size=(64, 64), channels=3)
    assert same(pure) and compiled == {"ours": "compiled", "not_measured": "it could not be built"}


def test_pooling_that_is_wrong_is_not_timed(monkeypatch):
    real = benchmark_parts.PyramidROIPooler.forward
    monkeypatch.setattr(benchmark_parts.PyramidROIPooler, "forward", lambda self, *args: real(self, *args) * 1.001)
    (one,) = benchmark_parts.pooling(ONCE, rois=5, size=(64, 64), channels=3, implementations=["torch"])
    assert one["not_measured"].startswith("the results differ: pooled 0.001")

    def other_gradient(self, *args):
        pooled = real(self, *args)
        return pooled + 0.001 * (pooled - pooled.detach())

    monkeypatch.setattr(benchmark_parts.PyramidROIPooler, "forward", other_gradient)
    size = {"size": (64, 64), "channels": 3, "implementations": ["torch"]}
    (one,) = benchmark_parts.pooling(ONCE, rois=5, backward=True, **size)
    assert one["not_measured"].startswith("the results differ: gradients 0.001")


def test_proposal_like_boxes_lie_in_the_image_and_reach_every_level():
    boxes = benchmark_parts.proposal_like(1000, (800, 1088), torch.Generator().manual_seed(0))
    assert boxes.min() >= 0 and (boxes[:, 2] <= 1088).all() and (boxes[:, 3] <= 800).all()
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    limits = (16, 112, 224, 448, 1000)
    shares = [int(((sides >= low) & (sides < high)).sum()) for low, high in zip(limits, limits[1:], strict=False)]
    assert sum(shares) == 1000 and shares[0] > 300 and min(shares) > 100
    levels = benchmark_parts._shares(benchmark_parts.Boxes(boxes))
    assert levels.endswith(", ".join(map(str, shares)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neck(dtype, config):
    (one,) = benchmark_parts.neck(ONCE, dtype=dtype, size=(64, 96), config=config, opts=FAST)
    assert same(one) and dtype in one["ours"]
    assert (one["checks"][0]["difference"] > 1e-4) == (dtype == "bfloat16")


def test_proposals(config, monkeypatch):
    (one,) = benchmark_parts.proposals(ONCE, size=(50, 90), config=config, opts=FAST)
    assert (
        same(one)
        and one["ours"] == "FPNRPN"
        and one["note"] == f"20 kept of {3 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)} anchors"
    )
    real = FPNRPN.predict_proposals

    def off(self, *args):
        found = real(self, *args)
        found[0].proposal_boxes.tensor[3, 1] += 1e-4
        return found

    monkeypatch.setattr(FPNRPN, "predict_proposals", off)
    (one,) = benchmark_parts.proposals(ONCE, size=(50, 90), config=config, opts=FAST)
    assert one["not_measured"].startswith("the results differ: boxes")


def test_inference(config):
    built, optimised = benchmark_detector.inference(ONCE, size=(64, 96), config=config, opts=FAST)
    assert built["ours"] == "as built" and optimised["ours"] == "optimised, float32"
    for one in (built, optimised):
        assert same(one) and [check["what"] for check in one["checks"]] == [
            "pyramid",
            "proposals",
            "detections",
            "scores",
        ]
        assert "20 proposals, 10 detections, pooling " in one["note"]
    (one,) = benchmark_detector.inference(ONCE, size=(64, 96), dtype="bfloat16", config=config, opts=FAST)
    assert same(one) and one["ours"] == "optimised, bfloat16" and len(one["checks"]) == 1


def test_inference_of_a_detector_with_other_results_is_not_timed(config, monkeypatch):
    real = benchmark_detector.optimized

    def off(network, dtype):
        network = real(network, dtype)
        network.roi_heads.box_predictor.cls_score.bias.data[0] += 0.1
        return network

    monkeypatch.setattr(benchmark_detector, "optimized", off)
    built, optimised = benchmark_detector.inference(ONCE, size=(64, 96), config=config, opts=FAST)
    assert same(built) and "scores" in optimised["not_measured"] and "pyramid" not in optimised["not_measured"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training(dtype, config):
    (one,) = benchmark_detector.training(ONCE, dtype=dtype, size=(64, 96), config=config, opts=FAST)
    assert same(one) and one["ours"] == dtype
    assert all((check["difference"] > 1e-4) == (dtype == "bfloat16") for check in one["checks"])


def test_training_that_learns_something_else_is_not_timed(config, monkeypatch):
    real = benchmark_detector.build_twins

    def off(*args):
        stock, own = real(*args)
        own.network.roi_heads.box_predictor.loss_weight["loss_box_reg"] = 1.1
        return stock, own

    monkeypatch.setattr(benchmark_detector, "build_twins", off)
    (one,) = benchmark_detector.training(ONCE, dtype="float32", size=(64, 96), config=config, opts=FAST)
    assert "losses 0.1 of each" in one["not_measured"] and "gradients" in one["not_measured"]


def test_a_step_that_is_checked_leaves_the_detector_as_it_was(config):
    _, own = benchmark_detector.build_twins(config, FAST)
    images = benchmark_detector.random_batch(own.cfg, 1, (64, 96))
    losses, gradients = benchmark_detector._step(own.cfg, own.network, images)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} and gradients
    assert (
        own.network.roi_heads.batch_size_per_image == 16 and own.network.proposal_generator.batch_size_per_image == 256
    )
    assert all(one.grad is None for one in own.network.parameters())


def test_training_memory(config, monkeypatch):
    asked = []

    def peak(worker, task):
        asked.append(task["opts"])
        huge_pages = task["variables"] == {"THP_MEM_ALLOC_ENABLE": "1"}
        return "it ran out" if "True" in task["opts"] else 100.0 - 2 * huge_pages - ("RPN" not in task["opts"])

    monkeypatch.setattr(benchmark_detector, "peak_in_child", peak)
    monkeypatch.setattr(benchmark_detector, "_has", lambda cfg, key: False)
    pages, full, half, *checkpointed = benchmark_detector.training_memory(Timing(2, 0), config=config, opts=FAST)
    assert pages["ratio"]["median"] == 0.98
    assert full["ratio"]["median"] == 0.97 and full["ratio"]["n"] == 2 and full["unit"] == "MB"
    assert half == {"ours": "bfloat16", "not_measured": "it ran out"}
    assert all("no gradient checkpointing" in one["not_measured"] for one in checkpointed)
    assert len(asked) == 8 and all(opts[-2:] == ["MODEL.DEVICE", "cpu"] for opts in asked)
    assert (
        asked[0][: len(FAST)] == FAST and "StandardROIHeads" in asked[0] and asked[2] == [*FAST, "MODEL.DEVICE", "cpu"]
    )
    monkeypatch.setattr(benchmark_detector, "_has", lambda cfg, key: True)
    asked.clear()
    benchmark_detector.training_memory(ONCE, config=config, opts=FAST)
    assert sum(benchmark_detector.CHECKPOINTING in opts for opts in asked) == 2


def test_training_memory_needs_detectron2s(config, monkeypatch):
    monkeypatch.setattr(benchmark_detector, "peak_in_child", lambda worker, task: "it ran out")
    with pytest.raises(ValueError, match="Detectron2's detector: it ran out"):
        benchmark_detector.training_memory(ONCE, config=config)


def test_loading(config):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        lines = benchmark_data.loading(ONCE, images=3, size=(60, 80), short_side=96, config=config)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert [one["ours"] for one in lines] == ["MODEL.NUMERICS fast", "MODEL.NUMERICS exact"] and all(map(same, lines))
    assert [check["allowed"] for check in lines[1]["checks"]] == [0, 0]
    assert [check["allowed"] for check in lines[0]["checks"]] == [0 if enlarge.library() else 1, 1e-3]
    assert lines[0]["note"].startswith("3 images of ")


@pytest.mark.parametrize("what", ["images", "boxes"])
def test_loading_that_gives_something_else_is_not_timed(what, config, monkeypatch):
    real = benchmark_data.TrainingMapper.__call__

    def off(self, record):
        found = real(self, record)
        if what == "images":
            found["image"] = (found["image"].int() + 2).clamp(max=255).to(torch.uint8)
        else:
            found["instances"].gt_boxes.tensor[-1, 2] += 0.01
        return found

    monkeypatch.setattr(benchmark_data.TrainingMapper, "__call__", off)
    lines = benchmark_data.loading(ONCE, images=1, size=(60, 80), short_side=96, config=config)
    assert all(one["not_measured"].startswith(f"the results differ: {what} ") for one in lines)


def test_evaluation(monkeypatch):
    pytest.importorskip("faster_coco_eval")
    lines = benchmark_data.evaluation(ONCE, images=6, classes=3, detections=12)
    assert [one["against"] for one in lines] == ["pycocotools", "Detectron2's extension"]
    assert same(lines[0]) and lines[0]["note"] == "6 images, 72 detections"
    there = benchmark_data.coco_evaluation.COCOeval_opt is not benchmark_data.coco_evaluation.COCOeval
    assert same(lines[1]) if there else "built without" in lines[1]["not_measured"]
    real = benchmark_data.FastCOCOEvaluator.evaluate

    def off(self):
        found = real(self)
        found["bbox"]["AP"] += 1e-3
        return found

    monkeypatch.setattr(benchmark_data.FastCOCOEvaluator, "evaluate", off)
    with pytest.raises(ValueError, match="give other figures: figures 0.001 points"):
        benchmark_data.evaluation(ONCE, images=2, classes=2, detections=5)
    monkeypatch.setattr(benchmark_data, "fast_evaluation_is_there", lambda: False)
    (one,) = benchmark_data.evaluation(ONCE)
    assert "not installed" in one["not_measured"]


def test_shares_of_the_peak(monkeypatch):
    """A billion multiply-adds in half a second, and in a quarter, on a machine that does four and eight a second."""
    peaks = {torch.float32: 4e9, torch.bfloat16: 8e9}
    monkeypatch.setattr(benchmark_line, "matrix_peak", peaks.get)
    found = {"theirs": {"median": 0.5}, "own": {"median": 0.25}}
    assert Work(10**9).shares(found) == {"theirs": 0.5, "own": 1.0}
    assert Work(10**9, torch.bfloat16).shares(found) == {"theirs": 0.5, "own": 0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_a_product(dtype, monkeypatch):
    monkeypatch.setattr(peak, "_SIDE", 64)
    ticks = iter([0.0, 2.0, 2.0, 3.0, 3.0, 7.0])  # seconds: 2, 1 and 4
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(ticks))
    assert peak.matrix_peak(dtype, rounds=3) == 64**3
