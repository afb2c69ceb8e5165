"""The whole comparison on small detectors: what it says, what it writes, what it refuses."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from fpn_d2 import cli
from fpn_d2.analysis.compare import figures as compare_figures
from fpn_d2.analysis.compare import memory_worker
from fpn_d2.analysis.compare import run as compare
from fpn_d2.analysis.compare.measure import time_training, torchvision_images, training_call
from fpn_d2.analysis.compare.report import text, write_report
from fpn_d2.analysis.compare.run import Plan, _steps, plain, run_compare
from fpn_d2.analysis.measure.memory import MODES
from fpn_d2.analysis.subjects import build_one, build_pair, random_batch, read_config
from fpn_d2.data.scenes import make_scenes
from fpn_d2.engine import ReportingCheckpointer
from fpn_d2.errors import UserError

from ..small_detectors import STOCK, write

CLASSES = ["MODEL.ROI_HEADS.NUM_CLASSES", "6"]  # of the scenes
QUICK = {"sizes": ((64, 96),), "rounds": 2, "warmup": 0, "memory": False, "opts_b": STOCK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def config(folder):
    return write(folder / "small.yaml")


@pytest.fixture(scope="module")
def result(folder, config):
    """Inference and training on two batch sizes; <b>names</b> that HTML has to escape."""
    plan = Plan(**QUICK, batches=(1, 2), train=True, output=str(folder / "out"))
    return run_compare(config, config, plan, command="fpn-d2 compare '</script><b>'", progress=False)


def test_json_is_the_result(folder, result):
    assert json.loads((folder / "out" / "compare.json").read_text()) == result
    assert not list((folder / "out").glob("*unfinished*"))
    assert list(result) == [
        "schema",
        "command",
        "environment",
        "settings",
        "models",
        "weights",
        "parity",
        "engines",
        "inference",
        "training",
        "memory",
        "ap",
        "published",
        "not_measured",
    ]


def test_what_was_measured(result):
    assert result["parity"]["first_unequal"] is None
    assert [(row["size"], row["batch"]) for row in result["inference"]] == [([64, 96], 1), ([64, 96], 2)]
    for row in [*result["inference"], *result["training"]]:
        assert all(seconds["n"] == 2 and seconds["median"] > 0 for seconds in row["seconds"].values())
        medians = row["seconds"]["B"]["median"] / row["seconds"]["A"]["median"]
        assert row["times_as_fast"]["B"]["ratio_of_medians"] == pytest.approx(medians)
    row = result["inference"][1]
    assert row["images_per_second"]["A"] == pytest.approx(2 / row["seconds"]["A"]["median"])
    assert row["detections_per_image"]["A"] == row["detections_per_image"]["B"] > 0
    a, b = result["models"]
    assert a["parameters"] == b["parameters"] and a["macs"] == b["macs"] and a["macs"]["size"] == [64, 96]


def test_what_was_not_measured_is_said_and_left_empty(result):
    assert result["ap"] == {} and result["memory"] == []
    told = "\n".join(result["not_measured"])
    for part in (
        "the weights are random",
        "real images",
        "AP of A",
        "AP of B",
        "Peak of memory",
        "Published figures of A",
    ):
        assert part in told, part
    assert result["published"]["zoo"]["rows"] == {"A": None, "B": None}
    assert "Training steps" not in told
    assert all(line in text(result) for line in result["not_measured"])


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.images, self.links, self.data = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.images.append(attrs)
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        if self.open and self.open[-1] == "script":
            self.data += data


def test_page_holds_the_figures_and_needs_nothing_else(folder, result):
    page = Page()
    page.feed((folder / "out" / "compare.html").read_text())
    assert page.open == []
    assert json.loads(page.data) == result
    for row in [*result["inference"], *result["training"]]:
        for seconds in row["seconds"].values():
            assert f"{seconds['median'] * 1e3:.1f}" in page.cells
        ratio = f"{row['times_as_fast']['B']['median']:.2f}x ("
        places = [i for i, cell in enumerate(page.cells) if cell.startswith(ratio)]  # others may be equal
        before = 5 if row in result["inference"] else 3
        assert any(page.cells[place - before] == "A" for place in places)  # in whose row it stands
    assert f"{result['models'][0]['macs']['total'] / 1e9:.4g}" in page.cells
    assert "COCO-Detection/retinanet_R_50_FPN_1x" not in page.cells  # the zoo, of which neither config is
    assert len(page.images) == 5
    for image in page.images:
        assert image["alt"] and "<svg" in base64.b64decode(image["src"].split(",", 1)[1]).decode()
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)


def test_times_that_differ_by_much_can_all_be_read():
    def row(size, a, b):
        seconds = {label: {"median": m, "quartiles": [m, m]} for label, m in (("A", a), ("B", b))}
        return {"size": size, "batch": 1, "seconds": seconds}

    svg = ElementTree.fromstring(
        compare_figures._svg(compare_figures._times, [row([8, 9], 0.5, 0.002), row([80, 90], 7, 8)])
    )
    texts = {text.text: text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"8x9, batch 1", "80x90, batch 1", "0.5", "0.002", "7", "8"} <= set(texts)
    assert "fill: #808080" in texts["0.002"].get("style")  # not white on white


def test_terminal_shows_the_same_figures(result):
    shown = text(result)
    assert "Outputs: equal, bit for bit, in every stage" in shown
    for seconds in result["training"][0]["seconds"].values():
        assert f"{seconds['median'] * 1e3:.1f}" in shown


def test_names_that_do_not_match_are_told(config, folder):
    configs = [("x", *read_config(config, opts, "cpu")) for opts in ([], ["MODEL.MASK_ON", "True"])]
    a, b = build_pair(tuple(configs), "")
    assert a.not_loaded == a.not_used == b.not_used == []
    assert b.not_loaded and all(name.startswith("roi_heads.mask_head.") for name in b.not_loaded)
    for name, value in a.network.state_dict().items():
        assert torch.equal(value, b.network.state_dict()[name]), name


def test_checkpoint_goes_into_both(config, folder):
    path, cfg = read_config(config, [], "cpu")
    saved = build_one("A", config, path, cfg, "")
    with torch.no_grad():
        saved.network.backbone.fpn_output2.weight.fill_(0.25)
    ReportingCheckpointer(saved.network, str(folder)).save("saved")
    weights = str(folder / "saved.pth")
    configs = [("x", *read_config(config, opts, "cpu")) for opts in ([], [*STOCK, "MODEL.MASK_ON", "True"])]
    a, b = build_pair(tuple(configs), weights)
    for model in (a, b):
        assert torch.equal(model.network.backbone.fpn_output2.weight, saved.network.backbone.fpn_output2.weight)
    assert a.not_loaded == [] and all(name.startswith("roi_heads.mask_head.") for name in b.not_loaded)

    torch.save({"model": {"something.else": torch.zeros(1)}}, folder / "other.pth")
    with pytest.raises(UserError, match="fills nothing of model A"):
        build_pair(tuple(configs), str(folder / "other.pth"))
    with pytest.raises(UserError, match="no weight file"):
        build_pair(tuple(configs), str(folder / "missing.pth"))


def test_random_weights_leave_the_heads_their_work(folder):
    opts = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
    path, cfg = read_config(write(folder / "frozen.yaml"), opts, "cpu")
    network = build_one("A", path, path, cfg, "").network
    batch = random_batch(cfg, 1, (64, 96))
    with torch.no_grad():
        images = network.preprocess_image(batch)
        maps = network.backbone.bottom_up(images.tensor)
        proposals = network.proposal_generator(images, network.backbone(images.tensor))[0][0]
    assert maps["res5"].std() < 10 * maps["res2"].std()
    assert len(proposals) == 20 and torch.isfinite(proposals.proposal_boxes.tensor).all()


def test_training_step_is_a_whole_step_and_changes_nothing(config):
    path, cfg = read_config(config, [], "cpu")
    network = build_one("A", path, path, cfg, "").network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    call = training_call(cfg, network, random_batch(cfg, 2, (64, 96)))
    assert network.training
    call()
    call()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_timing_of_training_leaves_the_models_as_they_were(config, tmp_path):
    """Batch norms move their statistics in each training step, whatever the learning rate is."""
    opts = ["MODEL.RESNETS.NORM", "BN"]
    pair = build_pair(tuple((label, *read_config(config, opts, "cpu")) for label in "AB"), "")
    before = [{name: value.clone() for name, value in model.network.state_dict().items()} for model in pair]
    row = time_training(pair, (64, 96), 2, 1, 1, lambda: None)
    assert set(row["seconds"]) == {"A", "B"}
    for model, state in zip(pair, before, strict=True):
        assert not model.network.training and model.runner is model.network
        assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
        assert all(p.grad is None for p in model.network.parameters())


def test_numbers_that_are_not_finite_become_null(config, tmp_path):
    """NaN is no JSON: what reads compare.json in a browser or by jq would stop at it."""
    path, cfg = read_config(config, [], "cpu")
    saved = build_one("A", config, path, cfg, "").network
    with torch.no_grad():
        saved.backbone.fpn_output2.weight.fill_(float("nan"))
    torch.save({"model": saved.state_dict()}, tmp_path / "nan.pth")  # our own checkpointer refuses to
    plan = Plan(**QUICK | {"rounds": 1}, weights=str(tmp_path / "nan.pth"), output=str(tmp_path / "out"))
    found = run_compare(config, config, plan, progress=False)

    def refuse(name):
        raise AssertionError(name)

    kept = json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=refuse)
    page = Page()
    page.feed((tmp_path / "out" / "compare.html").read_text())
    assert kept == found == json.loads(page.data, parse_constant=refuse)
    (row,) = [row for row in kept["parity"]["rows"] if row["item"] == "p2"]
    assert row["max_abs"] is row["max_rel"] is None and row["note"] == "not all finite" and not row["within"]
    assert kept["parity"]["first_beyond"] == "pyramid" and "DIFFERS" in page.cells
    values = [1, 1.5, True, "nan", None, float("nan"), float("inf"), (float("-inf"), [2.0])]
    assert plain({"x": values}) == {"x": [1, 1.5, True, "nan", None, None, None, [None, [2.0]]]}


def test_a_number_that_is_not_finite_is_never_written(result, tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_report(result | {"ap": {"A": {"set": {"bbox": {"AP": float("nan")}}}}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def with_data(folder, config):
    scenes = make_scenes(
        folder / "scenes", train=1, val=3, image_size=64, min_size=8, max_objects=3, empty=0.0, seed=3, progress=False
    )
    path, cfg = read_config(config, CLASSES, "cpu")
    ReportingCheckpointer(build_one("A", config, path, cfg, "").network, str(folder)).save("for_data")
    entry = ["compare_scenes", f"{scenes}/annotations/instances_val.json", f"{scenes}/images/val"]
    data = ["DATASETS.COCO_FORMAT", str([entry]), "DATASETS.TEST", "('compare_scenes',)", "INPUT.MIN_SIZE_TEST", "64"]
    # A file that bears the name of one in the zoo, as our twins do.
    twin = folder / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x.yaml"
    twin.parent.mkdir()
    # Six classes without an option: one that changes the model would make it another than the published one.
    twin.write_text(Path(write(twin)).read_text().replace("NUM_CLASSES: 5", "NUM_CLASSES: 6"))
    return str(twin), data, str(folder / "for_data.pth")


def test_data_and_published_figures(folder, config, with_data):
    twin, opts, weights = with_data
    changed = {"opts_b": STOCK + CLASSES, "opts": opts}
    plan = Plan(**QUICK | changed, weights=weights, data=True, output=str(folder / "data"))
    found = run_compare(twin, config, plan, progress=False)
    assert found["parity"]["images"] == "the first 1 of compare_scenes" and found["parity"]["first_unequal"] is None
    assert found["ap"]["A"] == found["ap"]["B"]
    assert 0 <= found["ap"]["A"]["compare_scenes"]["bbox"]["AP"] <= 100
    assert not any("AP of" in line or "real images" in line for line in found["not_measured"])
    assert found["published"]["zoo"]["rows"]["A"]["box_AP"] == 37.9
    assert found["published"]["zoo"]["rows"]["B"] is None
    assert "faster_rcnn_r50_fpn_1x_coco" in found["published"]["mmdetection"]["rows"]
    for part in ("AP in percent, measured here", "37.9", "MODEL_ZOO.md", "metafile.yml"):
        assert part in text(found)


def test_what_makes_figures_of_another_model_is_told(folder, with_data, monkeypatch):
    """B with another neck, which the checkpoint does not fill, and images in another order of colours."""
    twin, opts, weights = with_data

    def broken(model, folder):
        raise RuntimeError("an annotation\nis wrong.")

    monkeypatch.setattr(compare, "measure_ap", broken)
    changed = {"opts_b": ["MODEL.FPN.NECK", "PAFPN", "INPUT.FORMAT", "RGB"], "rounds": 1}
    plan = Plan(**QUICK | changed, opts=opts, weights=weights, data=True, output=str(folder / "changed"))
    found = run_compare(twin, twin, plan, progress=False)
    assert found["parity"]["input_settings"] == {"INPUT.FORMAT": ["BGR", "RGB"]}
    assert found["parity"]["first_beyond"] == "input" and "Input: INPUT.FORMAT is BGR in A, RGB in B" in text(found)
    rows = found["published"]["zoo"]["rows"]
    assert rows["A"]["box_AP"] == 37.9 and rows["B"] is None
    assert "Published figures of B: MODEL.FPN.NECK makes it another model." in found["not_measured"]
    assert found["ap"] == {} and found["inference"]  # the times are there all the same
    assert "AP of A: it ended with RuntimeError: an annotation is wrong." in found["not_measured"]
    (line,) = [line for line in found["not_measured"] if line.startswith("AP of B")]
    assert "for_data.pth has no weights for" in line and "of its tensors, backbone." in line


def test_torchvision_as_a_third_column(folder, config, monkeypatch):
    built = []
    real = compare.torchvision_detector
    monkeypatch.setattr(compare, "torchvision_detector", lambda device: built.append(real(device)) or built[0])
    plan = Plan(**QUICK | {"rounds": 1}, torchvision=True, train=True, output=str(folder / "torchvision"))
    found = run_compare(config, config, plan, progress=False)
    assert found["inference"][0]["seconds"]["torchvision"]["median"] > 0
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in built[0].modules())  # frozen, as published
    assert list(found["training"][0]["seconds"]) == ["A", "B"]
    assert any("memory of torchvision's" in line for line in found["not_measured"])


def test_torchvision_gets_the_images_as_they_are(config):
    batch = random_batch(read_config(config, [], "cpu")[1], 2, (8, 9))
    images = torchvision_images(batch, torch.device("cpu"))
    assert [image.dtype for image in images] == [torch.float32] * 2
    assert all(
        torch.equal((image * 255).round().byte(), item["image"]) for image, item in zip(images, batch, strict=True)
    )


def test_data_that_are_not_there(folder, config, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder / "nowhere"))
    opts = ["DATASETS.TEST", "('coco_2017_val',)", "MODEL.ROI_HEADS.NUM_CLASSES", "80"]
    plan = Plan(**QUICK, opts=opts, data=True, output=str(folder / "no_data"))
    found = run_compare(config, config, plan, progress=False)
    assert found["ap"] == {} and "noise" in found["parity"]["images"]
    lines = [line for line in found["not_measured"] if "coco_2017_val" in line]
    assert [line.split(":")[0] for line in lines] == ["Parity on real images", "AP of A", "AP of B"]


def test_optimized_for_inference(folder, config):
    plan = Plan(**QUICK, optimize="a", dtype="bfloat16", output=str(folder / "optimized"))
    found = run_compare(config, config, plan, progress=False)
    assert [model["optimized"] for model in found["models"]] == [True, False]
    assert found["parity"]["first_beyond"] is not None  # bfloat16 has 8 bits
    assert found["models"][0]["macs"] == found["models"][1]["macs"]
    assert "optimised for inference in bfloat16" in text(found)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
        ({"sizes": ((0, 64),)}, "expected positive numbers"),
        ({"batches": ()}, "expected positive numbers"),
        ({"optimize": "c"}, "optimize is 'c'; expected one of none, a, b, both"),
        ({"dtype": "int8", "optimize": "a"}, "dtype is 'int8'"),
        ({"dtype": "bfloat16"}, "say which with optimize"),
        ({"engines": ("openvino", "tensorrt")}, "there is no engine 'tensorrt'; expected one of onnxruntime"),
        ({"engines": ("openvino",), "torchvision": True}, "engines are compared on a CPU, without torchvision's"),
    ],
)
def test_a_plan_that_cannot_be(config, tmp_path, changed, words):
    with pytest.raises(UserError, match=words):
        run_compare(config, config, Plan(**(QUICK | changed), output=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(config):
    with pytest.raises(UserError, match="there is no GPU"):
        run_compare(config, config, Plan(**QUICK, device="cuda"))


@pytest.mark.parametrize("train", [False, True])
def test_each_peak_of_memory_is_asked_for_and_kept(config, tmp_path, monkeypatch, train):
    asked = []

    def peak_memory(model, mode, size, number, opts, weights, optimize):
        asked.append((model.label, mode, size, number, opts, weights, optimize))
        return {"mb": float(len(asked))} if model.label == "A" else {"missing": "it said nothing"}

    monkeypatch.setattr(compare, "peak_memory", peak_memory)
    changed = {"memory": True, "rounds": 1, "batches": (1, 2), "optimize": "b", "train": train}
    plan = Plan(**QUICK | changed, output=str(tmp_path))
    found = run_compare(config, config, plan, progress=False)
    modes = ["inference", "training"][: 1 + train]
    expected = [
        (label, mode, (64, 96), batch, STOCK if label == "B" else [], "", "float32" if label == "B" else "")
        for batch in (1, 2) for mode in modes for label in "AB"
    ]  # fmt: skip
    assert asked == expected
    assert [(row["size"], row["batch"]) for row in found["memory"]] == [([64, 96], 1), ([64, 96], 2)]
    assert found["memory"][0]["inference"] == {"A": 1.0, "B": None}
    assert ("training" in found["memory"][1]) == train
    assert "Peak of memory, inference, B, 64x96: it said nothing." in found["not_measured"]


def test_progress_comes_to_its_end(config, tmp_path, monkeypatch):
    counted = []

    class Bar(tqdm):
        def update(self, n=1):
            counted.append(n)
            return super().update(n)

    monkeypatch.setattr(compare, "tqdm", Bar)
    monkeypatch.setattr(compare, "peak_memory", lambda *arguments: {"mb": 1.0})
    plan = Plan(**QUICK | {"memory": True, "warmup": 1, "train": True, "batches": (1, 2)}, output=str(tmp_path))
    run_compare(config, config, plan, progress=False)
    assert sum(counted) == _steps(plan)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimize", ["", "bfloat16"])
def test_process_for_memory_builds_what_it_is_told(config, folder, monkeypatch, mode, optimize):
    """`python -m fpn_d2.analysis.compare.memory_worker` without the process and the figure."""
    task = {"config": config, "opts": STOCK, "weights": "", "mode": mode, "size": [64, 96], "batch": 2}
    made, called = [], []

    def note(name, make):
        def noted(*arguments):
            made.append((name, arguments))
            return lambda: called.append(make(*arguments)())

        return noted

    for name in ("training_call", "inference_call"):
        monkeypatch.setattr(memory_worker, name, note(name, getattr(memory_worker, name)))
    monkeypatch.setattr(memory_worker, "raised_peak", lambda call: call() and 7.5)
    threads = torch.get_num_threads()
    try:
        assert memory_worker.measure(task | {"threads": threads, "optimize": optimize}) == 7.5
    finally:
        torch.set_num_threads(threads)
    ((name, arguments),) = made
    assert name == f"{mode}_call" and len(called) == 2  # the first makes room that the second uses again
    network, batch = arguments[-2:]
    assert type(network.roi_heads).__name__ == "StandardROIHeads"
    assert [tuple(item["image"].shape) for item in batch] == [(3, 64, 96)] * 2
    dtype = torch.bfloat16 if optimize and mode == "inference" else torch.float32
    assert network.roi_heads.box_head.fc1.weight.dtype == dtype


@pytest.mark.slow
def test_memory_in_a_process_of_its_own(config, folder):
    plan = Plan(**(QUICK | {"memory": True}), train=True, output=str(folder / "memory"))
    found = run_compare(config, config, plan, progress=False)
    (row,) = found["memory"]
    for label in "AB":
        # Gradients and momentum of 11 million parameters are 85 MB of the training step.
        assert 80 < row["training"][label] < 400
        assert 1 < row["inference"][label] < row["training"][label]


def test_two_architectures_have_no_table_of_differences(config, folder):
    plan = Plan(**QUICK | {"opts_b": ["MODEL.FPN.NECK", "PAFPN"], "rounds": 1}, output=str(folder / "two"))
    found = run_compare(config, config, plan, progress=False)
    shown = text(found) + (folder / "two" / "compare.html").read_text()
    assert "Outputs: not compared, since A and B are two models" in shown and "from the stage pyramid on" in shown
    assert "DIFFERS" not in shown.replace(".differs", "") and "Outputs, stage by stage" not in shown
    assert "times as fast as B" in shown and "Detectron2's model zoo, as published" not in shown


def test_nothing_is_registered_or_written_unless_asked_for(config, tmp_path, with_data):
    """The number of classes is the checkpoint's then, where the configuration leaves it to the data."""
    _, opts, weights = with_data
    own = tmp_path / "own.yaml"
    own.write_text(Path(config).read_text().replace("NUM_CLASSES: 5", ""))
    known = DatasetCatalog.list()
    opts = [part.replace("compare_scenes", "never_registered") for part in opts]
    opts += ["OUTPUT_DIR", str(tmp_path / "data")]
    model = torch.load(weights, weights_only=True)["model"]
    held = {"fpn_d2": {"format": 1, "classes": {"thing_classes": list("abcdef")}}}
    torch.save({"model": model, **held}, tmp_path / "own.pth")
    changed = {"opts_b": [], "opts": opts, "weights": str(tmp_path / "own.pth"), "output": str(tmp_path / "out")}
    found = run_compare(str(own), str(own), Plan(**QUICK | changed), progress=False)
    assert found["weights"]["unmatched"]["A"] == {"not_loaded": [], "not_used": []}  # six classes, not 80
    assert DatasetCatalog.list() == known and not (tmp_path / "data").exists()


def test_command_line_tells_a_mistake_in_one_line(config, capsys):
    assert cli.main(["compare", config, "COCO-Detection/no_such"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: no configuration file COCO-Detection/no_such") and told.count("\n") == 1


def test_command_line_does_what_it_says(config, folder, capsys):
    arguments = ["compare", config, config, "--sizes", "64x96", "--rounds", "1", "--warmup", "0", "--no-memory"]
    output = folder / "command"
    assert cli.main([*arguments, "--output", str(output), "--batch", "2", "--opts-b", *STOCK]) == 0
    kept = json.loads((output / "compare.json").read_text())
    assert kept["command"] == " ".join(["fpn-d2", *arguments, "--output", str(output), "--batch 2 --opts-b", *STOCK])
    assert kept["models"][1]["opts"] == STOCK and kept["models"][0]["opts"] == []
    assert [(row["size"], row["batch"]) for row in kept["inference"]] == [([64, 96], 2)]
    assert str(output / "compare.html") in capsys.readouterr().out
