"""Cost curves: equal work on both sides, growth from made-up times, files."""

import inspect
import json
from xml.etree import ElementTree

import pytest
import torch
from detectron2.structures import Instances

from fpn_d2 import cli
from fpn_d2.analysis.scaling import curves as cost_curves
from fpn_d2.analysis.scaling.curves import CURVES, OURS, STOCK, Curve, growth, measure_curves, table
from fpn_d2.analysis.scaling.figure import draw
from fpn_d2.errors import UserError


def test_curves_cover_what_grows():
    names = {curve.name for curve in CURVES}
    assert names == {
        *("pooling by RoIs", "pooling by image side", "pooling by levels", "pooling by batch"),
        *("neck by image side", "neck by batch"),
        *("detector by image side", "detector by batch", "detector by classes"),
    }
    spans = {curve.name: (curve.values[0], curve.values[-1]) for curve in CURVES}
    assert spans["pooling by RoIs"] == (100, 50000) and spans["detector by classes"] == (3, 1203)
    assert spans["detector by image side"] == spans["neck by image side"] == (256, 4096)


def same(ours, stock):
    if isinstance(ours, dict):
        assert ours.keys() == stock.keys()
        return all(same(ours[key], stock[key]) for key in ours)
    if isinstance(ours, list):
        return all(same(a, b) for a, b in zip(ours, stock, strict=True))
    if isinstance(ours, Instances):
        return len(ours) == len(stock)
    return ours.shape == stock.shape and torch.allclose(ours, stock, rtol=1e-4, atol=1e-5 * stock.abs().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda device: cost_curves._pooling(30, device, (64, 96), (2, 3, 4), 2),
        lambda device: cost_curves._neck((64, 96), 2, device),
        lambda device: cost_curves._detector(device, (64, 96), 1, 3),
    ],
    ids=["pooling", "neck", "detector"],
)
def test_both_sides_do_the_same_work(make):
    calls = make(torch.device("cpu"))
    assert list(calls) == [OURS, STOCK]
    assert same(calls[OURS](), calls[STOCK]())


def test_parts_run_as_within_a_detector():
    """Ours sped up and on channels-last maps, Detectron2's on contiguous ones."""
    calls = cost_curves._neck((64, 96), 1, torch.device("cpu"))
    assert calls[OURS]()["p2"].is_contiguous(memory_format=torch.channels_last)
    assert calls[STOCK]()["p2"].is_contiguous()
    seen = {}
    calls = cost_curves._pooling(10, torch.device("cpu"), (64, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpn_d2.fast.poolers.pyramid_roi_align", lambda maps, *rest: seen.update(maps=maps))
        calls[OURS]()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in seen["maps"])


def test_rois_lie_in_the_image_and_reach_every_level():
    boxes = cost_curves._rois(1000, (800, 1088), torch.device("cpu")).tensor
    assert boxes.min() >= 0 and (boxes[:, 2] <= 1088).all() and (boxes[:, 3] <= 800).all()
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    assert all(((sides >= low) & (sides < 2 * low)).sum() > 50 for low in (56, 112, 224))


def curve_of(values, work=float):
    return Curve("part", "variable", values, lambda value, device: {}, work)


def points_of(values, seconds):
    return [{"value": v, "seconds": {OURS: {"median": s}}} for v, s in zip(values, seconds, strict=True)]


def test_growth_is_the_power_of_the_upper_half():
    values = (10, 20, 100, 200, 400)
    # A fixed cost below, then quadratic.
    assert growth(curve_of(values), points_of(values, (7, 7, 10, 40, 160)), OURS) == pytest.approx(2)
    assert growth(curve_of((4, 8)), points_of((4, 8), (1.0, 4.0)), OURS) == pytest.approx(2)
    by_area = curve_of((4, 8), work=lambda side: side**2)
    assert growth(by_area, points_of((4, 8), (1.0, 4.0)), OURS) == pytest.approx(1)
    assert growth(curve_of((4,)), points_of((4,), (1.0,)), OURS) is None
    assert growth(curve_of(()), [], OURS) is None


@pytest.fixture
def two_small_curves(monkeypatch):
    def calls(value, device):
        return {OURS: lambda: torch.ones(value).sum(), STOCK: lambda: torch.ones(value).sum()}

    small = (Curve("sum", "cells", (10, 1000, 10**6), calls), Curve("pooling", "RoIs", (1,), calls))
    monkeypatch.setattr(cost_curves, "CURVES", small)


def test_files(tmp_path, two_small_curves, capsys):
    command = ["cost-curves", "--output", str(tmp_path / "out"), "--rounds", "2", "--largest", "1000"]
    assert cli.main(command) == 0
    kept = json.loads((tmp_path / "out" / "cost_curves.json").read_text())
    assert [point["value"] for point in kept["curves"]["sum by cells"]["points"]] == [10, 1000]
    assert kept["curves"]["pooling by RoIs"]["growth"] == {OURS: None, STOCK: None}
    for point in kept["curves"]["sum by cells"]["points"]:
        assert point["seconds"][STOCK]["n"] == 2 and set(point["peak_mb"]) == {OURS, STOCK}
    svg = (tmp_path / "out" / "cost_curves.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg") and "sum by cells" in svg
    shown = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert shown.count("10") == shown.count("1000") == 1  # the values that were measured, below the lower panel
    assert table(kept) in capsys.readouterr().out


def test_figure_of_all_curves_fits_a_page():
    both = (OURS, STOCK)
    seconds = {name: {"median": 1.0, "quartiles": [0.9, 1.1]} for name in both}
    point = {"seconds": seconds, "peak_mb": dict.fromkeys(both, 3.0)}
    curves = {
        curve.name: {
            "variable": curve.variable,
            "points": [{"value": value, **point} for value in curve.values],
            "growth": dict.fromkeys(both, 1.0),
        }
        for curve in CURVES
    }
    svg = ElementTree.fromstring(draw(curves))
    assert float(svg.get("width").removesuffix("pt")) < 12 * 72
    titles = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert all(name in titles for name in curves)


def test_a_curve_without_points_is_left_out(tmp_path, two_small_curves):
    result = measure_curves(str(tmp_path), rounds=1, largest=5, progress=False)
    assert list(result["curves"]) == ["pooling by RoIs"]


def test_mistakes(tmp_path, two_small_curves):
    with pytest.raises(UserError, match="no curve 'pooling by luck'; there are sum by cells, pooling by RoIs"):
        measure_curves(str(tmp_path), curves=["pooling by luck"])
    with pytest.raises(UserError, match="at most 5: the least is 10"):
        measure_curves(str(tmp_path), curves=["sum by cells"], largest=5)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            measure_curves(str(tmp_path), device="cuda")


def test_command_line_has_the_defaults_of_the_function():
    args = vars(cli.build_parser().parse_args(["cost-curves"]))
    for name, parameter in inspect.signature(measure_curves).parameters.items():
        if name not in ("output", "progress"):
            assert args[name] == parameter.default, name
