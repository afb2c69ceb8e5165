"""Which detectors can be exported and what their files give, by hand: two hours of processor time.

    python -m tests.export_table            what the table of docs/export.md does not have yet
    python -m tests.export_table --anew     all of it

Small detectors with random weights, and Detectron2's own configurations at their full width, each in a process of its
own, are written in every format, run by every engine that is installed on one image, on three of different sizes at
once, on a small one and on one without anything, and compared with the model stage by stage. The table goes between two
marks of the page, after each detector anew: a run that was stopped goes on where it was.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn
from tqdm import tqdm

from fpn_d2.analysis.exported import all_within, available_engines, check_exported, eager_stages, random_batches, text
from fpn_d2.inference import Predictor, load
from fpn_d2.inference.export import export_detector
from tests.inference.test_export import CASCADE, CLASSES, OURS, RETINA, STOCK, build, config, spread
from tests.marked import write_between

BEGIN, END = "<!-- exported: begin, written by tests/export_table.py -->", "<!-- exported: end -->"
COLUMNS = {
    "onnx": {"onnxruntime": "ONNX, ONNX Runtime", "openvino": "ONNX, OpenVINO"},
    "openvino": {"openvino": "OpenVINO's format"},
    "pt2": {"torch": "pt2"},
    "aoti": {"inductor": "aoti"},
}
TIMM = {"MODEL.FPN.BOTTOM_UP": "build_timm_backbone", "MODEL.FPN.NORM": "GN"}
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
    "timm EfficientNet FPN": OURS | TIMM | {"MODEL.TIMM.NAME": "tf_efficientnet_lite0"},
    "timm Swin FPN": OURS
    | TIMM
    | {"MODEL.TIMM.NAME": "swin_tiny_patch4_window7_224", "MODEL.TIMM.OPTIONS": SMALL_SWIN},
}
MASK, KEYPOINT = {"MODEL.MASK_ON": True}, {"MODEL.KEYPOINT_ON": True}
HEADS = ("Faster", "Cascade", "Mask", "Keypoint", "RetinaNet")
ZOO = (
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
)
DETECTORS = {f"{pyramid}, {head}": (pyramid, head) for pyramid in PYRAMIDS for head in HEADS}

COMPILED = ("openvino", "aoti")  # formats of the same graph, of minutes a file: written of these detectors alone
FEWER = [name for name, (pyramid, head) in DETECTORS.items() if pyramid == "ResNet FPN" or head == "Mask"]


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


def small_detector(name: str) -> Predictor:
    """One of ``DETECTORS``."""
    keys = options(*DETECTORS[name])
    return Predictor(build(keys), config(keys), class_names=CLASSES)


def zoo_detector(name: str) -> Predictor:
    """A checkpoint of a model that Detectron2 built from its own configuration, loaded as its user would."""
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    model = spread(normalised(build_model(cfg).eval()), 0.3)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model_final.pth"
        torch.save({"model": model.state_dict()}, checkpoint)
        return load(checkpoint, config=name, device="cpu", optimize=False)


def normalised(model: nn.Module) -> nn.Module:
    """A model whose frozen batch normalisations have the mean and the variance of random images, as trained ones do.

    Without, each block of a ResNet of random weights doubles its maps, and rounding decides what is found.
    """

    def take(layer: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)

    layers = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    handles = [layer.register_forward_pre_hook(take) for layer in layers]
    with torch.no_grad():
        model.backbone(model.preprocess_image([{"image": image} for image in random_batches(256, 256)[1]]).tensor)
    for handle in handles:
        handle.remove()
    return model


def check(name: str, to: str) -> dict[str, str]:
    """Export one detector; what each engine gives, in cells of the table."""
    torch.manual_seed(0)
    predictor = small_detector(name) if name in DETECTORS else zoo_detector(name)
    short = 256 if "ViT" in name else 96  # a ViT is traced for more than 64 pixels a side
    model, batches = predictor.model, random_batches(short, short * 4 // 3)
    batches.append([torch.zeros(3, 100, 70, dtype=torch.uint8)])
    every = [module for module in model.modules() if hasattr(module, "test_score_thresh")]
    for module in every:
        module.test_score_thresh = 0.0
    best = sorted(max(one.scores.tolist(), default=0.0) for one in detections_of(model, batches))
    for module in every:  # so that there is nothing in some of the images
        module.test_score_thresh = (best[1] + best[2]) / 2
    counts = [len(one) for one in detections_of(model, batches)]
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        exported = export_detector(predictor, folder, to)
        for engine in available_engines(to):
            try:
                found = check_exported(exported, model, batches, [engine])
            except Exception as error:
                cells[COLUMNS[to][engine]] = f"no: {one_line(error)}"
                continue
            every_one = [d for batch in found[engine] for d in batch if d.stage == "detections"]
            boxes, scores = (
                max((d.max_abs for d in every_one if d.item.endswith(what) and d.max_abs is not None), default=0)
                for what in ("boxes", "scores")
            )
            bad = "" if all_within(found) else "DIFFERS: "
            cells[COLUMNS[to][engine]] = f"{bad}{boxes:.1g} px, {scores:.1g}"
            if bad:
                print(text(found, batches), file=sys.stderr)
    return cells | {"detections": f"{min(counts)} to {max(counts)}"}


def detections_of(model: nn.Module, batches: Sequence[Sequence[Tensor]]) -> list[Instances]:
    """What the model finds in each image."""
    return [found for images in batches for found in eager_stages(model, images)["detections"].values()]


def one_line(error: object) -> str:
    """What went wrong, short enough for a cell."""
    return " ".join(str(error).split()).replace("|", "/")[:200]


def table(rows: dict[str, dict[str, str]]) -> str:
    """The page's table."""
    columns = [column for columns in COLUMNS.values() for column in columns.values()]
    lines = ["| detector | " + " | ".join(columns) + " | detections |", "| --- " * (len(columns) + 2) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(c, "") for c in (*columns, "detections")) + " |")
    return "\n".join(lines)


def read_table(page: Path) -> dict[str, dict[str, str]]:
    """The rows of the page's table, as :func:`table` wrote them."""
    lines = page.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {cells[0]: dict(zip(rows[0][1:], cells[1:], strict=True)) for cells in rows[2:]}


def measured(cells: dict[str, str], to: str) -> bool:
    """Whether the row has what each engine that is installed gives; what did not work out is tried again."""
    found = [cells.get(COLUMNS[to][engine], "") for engine in available_engines(to)]
    return all(cell and not cell.startswith("no: ") for cell in found)


def measure(name: str, to: str) -> dict[str, str]:
    """What :func:`check` gives, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.export_table", "--one", name, to]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    tqdm.write(done.stderr, file=sys.stderr)
    said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
    return dict.fromkeys(COLUMNS[to].values(), f"no: {one_line(said)}")


def main(arguments: list[str] | None = None) -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="PAGE", default="docs/export.md", help="page of the table (%(default)s)")
    parser.add_argument("--anew", action="store_true", help="measure what the table has too")
    parser.add_argument("--formats", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--detectors", nargs="+", metavar="WORD", default=[""], help="those with one of the words only")
    parser.add_argument("--one", nargs=2, metavar=("DETECTOR", "FORMAT"), help="this one, in this process, as JSON")
    args = parser.parse_args(arguments)
    if args.one:
        print(json.dumps(check(*args.one)))
        return
    page, order = Path(args.output), [*DETECTORS, *ZOO]
    rows = read_table(page)
    tasks = [
        (name, to)
        for to in args.formats
        for name in order
        if any(word in name for word in args.detectors) and (to not in COMPILED or name in FEWER)
        if args.anew or not measured(rows.get(name, {}), to)
    ]
    with tqdm(tasks, unit="file", disable=None) as bar:
        for name, to in bar:
            bar.set_postfix_str(f"{name}, {to}")
            rows[name] = rows.get(name, {}) | measure(name, to)
            write_between(page, BEGIN, END, table({one: rows[one] for one in order if one in rows}))


if __name__ == "__main__":
    main()
