"""An exported detector beside the model that it was made from, stage by stage."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fpn_d2.errors import UserError
from fpn_d2.inference.export import Exported, graph_of
from fpn_d2.inference.export.engines import ENGINES, Engine, open_engine
from fpn_d2.inference.export.runner_shapes import keypoints_of

from .parity import Difference, Stages, Tolerance, capture, compare

# Engines choose their own order of summation: maps are a little further apart than two runs of PyTorch, and so is a
# cell of a mask, which moves with its box.
TOLERANCE = Tolerance(relative=1e-4, mask=1e-3)


def check_exported(
    exported: Exported, model: nn.Module, batches: Sequence[Sequence[Tensor]], engines: Sequence[str] = ()
) -> dict[str, list[list[Difference]]]:
    """Run what was written on ``batches`` and compare it with ``model``.

    Args:
        exported: out of `export_detector`.
        model: that it was made from, in evaluation mode, on the CPU.
        batches: each a list of images (3, H, W) uint8, at the network's size.
        engines: to run it with; none: all that go with the file and are installed.

    Returns:
        {engine: for each batch its differences}.

    Raises:
        UserError: an engine is not installed, or does not run the format.
    """
    for name in engines:
        if name not in ENGINES[exported.to]:
            raise UserError(f"{name} does not run {exported.to}; that is run by {', '.join(ENGINES[exported.to])}")
    file = exported.stages or exported.path
    graph = graph_of(model)
    graph.with_stages = exported.stages is not None
    names = graph.output_names
    runs = {name: open_engine(name, file, names) for name in engines or available_engines(exported.to)}
    found: dict[str, list[list[Difference]]] = {name: [] for name in runs}
    for images in batches:
        eager = eager_stages(model, images)
        for name, run in runs.items():
            theirs = stages_of(run, images)
            found[name].append(compare({stage: eager[stage] for stage in theirs}, theirs, TOLERANCE))
    return found


def eager_stages(model: nn.Module, images: Sequence[Tensor]) -> Stages:
    """Run the model on images (3, H_i, W_i); without the detections that its last step leaves out: those of no area."""
    stages = capture(model, [{"image": image} for image in images])
    return stages | {
        "detections": {name: found[found.pred_boxes.nonempty()] for name, found in stages["detections"].items()}
    }


def available_engines(to: str) -> list[str]:
    """The engines that run a file of a format and are installed; PyTorch's own always are."""
    from importlib.util import find_spec

    return [name for name in ENGINES[to] if to in ("pt2", "aoti") or find_spec(name)]


def stages_of(run: Engine, images: Sequence[Tensor]) -> Stages:
    """Run an engine on images (3, H_i, W_i); its outputs as `parity.capture` gives those of a model."""
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    batch = torch.stack(
        [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
    )
    outputs = {name: torch.from_numpy(value) for name, value in run(batch.numpy(), np.array(sizes)).items()}
    stages: Stages = {"detections": {}}
    if "input" in outputs:
        stages["input"] = {"images": outputs["input"]}
    for name, value in outputs.items():
        if name.startswith("pyramid."):
            stages.setdefault("pyramid", {})[name.removeprefix("pyramid.")] = value
    for index, size in enumerate(sizes):
        count = int(outputs["counts"][index])
        found = Instances(size, pred_boxes=Boxes(outputs["boxes"][index, :count]))
        found.scores, found.pred_classes = outputs["scores"][index, :count], outputs["classes"][index, :count]
        if "masks" in outputs:
            found.pred_masks = outputs["masks"][index, :count, None]
        if "keypoint_maps" in outputs:
            maps = outputs["keypoint_maps"][index, :count]
            found.pred_keypoints = torch.from_numpy(keypoints_of(maps.numpy(), found.pred_boxes.tensor.numpy()))
            found.pred_keypoint_heatmaps = maps
        stages["detections"][f"image {index}"] = found
        if "proposals.boxes" in outputs:
            logits = outputs["proposals.logits"][index]
            there = torch.isfinite(logits)
            proposals = Instances(size, proposal_boxes=Boxes(outputs["proposals.boxes"][index][there]))
            proposals.objectness_logits = logits[there]
            stages.setdefault("proposals", {})[f"image {index}"] = proposals
    return stages


def random_batches(short: int, long: int, seed: int = 0) -> list[list[Tensor]]:
    """Batches of one and of several images of random sizes, with patches of colour that a detector may take for things.

    Args:
        short, long: sides that images are resized to, in pixels.
        seed: same seed, same images.
    """
    generator = np.random.default_rng(seed)

    def image(least: float = 0.5) -> Tensor:
        height, width = (int(side) for side in generator.uniform(least, 1, 2) * (short, long))
        noise = torch.from_numpy(generator.uniform(0, 255, (1, 3, height // 16 + 1, width // 16 + 1)))
        pixels = F.interpolate(noise, size=(height, width), mode="bilinear")[0]
        for _ in range(6):
            y, x = (int(generator.uniform(0, side)) for side in (height, width))
            h, w = (int(generator.uniform(0.05, 0.5) * side) for side in (height, width))
            pixels[:, y : y + h, x : x + w] = torch.from_numpy(generator.uniform(0, 255, (3, 1, 1)))
        return pixels.to(torch.uint8)

    return [[image()], [image(), image(), image()], [image(0.1)], [torch.full((3, short // 2, short // 2), 128).byte()]]


def text(found: dict[str, list[list[Difference]]], batches: Sequence[Sequence[Tensor]]) -> str:
    """The differences in a table: of each engine, batch and stage the largest."""
    lines = [f"{'engine':12} {'images':28} {'stage':11} {'what':7} {'largest difference':>18}  within"]
    for engine, per_batch in found.items():
        for images, differences in zip(batches, per_batch, strict=True):
            sizes = ", ".join(f"{image.shape[1]}x{image.shape[2]}" for image in images)
            groups: dict[tuple[str, str], list[Difference]] = {}
            for difference in differences:
                last = difference.item.rsplit(" ", 1)[-1]
                groups.setdefault((difference.stage, last if last in ("boxes", "scores") else "maps"), []).append(
                    difference
                )
            for (stage, what), own in groups.items():
                values = [difference.max_abs for difference in own if difference.max_abs is not None]
                largest = f"{max(values):.2g}" if values else "nothing there"
                beyond = "; ".join(f"{d.item}: {d.note}" for d in own if not d.within)
                verdict = "yes" if not beyond else f"NO ({beyond})"
                lines.append(f"{engine:12} {sizes:28} {stage:11} {what:7} {largest:>18}  {verdict}")
    return "\n".join(lines)


def all_within(found: dict[str, list[list[Difference]]]) -> bool:
    """Whether every difference is within the tolerance."""
    return all(d.within for per_batch in found.values() for differences in per_batch for d in differences)
