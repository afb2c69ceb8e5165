"""Times inference in a program of one's own: no command line of ours, no environment variable, configs of the zoo.

    python docs/own_process.py --size 800x1067 --rounds 6
    python docs/own_process.py --size 800x1067 --pooling
    python docs/own_process.py --size 800x1067 --memory

Detectron2's Faster R-CNN R-50 FPN, the same with two words and with three, and the last optimised, in turn, with the
same random weights. --pooling: RoIAlign of 1000 RoIs from four levels, forward and backward. --memory: by how much an
inference raises the peak of a process of its own, ours as a share of Detectron2's, of RetinaNet and Mask R-CNN.
"""

import argparse
import statistics
import time

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model

import fpn_d2
from fpn_d2.analysis.benchmark.line import Timing
from fpn_d2.analysis.benchmark.parts import pooling
from fpn_d2.analysis.measure.memory import peak_in_child
from fpn_d2.cli.arguments import size

TWO = ["MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.ROI_HEADS.NAME", "FPNROIHeads"]
THREE = [*TWO, "MODEL.PROPOSAL_GENERATOR.NAME", "FPNRPN"]
WORKER = "fpn_d2.analysis.compare.memory_worker"


def build(words: list[str]) -> torch.nn.Module:
    cfg = fpn_d2.get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *words])
    return build_model(cfg).eval()


@torch.no_grad()
def time_it(height: int, width: int, rounds: int) -> None:
    stock = build([])
    for name, value in stock.state_dict().items():
        if name.endswith("conv3.norm.weight"):  # without trained weights the maps would explode
            value.mul_(0.1)
    models = {"Detectron2's": stock, "two words": build(TWO), "three words": build(THREE)}
    for model in models.values():
        model.load_state_dict(stock.state_dict())
    models["optimised"] = fpn_d2.optimize_for_inference(models["three words"])
    batch = [{"image": torch.randint(0, 255, (3, height, width)).float(), "height": height, "width": width}]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["Detectron2's"], taken, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; {rounds})"
        print(f"{name:13} {spread}  {statistics.median(taken) * 1000:.0f} ms")


def pool(height: int, width: int, rounds: int) -> None:
    for line in pooling(Timing(rounds, warmup=1), rois=1000, backward=True, size=(height, width)):
        ratio, own = line["ratio"], line["own"]
        spread = "{:.1f} ({:.1f} to {:.1f}; {})".format(ratio["median"], *ratio["quartiles"], rounds)
        print(f"{line['ours']:13} {spread}  {own['median'] * 1000:.0f} ms")


def weigh(height: int, width: int) -> None:
    for name in ("COCO-Detection/retinanet_R_50_FPN_1x", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"):
        task = {"weights": "", "mode": "inference", "size": [height, width], "batch": 1}
        task |= {"threads": torch.get_num_threads(), "opts": ["MODEL.DEVICE", "cpu"]}
        stock = peak_in_child(WORKER, task | {"config": model_zoo.get_config_file(f"{name}.yaml"), "optimize": ""})
        for optimize in ("", "float32"):
            ours = peak_in_child(WORKER, task | {"config": f"configs/{name}.yaml", "optimize": optimize})
            print(f"{name} {'optimised' if optimize else 'as built'}: {ours / stock:.2f} of {stock:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=size, default=(800, 1067), metavar="HxW")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--pooling", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.memory:
        weigh(*args.size)
    else:
        (pool if args.pooling else time_it)(*args.size, args.rounds)
