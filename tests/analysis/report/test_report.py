"""The page about a run: what it says, what it says of what is missing, and that it stands alone."""

import html
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from detectron2.utils.collect_env import collect_env_info
from PIL import Image

from fpn_d2 import cli
from fpn_d2.analysis.report.build import report_run
from fpn_d2.analysis.report.figures import curves, themed_svg
from fpn_d2.analysis.report.run_folder import Run, read_run
from fpn_d2.cli.report import EXAMPLE
from fpn_d2.errors import UserError
from tests.chromium import Page, needs_chromium
from tests.engine.small import TEST, small_config

_STRANGE = '<script>alert("1")</script>'


@pytest.fixture
def run(tmp_path, scenes):
    """A folder as a run leaves it: 40 iterations in two parts, the second of them resumed, and two evaluations."""
    cfg = small_config(tmp_path / "made", scenes, "MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", 0.0123)
    folder = tmp_path / "output" / "my"
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    records = [{"iteration": i, "total_loss": 3 - i / 40, "loss_cls": 1.0, "lr": 0.01, "time": 0.5} for i in range(30)]
    records += [{"iteration": i, "total_loss": 2 - i / 40, "loss_cls": 0.5, "lr": 0.01} for i in range(20, 40)]
    records[25]["total_loss"] = float("nan")
    records += [{"iteration": 20, "bbox/AP": 11.25, "bbox/AP50": 20.0}]
    classes = {"bbox/AP-star": 7.5, "bbox/AP-ring": float("nan")}
    records += [{"iteration": 40, "bbox/AP": 10.5, "bbox/AP50": 30.75, **classes}]
    (folder / "metrics.json").write_text("".join(json.dumps(one) + "\n" for one in records) + '{"cut')
    log = f"[11/21 16:32:28] detectron2 INFO: Environment info:\n{collect_env_info()}\n"
    log += f"[11/21 16:32:28] detectron2 INFO: Command line arguments: Namespace(config_file='{_STRANGE}')\n"
    (folder / "log.txt").write_text(log.replace("PyTorch ", "OldTorch ") + log)
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    found = [{**one, "score": 0.9} for one in truth["annotations"][1:]]
    found.append({**found[0], "bbox": [0, 0, 9, 9], "score": 0.6})
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    (folder / "model_best.pth").write_bytes(b"1" * 3 * 2**20)
    return folder


class _Checker(HTMLParser):
    """Keeps what is open, and what the page would fetch."""

    _VOID = ("meta", "img", "link", "br", "input")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self._VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:image/")):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def part(text: str, title: str) -> str:
    """The section of a page with this title."""
    return re.search(rf"<section[^>]*><h2>{title}</h2>(.*?)</section>", text, re.DOTALL)[1]


def test_the_example_in_help_runs(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert cli.main(shlex.split(EXAMPLE)[1:]) == 0
    assert capsys.readouterr().out == "output/my.html\n"
    text = (run.parent / "my.html").read_text()
    checker = _Checker()
    checker.feed(text)
    assert checker.open == [] and checker.fetched == [] and "script" not in checker.tags
    assert "Not shown" not in text and _STRANGE not in text and html.escape(_STRANGE) in text
    for words in ("10.5", "30.8", "best bbox/AP, iteration 20", "11.2"):
        assert words in text[: text.index("<main>")]
    assert "did not reach its end" in part(text, "Remarks")
    assert part(text, "Curves").count("<svg") == 5  # without those of which there is one point, or none
    assert re.search(r"star</td><td>7.5</td></tr>\s*<tr><td>ring</td><td></td>", part(text, "Average precision"))
    assert "p5" in part(text, "Levels") and "<svg" in part(text, "Levels")
    assert "localisation" in part(text, "Errors") and part(text, "Errors").count("<img") >= 1
    assert part(text, "Gallery").count("<img") == 3
    assert "SOLVER.BASE_LR</td><td>0.0123</td><td>0.001<" in part(text, "Configuration")
    assert "BBOX_REG_WEIGHTS" not in part(text, "Configuration").split("<details>")[0]  # a tuple, or a list
    environment = part(text, "Environment")
    assert ">PyTorch<" in environment and "OldTorch" not in environment and "3 MB" in environment


def test_what_is_recorded_last_counts(run):
    found = read_run(str(run))
    iterations, loss = found.series("total_loss")["total_loss"]
    assert iterations.tolist() == list(range(40))
    np.testing.assert_allclose(loss, [3 - i / 40 for i in range(20)] + [2 - i / 40 for i in range(20, 40)])
    assert found.series("nothing") == {} and found.dataset == TEST and found.missing == {}
    assert found.checkpoints == [("model_best.pth", 3 * 2**20)]


@pytest.mark.parametrize(
    ("name", "part_of_run", "words"),
    [
        ("config.yaml", "config", "config.yaml is not in the folder"),
        ("config.yaml", "detections", "name it"),
        ("metrics.json", "metrics", "metrics.json is not in the folder"),
        ("log.txt", "log", "log.txt is not in the folder"),
        ("inference/coco_instances_results.json", "detections", "the run was not evaluated"),
    ],
)
def test_what_is_missing_is_known(run, name, part_of_run, words):
    (run / name).unlink()
    assert words in read_run(str(run)).missing[part_of_run]


def test_a_page_of_next_to_nothing_says_so(run):
    for name in ("config.yaml", "metrics.json", "inference/coco_instances_results.json"):
        (run / name).unlink()
    text = open(report_run(str(run))).read()
    for title in ("Remarks", "Curves", "Average precision", "Levels", "Errors", "Gallery", "Configuration"):
        assert re.search("Not shown: (metrics.json|inference|config.yaml).* is not in the folder", part(text, title))
    assert "Not shown" not in part(text, "Environment")


def test_data_that_have_moved_are_named(run, scenes):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(scenes), "/gone"))
    assert "looked for /gone/annotations/instances_val.json" in read_run(str(run)).missing["detections"]
    own = str(scenes / "annotations" / "instances_val.json")
    found = read_run(str(run), annotations=own)
    assert len(found.scored.files) == 3 and "/gone/images/val" in found.missing["images"]
    assert "/gone/images/val" in part(open(report_run(str(run), annotations=own)).read(), "Gallery")
    (run / "config.yaml").unlink()
    found = read_run(str(run), annotations=own, images=str(scenes / "images" / "val"))
    assert len(found.scored.files) == 3 and found.images == str(scenes / "images" / "val")
    # The copy that was made of data with defects is what was evaluated on.
    (run / "config.yaml").write_text(config)
    (run / "data_sets").mkdir()
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    (run / "data_sets" / f"{TEST}.json").write_text(json.dumps({**truth, "annotations": truth["annotations"][:2]}))
    assert len(read_run(str(run)).scored.truth) == 2


def test_broken_parts_do_not_stop_the_others(run):
    (run / "config.yaml").write_text("MODEL: [")
    (run / "inference" / "coco_instances_results.json").write_text("[{}]")
    (run / "metrics.json").write_text("3\n[]\n")
    text = open(report_run(str(run), str(run / "a" / "page.html"))).read()
    assert "Not shown" in part(text, "Configuration") and ">PyTorch<" in part(text, "Environment")


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="not the output folder of a run"):
        report_run(str(tmp_path))
    with pytest.raises(UserError, match="did you mean output"):
        report_run(str(run.parents[1] / "outptu"))


def test_figures_take_the_colours_of_the_page():
    run = Run("", records=[{"iteration": i, "total_loss": 1.0 + i % 7, "lr": 10.0 ** (-i / 200)} for i in range(1000)])
    figures = curves(run)
    assert list(figures) == ["loss", "learning rate"]
    line = figures["loss"].axes[0].lines[0]
    assert len(line.get_xdata()) <= 400 and line.get_ydata().mean() == pytest.approx(4.0, abs=0.01)
    assert figures["learning rate"].axes[0].get_yscale() == "log" != figures["loss"].axes[0].get_yscale()
    svg = themed_svg(figures["loss"], "loss")
    assert svg == themed_svg(figures["loss"], "loss") and svg.startswith('<svg role="img" aria-label="loss"')
    assert "currentColor" in svg and "#000000" not in svg and "#ffffff" not in svg and "<metadata" not in svg
    ids = set(re.findall(r'id="(p[0-9a-f]{8,})"', svg))
    assert ids and not ids & set(re.findall(r'id="(p[0-9a-f]{8,})"', themed_svg(figures["loss"], "other")))


@needs_chromium
def test_the_page_in_a_browser(run, tmp_path):
    path = report_run(str(run))
    with Page(tmp_path / "profile") as page:
        for width in (1200, 390):
            for dark in (False, True):
                page.look(width, 800, dark)
                page.open(f"file://{path}")
                assert page.too_wide() == []
                assert page.eval("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
                page.picture(tmp_path / "page.png", whole=False)
                corner = Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2))
                assert corner < 60 if dark else corner > 200
                ink = page.eval("getComputedStyle(document.querySelector('svg text')).fill")
                assert (int(re.findall(r"\d+", ink)[0]) > 150) == dark
        assert page.messages == []
        assert all(address.startswith(("file://", "data:")) for address in page.requests)
