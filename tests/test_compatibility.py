"""What tests/compatibility.py calls equal, near and lost."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from tests.compatibility import BEGIN, COLUMNS, END, compare, distance, line, write_page
from tests.compatibility_recipes import RECIPES

BOXES = torch.tensor([[0.0, 0.0, 40.0, 30.0], [50.0, 10.0, 90.0, 80.0]])


def detections(order=(0, 1), moved=0.0, drop=0) -> list[dict]:
    found = Instances((100, 100))
    found.pred_boxes = Boxes(BOXES[list(order)] + moved)
    found.scores = torch.tensor([0.9, 0.8])[list(order)]
    found.pred_classes = torch.tensor([3, 5])[list(order)]
    return [{"instances": found[drop:]}]


def test_equal_is_to_the_bit():
    assert str(compare(detections(), detections())) == "equal"
    assert compare(detections(moved=1e-5), detections()).equal is False
    assert compare({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(1.0 + 1e-6)}).equal is False


def test_difference_is_relative_to_the_largest_value():
    assert compare(detections(moved=0.09), detections()).largest == pytest.approx(0.001, rel=1e-3)
    assert distance({"a": torch.tensor([3.0, 4.5])}, {"a": torch.tensor([3.0, 4.0])}) == pytest.approx(0.1)


def test_order_counts_for_equality_alone():
    swapped = compare(detections(order=(1, 0)), detections())
    assert not swapped.equal and swapped.largest == 0


@pytest.mark.parametrize("ours", [detections(drop=1), detections(moved=20.0)])
def test_lost_detections_are_counted(ours):
    assert str(compare(ours, detections())).endswith("of 2 detections")


def test_another_loss_is_no_zero_difference():
    found = compare({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(1.0), "loss_mask": torch.tensor(2.0)})
    assert not found.equal and "loss_mask" in str(found)


def test_rows_replace_those_of_the_same_project(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\n{END}\nbelow\n")
    first, second = RECIPES[:2]
    write_page(page, {second.name: line(second, {"failed": "old"})})
    write_page(page, {first.name: line(first, {"failed": "first"}), second.name: line(second, {"failed": "new"})})
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    rows = [row for row in text.splitlines() if row.startswith("| [")]
    assert [first.name in rows[0], second.name in rows[1], len(rows)] == [True, True, 2]
    assert {row.count("|") for row in text.splitlines() if row.startswith("|")} == {len(COLUMNS) + 1}
