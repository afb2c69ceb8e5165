"""Which detectors can be exported and what their files give, by hand: a quarter of an hour of processor time.

    python -m tests.export_table --output docs/export.md

Small detectors with random weights, each in a process of its own, are written as ONNX and as a ``torch.export``
program, run by every engine that is installed on one image, on three of different sizes at once, on a small one and on
one without anything, and compared with the model stage by stage. The table goes between two marks of the page.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fpn_d2.errors import UserError
from fpn_d2.files import write_atomically
from tests.inference.test_export import CASCADE, CLASSES, OURS, RETINA, STOCK, build, config

BEGIN, END = "<!-- exported: begin, written by tests/export_table.py -->", "<!-- exported: end -->"
ENGINES = {"onnx": ("onnxruntime", "openvino"), "pt2": ("torch",)}
TIMM = {"MODEL.FPN.BOTTOM_UP": "build_timm_backbone", "MODEL.FPN.NORM": "LN"}
SMALL_SWIN = [["embed_dim", 24], ["depths", [1, 1, 2, 1]], ["num_heads", [1, 2, 4, 8]]]
SMALL_VIT = [["depth", 4], ["embed_dim", 64], ["num_heads", 2], ["img_size", 128]]
PYRAMIDS = {
    "ResNet FPN, Detectron2's": STOCK,
    "ResNet FPN": OURS,
    "ResNet PAFPN": OURS | {"MODEL.FPN.NECK": "PAFPN"},
    "ResNet BiFPN": OURS | {"MODEL.FPN.NECK": "BiFPN", "MODEL.FPN.NORM": "BN"},
    "ViT SimpleFeaturePyramid": OURS
    | {"MODEL.FPN.NECK": "SimpleFeaturePyramid", "MODEL.FPN.BOTTOM_UP": "build_vit_backbone", "MODEL.FPN.NORM": "LN"}
    | {"MODEL.TIMM.NAME": "vit_tiny_patch16_224", "MODEL.TIMM.OPTIONS": SMALL_VIT},
    "timm ResNet FPN": OURS | TIMM | {"MODEL.TIMM.NAME": "resnet10t"},
    "timm ConvNeXt FPN": OURS | TIMM | {"MODEL.TIMM.NAME": "convnext_atto"},
    "timm EfficientNet FPN": OURS | TIMM | {"MODEL.TIMM.NAME": "efficientnet_lite0"},
    "timm Swin FPN": OURS
    | TIMM
    | {"MODEL.TIMM.NAME": "swin_tiny_patch4_window7_224", "MODEL.TIMM.OPTIONS": SMALL_SWIN},
}
MASK, KEYPOINT = {"MODEL.MASK_ON": True}, {"MODEL.KEYPOINT_ON": True}
HEADS = ("Faster", "Cascade", "Mask", "Keypoint", "RetinaNet")


def options(pyramid: str, head: str) -> dict:
    """Keys over those of the small detector."""
    found = dict(PYRAMIDS[pyramid])
    stock = found["MODEL.BACKBONE.NAME"] != "build_fpn_backbone"
    if head == "Cascade":
        found |= CASCADE | ({"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"} if stock else {})
    elif head == "RetinaNet":
        backbone = {} if stock else {"MODEL.BACKBONE.NAME": "build_fpn_backbone"}
        found = found | RETINA | backbone | {"MODEL.META_ARCHITECTURE": "RetinaNet" if stock else "FPNRetinaNet"}
    else:
        found |= {"Mask": MASK, "Keypoint": KEYPOINT}.get(head, {})
    if "ViT" in pyramid:
        found["MODEL.FPN.IN_FEATURES"] = ["res4"]
    return found


def check(pyramid: str, head: str) -> dict[str, str]:
    """Export one detector; what each engine gives, in a cell of the table."""
    from fpn_d2.analysis.exported import all_within, check_exported, eager_stages, random_batches
    from fpn_d2.inference import Predictor
    from fpn_d2.inference.export import export_detector

    torch.manual_seed(0)
    keys = options(pyramid, head)
    model, batches = build(keys), random_batches(96, 128)
    batches.append([torch.zeros(3, 100, 70, dtype=torch.uint8)])
    every = [module for module in model.modules() if hasattr(module, "test_score_thresh")]
    for module in every:
        module.test_score_thresh = 0.0
    best = [float(one.scores.max()) for batch in batches for one in eager_stages(model, batch)["detections"].values()]
    for module in every:  # so that there is nothing in some of the images
        module.test_score_thresh = (sorted(best)[1] + sorted(best)[2]) / 2
    counts = [len(one) for batch in batches for one in eager_stages(model, batch)["detections"].values()]
    cells = {}
    for to, engines in ENGINES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                exported = export_detector(Predictor(model, config(keys), class_names=CLASSES), folder, to)
            except UserError as error:
                cells |= dict.fromkeys(engines, f"no: {error}")
                continue
            for engine in engines:
                try:
                    found = check_exported(exported, model, batches, [engine])
                except Exception as error:
                    cells[engine] = f"no: {' '.join(str(error).split())[:200]}"
                    continue
                every_one = [d for batch in found[engine] for d in batch if d.stage == "detections"]
                boxes, scores = (
                    max((d.max_abs for d in every_one if d.item.endswith(what) and d.max_abs is not None), default=0)
                    for what in ("boxes", "scores")
                )
                bad = "" if all_within(found) else "DIFFERS: "
                cells[engine] = f"{bad}{boxes:.1g} px, {scores:.1g}"
    return cells | {"detections": f"{min(counts)} to {max(counts)}"}


def table(rows: dict[str, dict[str, str]]) -> str:
    """The page's table."""
    columns = [engine for engines in ENGINES.values() for engine in engines]
    lines = ["| detector | " + " | ".join(columns) + " | detections |", "| --- " * (len(columns) + 2) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(c, "") for c in (*columns, "detections")) + " |")
    return "\n".join(lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="PAGE", help="page whose table is written anew; none: print it")
    parser.add_argument("--pyramids", nargs="+", choices=PYRAMIDS, default=list(PYRAMIDS))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--one", nargs=2, metavar=("PYRAMID", "HEAD"), help="this one, in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(check(*args.one)))
        return
    rows = {}
    for pyramid in args.pyramids:
        for head in args.heads:
            command = [sys.executable, "-W", "ignore", "-m", "tests.export_table", "--one", pyramid, head]
            done = subprocess.run(command, capture_output=True, text=True)
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            cells = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"onnxruntime": f"no: {said}"}
            rows[f"{pyramid}, {head}"] = cells
            print(table({f"{pyramid}, {head}": cells}).splitlines()[-1], file=sys.stderr, flush=True)
    if args.output:
        before, _, rest = Path(args.output).read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        write_atomically(args.output, f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
