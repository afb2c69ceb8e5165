"""Other people's Detectron2 projects with our parts in the place of theirs, run by hand.

    python -m tests.compatibility --projects FOLDER

FOLDER has a checkout of each project, in a folder of its repository's name; those that are not there are left out.
Nothing is downloaded. Each project runs in a process of its own: its model is built with its own parts and random
weights, then with ours (``fpn_d2.swap``), the state dict is loaded strictly, and detections, losses and gradients are
compared under both MODEL.NUMERICS; then the project's own model and ours are optimised for inference. What a project
needs to be imported beside today's Detectron2, PyTorch and NumPy is in its recipe: none of its files is changed.
"""

import argparse
import dataclasses
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import fpn_d2
from fpn_d2.modeling.swap import ROI_HEADS
from tests.batches import random_batch
from tests.compatibility_recipes import RECIPES, Recipe

SIZES = ((128, 160), (112, 144))
INPUTS = ("image", "height", "width")
SWAPPED = ("MODEL.BACKBONE.NAME", "MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ROI_HEADS.NAME", "MODEL.META_ARCHITECTURE")
KEYS = ("MODEL.FPN.BOTTOM_UP", "MODEL.FPN.TOP_BLOCK")
BEGIN, END = "<!-- projects: begin, written by tests/compatibility.py -->", "<!-- projects: end -->"
COLUMNS = ("project", "swapped to", "keys to set besides", "detections", "exact", "fast", "optimised, float32")
COLUMNS += ("optimised, bfloat16", "remarks")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


# --- what two runs have in common


@dataclasses.dataclass
class Difference:
    """How far two results are from each other.

    Args:
        largest: of all tensors, the largest difference in one, relative to the largest value in it.
        equal: whether all are the same to the bit.
        text: what cannot be said in a number.
        where: the kind of tensor that differs by more than rounding.
    """

    largest: float = 0.0
    equal: bool = True
    text: str = ""
    where: str = ""

    def __str__(self) -> str:
        return self.text or ("equal" if self.equal else f"{self.largest:.0e}{self.where}")


def compare(ours: object, theirs: object) -> Difference:
    """Compare what two models returned, tensor by tensor; detections are brought into the same order first."""
    found = Difference()
    kept, total = _detections_kept(ours, theirs)
    if kept < total:
        found.text, found.equal = f"{kept} of {total} detections", False
        return found
    a, b = dict(leaves(ours)), dict(leaves(theirs))
    if a.keys() != b.keys():
        return Difference(equal=False, text=f"only one has {', '.join(sorted(a.keys() ^ b.keys()))[:80]}")
    if all(torch.equal(a[name], b[name]) for name in a):
        return found
    found.equal = False
    a, b = (dict(leaves(value)) for value in (_in_order_of(ours, theirs), theirs))
    for name, right in b.items():
        left = a[name]
        if left.shape != right.shape:
            return Difference(equal=False, text=f"{name}: {tuple(left.shape)}, not {tuple(right.shape)}")
        if right.numel():
            found.largest = max(found.largest, amount := _relative(name, left, right))
            if amount == found.largest > 1e-3:
                found.where = f" of {name.split('.')[-1]}"
    return found


def _relative(name: str, left: Tensor, right: Tensor) -> float:
    """The largest difference over the largest value; of masks, the share of pixels that differ."""
    if name.endswith("pred_masks"):
        return ((left > 0.5) != (right > 0.5)).double().mean().item()
    if right.dtype is torch.bool:
        return (left != right).double().mean().item()
    return ((left.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-12)).item()


def distance(ours: object, theirs: object) -> float:
    """The norm of all differences, relative to that of all values."""
    a, b = dict(leaves(ours)), dict(leaves(theirs))
    squares = sum((a[name].double() - value.double()).square().sum() for name, value in b.items())
    return (squares / sum(value.double().square().sum() for value in b.values())).sqrt().item()


def leaves(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returned, with a name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Instances):
        yield from leaves(value.get_fields(), name)
    elif isinstance(value, Boxes | BitMasks | Keypoints):
        yield name, value.tensor
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}.{i}")
    elif dataclasses.is_dataclass(value):
        yield from leaves(vars(value), name)
    elif isinstance(value, float | int):
        yield name, torch.tensor(float(value))


def _instances(value: object) -> list[Instances]:
    if isinstance(value, Instances):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [found for item in items for found in _instances(item)]


def _described(one: Instances) -> Tensor:
    boxes = one.pred_boxes if one.has("pred_boxes") else one.proposal_boxes
    score = one.scores if one.has("scores") else one.objectness_logits
    kind = one.pred_classes if one.has("pred_classes") else torch.zeros(len(one))
    return torch.cat([boxes.tensor.double(), 100 * score.double()[:, None], 1e4 * kind.double()[:, None]], dim=1)


def _order(ours: Instances, theirs: Instances) -> Tensor:
    """Which of ``ours`` is each of ``theirs``: the nearest."""
    return torch.cdist(_described(theirs), _described(ours)).argmin(dim=1)


def _detections_kept(ours: object, theirs: object) -> tuple[int, int]:
    kept, total = 0, 0
    for a, b in zip(_instances(ours), _instances(theirs), strict=True):
        total += max(len(a), len(b))
        if len(a) and len(b):
            nearest = torch.cdist(_described(b), _described(a)).min(dim=1)
            kept += int((nearest.values < 1).sum().clamp(max=len(nearest.indices.unique())))
    return kept, total


def _in_order_of(ours: object, theirs: object) -> object:
    if isinstance(theirs, Instances):
        return ours[_order(ours, theirs)] if len(theirs) else ours
    if isinstance(theirs, dict):
        return {key: _in_order_of(ours[key], item) for key, item in theirs.items()}
    if isinstance(theirs, list | tuple):
        return [_in_order_of(a, b) for a, b in zip(ours, theirs, strict=True)]
    return ours


# --- one project


def seed(number: int = 0) -> None:
    """Seed all that a model may draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


@dataclasses.dataclass
class Trial:
    """A project's model with random weights, what it gives, and how near others come."""

    recipe: Recipe
    cfg: CfgNode

    def __post_init__(self):
        """Build the project's own model and let it detect and learn."""
        self.batch = self.recipe.batch(self.cfg, random_batch(self.cfg, SIZES, seed=3))
        self.inputs = [{key: one[key] for key in INPUTS} for one in self.batch]
        seed()
        self.stock = self.recipe.build(self.cfg)
        self._settle()
        self.weights = {name: tensor.clone() for name, tensor in self.stock.state_dict().items()}
        self.maps, self.detections = self.detected(self.stock)
        self.learnt = self.trained(self.stock)
        self.stock.load_state_dict(self.weights)  # a norm that is trained has moved

    @torch.no_grad()
    def _settle(self) -> None:
        """Let each normalisation with statistics have them of its own input, so that maps stay of a size.

        With a mean of one standard deviation: around 0, half of all units would be off, and a network of random weights
        multiplies the least rounding difference a thousand times on its way.
        """

        def take(module: nn.Module, args: tuple) -> None:
            variance, mean = torch.var_mean(args[0], (0, 2, 3))
            module.running_mean.copy_(mean - variance.sqrt())
            module.running_var.copy_(4 * variance)

        has_statistics = [m for m in self.stock.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
        handles = [module.register_forward_pre_hook(take) for module in has_statistics]
        self.recipe.predict(self.stock.eval(), self.inputs)
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def detected(self, model: nn.Module) -> tuple[object, object]:
        """The backbone's maps and the detections."""
        maps, self.images = [], []

        def watch(module: nn.Module, args: tuple, output: object) -> None:
            self.images.append(args[0])
            maps.append(output)

        handle = model.backbone.register_forward_hook(watch)
        seed()
        detections = self.recipe.predict(model.eval(), self.inputs)
        handle.remove()
        return maps, detections

    def trained(self, model: nn.Module) -> tuple[dict, dict]:
        """Losses and gradients of a step."""
        seed(1)
        model.train()
        with EventStorage():
            losses = self.recipe.losses(model, self.batch)
            sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    def built(self, cfg: CfgNode) -> nn.Module:
        """The model of ``cfg`` with the stock model's weights, not one missing or left over."""
        model = self.recipe.build(cfg)
        model.load_state_dict(self.weights, strict=True)
        return model

    def swapped(self, numerics: str) -> CfgNode:
        """The configuration with our parts."""
        cfg = self.cfg.clone()
        fpn_d2.swap(cfg)
        cfg.MODEL.NUMERICS = numerics
        return cfg

    def two_words(self) -> CfgNode:
        """That with what the README says instead of ``swap``: the names of backbone and, where stock, heads."""
        cfg = self.cfg.clone()
        fpn_d2.add_fpn_d2_config(cfg)
        cfg.MODEL.NUMERICS, cfg.MODEL.BACKBONE.NAME = "exact", "build_fpn_backbone"
        if "OUTPUT_LAYER" not in cfg.MODEL.ROI_HEADS:  # StandardROIHeads are then those of few-shot-object-detection
            cfg.MODEL.ROI_HEADS.NAME = ROI_HEADS.get(cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NAME)
        return cfg

    def same_detections(self, model: nn.Module) -> str:
        """How far its detections are from the stock model's."""
        return str(compare(self.detected(model)[1], self.detections))

    def same_losses(self, model: nn.Module) -> str:
        """How far its losses and gradients are."""
        (losses, gradients), (their_losses, their_gradients) = self.trained(model), self.learnt
        losses = compare(losses, their_losses)
        if losses.equal and compare(gradients, their_gradients).equal:
            return "equal"
        return f"{losses}, gradients {distance(gradients, their_gradients):.0e}"

    def optimised(self, model: nn.Module, dtype: torch.dtype | None) -> str:
        """How far its detections, or maps in lower precision, are after ``optimize_for_inference``."""
        maps, detections = self.detected(fpn_d2.optimize_for_inference(model, dtype))
        if dtype is None:
            return str(compare(detections, self.detections))
        return f"works, maps {distance(maps, self.maps):.0e}"

    def autocast(self) -> str:
        """How far the maps of the stock model are under autocast: what lower precision costs with these weights."""
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            maps = [self.stock.eval().backbone(images) for images in self.images]
        return f"{distance(maps, self.maps):.0e}"

    def row(self) -> dict[str, str]:
        """All of it, in the words of the table."""
        cfg, row = self.swapped("exact"), {}
        names = [value_of(cfg, key) for key in SWAPPED if value_of(cfg, key) != value_of(self.cfg, key)]
        row["swapped"] = ", ".join(names)
        row["keys"] = ", ".join(f"{key} {value_of(cfg, key)}" for key in KEYS)
        row["autocast"] = said(self.autocast)  # first: of the images that the stock model has seen
        row["two words"] = said(lambda: self.same_detections(self.built(self.two_words())))
        for numerics in ("exact", "fast"):
            model = self.built(self.swapped(numerics))
            row[numerics] = said(lambda model=model: self.same_detections(model))
            row[f"{numerics}, losses"] = said(lambda model=model: self.same_losses(model))
            if numerics == "exact" and row["exact, losses"] != "equal":
                row["exact, losses"] += f" (stock a second time: {said(lambda: self.same_losses(self.stock))})"
        for moved in (self.stock, model):  # norms that are trained have, in the steps above
            moved.load_state_dict(self.weights)
        for name, dtype in DTYPES.items():
            row[f"stock, {name}"] = said(lambda dtype=dtype: self.optimised(self.stock, dtype))
            row[f"ours, {name}"] = said(lambda dtype=dtype: self.optimised(model, dtype))
        instances = _instances(self.detections)
        row["detections"] = str(sum(map(len, instances)))
        return row


def value_of(cfg: CfgNode, key: str) -> object:
    """``cfg``'s value of a key with dots."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def said(function: Callable[[], str]) -> str:
    """What ``function`` returned, or the error that it ended with, in a line."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def child(name: str, projects: Path, result: Path) -> None:
    """Run one recipe and write its row."""
    torch.set_num_threads(1)
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    result.write_text(json.dumps(Trial(recipe, recipe.configure(projects)).row()))


def line(recipe: Recipe, row: dict[str, str]) -> str:
    """The row of the table in docs/compatibility.md."""
    repository, commit = recipe.repository.split("@")
    cells = [f"[{recipe.name}](https://github.com/{repository}/tree/{commit})"]
    if "failed" in row:
        return f"| {cells[0]} | does not run: {row['failed']} |" + " |" * (len(COLUMNS) - 2)
    needs = "none" if row["two words"] == row["exact"] else row["keys"]
    cells += [row["swapped"], needs, row["detections"]]
    cells += [f"{row[name]}; {row[f'{name}, losses']}" for name in ("exact", "fast")]
    for name in DTYPES:
        ours, stock = row[f"ours, {name}"], row[f"stock, {name}"]
        cells.append(stock if stock == ours else f"{stock}; ours {ours}")
    cells[-1] += f" (autocast {row['autocast']})"
    return f"| {' | '.join([*cells, recipe.remarks])} |"


def write_page(page: Path, lines: dict[str, str]) -> None:
    """Put these rows into the table between the marks of ``page``, in the place of older ones of the same projects."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    old, tail = rest.split(END)
    kept = {match[1]: found for found in old.splitlines() if (match := re.match(r"\| \[(.+?)\]", found))}
    rows = [row for recipe in RECIPES if (row := (kept | lines).get(recipe.name))]
    table = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|", *rows]
    page.write_text("\n".join([head + BEGIN, "", *table, "", END]) + tail)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__.split("\n")[0])
    parser.add_argument("--projects", type=Path, required=True, help="folder with a checkout of each project")
    parser.add_argument("--only", nargs="+", default=[recipe.name for recipe in RECIPES], help="names of recipes")
    parser.add_argument("--page", type=Path, help="document whose table gets the rows")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run every recipe whose project is there, each in a process of its own, and print its row."""
    args = parser().parse_args()
    if args.child:
        return child(args.only[0], args.projects.resolve(), args.child)
    lines = {}
    for recipe in RECIPES:
        if recipe.name not in args.only or not (args.projects / recipe.config).is_file():
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "row.json"
            command = [sys.executable, "-m", "tests.compatibility", "--projects", args.projects, "--only", recipe.name]
            done = subprocess.run([*map(str, command), "--child", str(result)], check=False)
            row = json.loads(result.read_text()) if result.is_file() else {"failed": f"exit code {done.returncode}"}
        print(json.dumps({recipe.name: row}, indent=2), flush=True)
        lines[recipe.name] = line(recipe, row)
        if args.page:
            write_page(args.page, lines)
    return None


if __name__ == "__main__":
    main()
