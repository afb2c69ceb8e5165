"""The published figures, and the names that stand for the model zoo's configs."""

import re
from pathlib import Path

import pytest

from docs.transcribe_zoo import transcribe
from fpn_d2.analysis.published.zoo import mmdet_baselines, mmdet_rows, zoo_baselines, zoo_row

ROOT = Path(__file__).resolve().parents[3]

TABLES = """
<table><tbody><th valign="bottom">Name</th><th>lr<br/>sched</th><th>train<br/>time<br/>(s/iter)</th>
<th>box<br/>AP</th><th>model id</th><th>download</th>
 <tr><td align="left"><a href="configs/COCO-Detection/one_1x.yaml">R50 &amp; co</a></td><td>1x</td><td>0.551</td>
<td>35.7</td><td>12</td><td><a href="https://x/model_final.pkl">model</a>&nbsp;|&nbsp;<a href="https://x/m.json">m</a></td>
</tr>
<tr><td><a href="configs/Misc/two.py">two</a></td><td>3x</td><td>N/A</td><td></td><td>13</td><td></td></tr>
<tr><td>above + test-time aug.</td><td></td><td></td><td>51.9</td><td></td><td></td></tr>
</tbody></table>
<table><th>Name</th><th>PQ</th><tr><td><a href="configs/Misc/three.yaml">3</a></td><td>41.5</td></tr>
<tr><td><a href="configs/COCO-Detection/one_1x.yaml">Baseline R50</a></td><td>1</td></tr></table>
"""


def test_tables_are_transcribed():
    one, two, three = transcribe(TABLES, "abc")["rows"]
    assert one == {
        "config": "COCO-Detection/one_1x",
        "name": "R50 & co",
        "schedule": "1x",
        "train_s_per_iter": 0.551,
        "box_AP": 35.7,
        "model_id": "12",
        "weights": "https://x/model_final.pkl",
    }
    assert (two["config"], two["train_s_per_iter"], two["box_AP"], two["weights"]) == ("Misc/two", None, None, None)
    assert three["PQ"] == 41.5 and "box_AP" not in three
    assert transcribe(TABLES, "abc")["source"].endswith("/blob/abc/MODEL_ZOO.md")
    with pytest.raises(ValueError, match="a column 'luck'"):
        transcribe(TABLES.replace("<th>PQ</th>", "<th>luck</th>"), "abc")


@pytest.mark.parametrize(
    ("config", "figures"),
    [
        # s/iter, s/im, GB, box AP, and one more; read from the document by eye.
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x", (0.210, 0.038, 3.0, 37.9)),
        ("COCO-Detection/retinanet_R_101_FPN_3x", (0.291, 0.054, 5.2, 40.4)),
        ("COCO-Detection/rpn_R_50_FPN_1x", (0.186, 0.032, 2.7, None, ("proposal_AR", 58.0))),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", (0.261, 0.043, 3.4, 38.6, ("mask_AP", 35.2))),
        ("COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x", (0.738, 0.121, 8.7, 57.3, ("keypoint_AP", 66.0))),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_101_3x", (0.392, 0.066, 6.0, 42.4, ("PQ", 43.0))),
        ("Misc/scratch_mask_rcnn_R_50_FPN_9x_gn", (None, 0.061, 7.2, 43.7, ("mask_AP", 39.6))),
    ],
)
def test_rows_read_by_eye(config, figures):
    row = zoo_row(config)
    keys = ("train_s_per_iter", "inference_s_per_im", "train_memory_gb", "box_AP")
    assert tuple(row[key] for key in keys) == figures[:4]
    for key, value in figures[4:]:
        assert row[key] == value


def test_data_are_plausible_and_name_their_source():
    zoo, mmdet = zoo_baselines(), mmdet_baselines()
    assert len(zoo["rows"]) == 61 and len({row["config"] for row in zoo["rows"]}) == 61
    assert "02b5c4e295e990042a714712c21dc79b731e8833" in zoo["source"]
    assert {row["family"] for row in mmdet["rows"]} == set(mmdet["source"])
    for row in [*zoo["rows"], *mmdet["rows"]]:
        for key, (least, most) in {"box_AP": (20, 60), "inference_s_per_im": (0.02, 0.3), "mask_AP": (20, 50)}.items():
            assert row.get(key) is None or least < row[key] < most, row


def test_row_of_a_path_and_of_our_twin():
    ours = ROOT / "configs" / "COCO-Detection" / "faster_rcnn_R_50_FPN_3x.yaml"
    assert zoo_row(str(ours)) == zoo_row("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")
    assert zoo_row(str(ours))["box_AP"] == 40.2
    assert zoo_row("COCO-Detection/faster_rcnn_R_18_FPN_1x.yaml") is None
    assert zoo_row("elsewhere/faster_rcnn_R_50_FPN_3x.yaml") is None


def test_mmdetection_beside_it():
    rows = {row["config"]: row for row in mmdet_rows("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")}
    assert list(rows) == ["faster_rcnn_r50_caffe_fpn_1x_coco", "faster_rcnn_r50_fpn_1x_coco"]
    assert rows["faster_rcnn_r50_fpn_1x_coco"]["box_AP"] == 37.4
    assert rows["faster_rcnn_r50_fpn_1x_coco"]["inference_s_per_im"] == 0.04673
    masks = mmdet_rows("Misc/cascade_mask_rcnn_R_50_FPN_1x")
    assert [(row["config"], row["mask_AP"]) for row in masks] == [("cascade_mask_rcnn_r50_fpn_1x_coco", 35.9)]
    assert mmdet_rows("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml") == mmdet_rows("mine.yaml") == []


def test_the_package_carries_its_data():
    package = ROOT / "fpn_d2" / "analysis" / "published"
    carried = re.search(r'"fpn_d2.analysis.published": \["(.*?)"\]', (ROOT / "setup.py").read_text())[1]
    assert {file.name for file in package.glob(carried)} == {"zoo_baselines.json", "mmdet_baselines.json"}
