"""The program that fills the table of exports: what it measures, keeps and tries again; with measurements of a fake."""

from pathlib import Path

import pytest

from tests import export_table


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(export_table, "available_engines", lambda to: {"onnx": ("onnxruntime",), "pt2": ("torch",)}[to])
    monkeypatch.setattr(export_table, "DETECTORS", {"one, Mask": ("ResNet FPN", "Mask"), "two, Mask": ("a", "Mask")})
    monkeypatch.setattr(export_table, "ZOO", ())
    page = tmp_path / "page.md"
    page.write_text(f"before\n{export_table.BEGIN}\n{export_table.END}\nafter\n")
    return page


def run(page, *words, found="0.1 px, 0"):
    asked = []

    def measure(name, to):
        asked.append((name, to, page.read_text().count("px")))
        columns = export_table.COLUMNS[to].values()
        return dict.fromkeys(columns, found) | ({} if found.startswith("no") else {"detections": "0 to 9"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_table, "measure", measure)
        export_table.main(["--output", str(page), *words])
    return asked


def test_what_the_table_has_is_not_measured_again(page):
    # The table is written after each: at the second there is what the first gave, in both columns of ONNX.
    assert run(page, "--formats", "onnx") == [("one, Mask", "onnx", 0), ("two, Mask", "onnx", 2)]
    before = page.read_text()
    assert before.startswith("before\n") and before.endswith("after\n")
    assert run(page, "--formats", "onnx") == []
    assert page.read_text() == before
    assert [task[:2] for task in run(page, "--formats", "onnx", "pt2", "--detectors", "two")] == [("two, Mask", "pt2")]
    rows = export_table.read_table(page)
    assert rows["one, Mask"]["ONNX, ONNX Runtime"] == "0.1 px, 0" and rows["one, Mask"]["pt2"] == ""
    assert rows["two, Mask"]["pt2"] == "0.1 px, 0" and rows["two, Mask"]["detections"] == "0 to 9"
    assert len(run(page, "--formats", "onnx", "--anew", found="0.2 px, 0")) == 2
    rows = export_table.read_table(page)
    assert rows["two, Mask"]["ONNX, OpenVINO"] == "0.2 px, 0" and rows["two, Mask"]["pt2"] == "0.1 px, 0"


def test_what_did_not_work_out_is_shown_and_tried_again(page):
    run(page, "--formats", "onnx", found="no: a part of it")
    assert export_table.read_table(page)["one, Mask"]["ONNX, ONNX Runtime"] == "no: a part of it"
    assert len(run(page, "--formats", "onnx")) == 2
    assert run(page, "--formats", "onnx") == []


def test_the_documents_table_is_one():
    rows = export_table.read_table(Path(__file__).parents[1] / "docs" / "export.md")
    assert set(rows) <= {*export_table.DETECTORS, *export_table.ZOO}
    assert {len(cells) for cells in rows.values()} == {6}
