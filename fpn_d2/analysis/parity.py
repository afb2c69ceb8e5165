"""How far two detectors are apart on the same images, stage by stage: input, maps, proposals, detections.

What a stage gets is what its own model's stage before gave it: a difference shows in the first stage that makes it and,
as it were downstream, in those behind.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

# In the order in which an image passes them.
STAGES = ("input", "bottom-up", "pyramid", "head", "proposals", "segmentation", "detections", "masks", "keypoints")
Stages = dict[str, dict[str, Tensor | Instances]]
# What the boxes and scores of proposals and of detections are called.
_BOXES, _SCORES = ("pred_boxes", "proposal_boxes"), ("scores", "objectness_logits")


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same.

    Attributes:
        relative: of a map: largest difference by largest absolute value.
        pixels: of boxes and keypoints, in pixels of the network's input.
        score: of scores; for logits beyond ±1 a multiple of their largest absolute value.
        mask: of the cells of masks, which are probabilities.
    """

    relative: float = 1e-5
    pixels: float = 0.01
    score: float = 1e-4
    mask: float = 1e-4


@dataclass
class Difference:
    """One line of the comparison.

    Attributes:
        stage: one of ``STAGES``.
        item: "p2", "image 0 boxes" and the like.
        max_abs, max_rel: largest difference, and that by A's largest absolute value; None where none can be taken.
        equal: the same bits in the same order.
        within: the same number, and every pair within the tolerance.
        note: for boxes how many of how many are within the tolerance; or why nothing was compared.
    """

    stage: str
    item: str
    max_abs: float | None
    max_rel: float | None
    equal: bool
    within: bool
    note: str = ""


def capture(model: nn.Module, batch: list[dict]) -> Stages:
    """Run ``model`` (in evaluation mode) on ``batch`` and keep what passes between its stages.

    Any of Detectron2's meta-architectures with a ``backbone`` will do; stages that a model lacks are left out. Hooks
    are there during this call alone.

    Returns:
        {stage: {item: map or instances of an image}}, boxes before they are scaled to the size of the output.
    """
    seen: Stages = {}
    bottom_up_maps: list[dict[str, Tensor]] = []

    def keep_backbone(module: nn.Module, args: tuple, maps: dict[str, Tensor]) -> None:
        pyramid = isinstance(getattr(module, "bottom_up", None), nn.Module)
        seen["input"] = {"images": args[0].cpu()}
        seen["pyramid" if pyramid else "bottom-up"] = _copy(maps)

    def keep_head(module: nn.Module, args: tuple, output: tuple) -> None:
        kinds = zip(("logits", "deltas", "centerness"), output, strict=False)
        seen["head"] = _copy({f"{kind} {index}": map_ for kind, maps in kinds for index, map_ in enumerate(maps)})

    def keep_instances(stage: str):
        def keep(module: nn.Module, args: tuple, output: tuple) -> None:
            seen[stage] = {f"image {index}": instances.to("cpu") for index, instances in enumerate(output[0])}

        return keep

    parts = [
        ("backbone", keep_backbone),
        ("backbone.bottom_up", lambda module, args, maps: bottom_up_maps.append(_copy(maps))),
        ("head", keep_head),
        ("proposal_generator", keep_instances("proposals")),
        ("sem_seg_head", lambda module, args, output: seen.update(segmentation={"logits": output[0].cpu()})),
        ("roi_heads", keep_instances("detections")),
    ]
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep) for name, keep in parts if name in modules]
    try:
        with torch.no_grad():
            outputs = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    several = len(bottom_up_maps) > 1  # an image pyramid runs it once per size
    for number, maps in enumerate(bottom_up_maps):
        named = {f"{name}, run {number}" if several else name: value for name, value in maps.items()}
        seen.setdefault("bottom-up", {}).update(named)
    if "detections" not in seen and "instances" in outputs[0]:
        keep_instances("detections")(model, (), ([output["instances"] for output in outputs],))
    return {stage: seen[stage] for stage in STAGES if stage in seen}


def _copy(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and safe from what changes maps in place behind this stage."""
    return {name: value.detach().to("cpu", copy=True) for name, value in maps.items()}


@contextlib.contextmanager
def every_score_counts(model: nn.Module) -> Iterator[None]:
    """Drop the threshold of scores meanwhile: untrained models give no detections above it, and nothing to compare."""
    kept = [(module, module.test_score_thresh) for module in model.modules() if hasattr(module, "test_score_thresh")]
    for module, _ in kept:
        module.test_score_thresh = 0.0
    try:
        yield
    finally:
        for module, value in kept:
            module.test_score_thresh = value


def compare(a: Stages, b: Stages, tolerance: Tolerance | None = None) -> list[Difference]:
    """The differences of what :func:`capture` kept of two models, in the order of the stages."""
    tolerance = tolerance or Tolerance()
    found = []
    for stage in STAGES:
        of_a, of_b = a.get(stage, {}), b.get(stage, {})
        for item in [*of_a, *(name for name in of_b if name not in of_a)]:
            if item not in of_a or item not in of_b:
                note = f"only {'A' if item in of_a else 'B'} has it"
                found.append(Difference(stage, item, None, None, False, False, note))
            elif isinstance(of_a[item], Instances):
                found += _compare_instances(stage, item, of_a[item], of_b[item], tolerance)
            else:
                found.append(_compare_maps(stage, item, of_a[item], of_b[item], tolerance.relative))
    return sorted(found, key=lambda difference: STAGES.index(difference.stage))


def _compare_maps(stage: str, item: str, a: Tensor, b: Tensor, relative: float) -> Difference:
    if a.shape != b.shape:
        return Difference(stage, item, None, None, False, False, f"A has {tuple(a.shape)}, B {tuple(b.shape)}")
    max_abs, max_rel = _largest(a, b)
    note = "" if torch.isfinite(a).all() and torch.isfinite(b).all() else "not all finite"
    # Written such that NaN is not within.
    return Difference(stage, item, max_abs, max_rel, torch.equal(a, b), max_rel <= relative, note)


def _largest(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same by the largest absolute value of ``a``."""
    if a.numel() == 0:
        return 0.0, 0.0
    a, b = a.double(), b.double()
    max_abs, scale = float((a - b).abs().max()), float(a.abs().max())
    return max_abs, max_abs / scale if scale else (0.0 if max_abs == 0 else float("inf"))


def _compare_instances(stage: str, item: str, a: Instances, b: Instances, tolerance: Tolerance) -> list[Difference]:
    boxes = [_field(instances, _BOXES) for instances in (a, b)]
    scores = [_field(instances, _SCORES) for instances in (a, b)]
    classes = [_field(instances, ("pred_classes",)) for instances in (a, b)]
    same_number = len(boxes[0]) == len(boxes[1])
    in_order = same_number and all(torch.equal(*pair) for pair in (boxes, scores, classes))
    score_tolerance = tolerance.score * max(1.0, float(scores[0].abs().max()) if len(scores[0]) else 1.0)
    pairs = match(boxes, scores, classes, tolerance.pixels, score_tolerance)
    found = []
    for what, (of_a, of_b), limit in (("boxes", boxes, tolerance.pixels), ("scores", scores, score_tolerance)):
        max_abs, max_rel = _largest(of_a[pairs[0]], of_b[pairs[1]])
        close = (of_a[pairs[0]] - of_b[pairs[1]]).abs() <= limit
        good = int((close.all(dim=1) if close.dim() > 1 else close).sum())
        note = f"{good} of {len(of_a)} within {limit:.2g}"
        if not same_number:
            note += f"; B has {len(of_b)}"
        found.append(
            Difference(
                stage,
                f"{item} {what}",
                max_abs if len(pairs[0]) else None,
                max_rel if len(pairs[0]) else None,
                in_order,
                same_number and good == len(of_a),
                note,
            )
        )
    for what, limit in (("masks", tolerance.mask), ("keypoints", tolerance.pixels)):
        if not (a.has(f"pred_{what}") and b.has(f"pred_{what}")):
            continue
        of_a, of_b = (x.get(f"pred_{what}")[index].float() for x, index in zip((a, b), pairs, strict=True))
        if len(of_a) == 0:
            found.append(Difference(what, item, None, None, in_order, same_number, "nothing to compare"))
            continue
        max_abs, max_rel = _largest(of_a, of_b)
        equal = in_order and torch.equal(of_a, of_b)
        found.append(Difference(what, item, max_abs, max_rel, equal, same_number and max_abs <= limit))
    return found


def _field(instances: Instances, names: tuple[str, ...]) -> Tensor:
    for name in names:
        if instances.has(name):
            value = instances.get(name)
            return value.tensor if isinstance(value, Boxes) or hasattr(value, "tensor") else value
    return torch.zeros(len(instances), device=next(iter(instances.get_fields().values())).device)


def match(
    boxes: list[Tensor], scores: list[Tensor], classes: list[Tensor], pixels: float, score: float
) -> tuple[Tensor, Tensor]:
    """Pair each instance of A with that of B which is nearest in box and score, of the same class; each at most once.

    Proposals and detections are ordered by their scores, so that float rounding may swap neighbours. Where A and B have
    the same box in the same place, they are a pair without a search.

    Args:
        boxes, scores, classes: of A and of B, (N, 4), (N,), (N,).
        pixels: tolerance by which distances of boxes are divided, to be added up with those of scores.
        score: tolerance of the scores.

    Returns:
        Indices into A and into B, equally long.
    """
    (boxes_a, boxes_b), (scores_a, scores_b), (classes_a, classes_b) = boxes, scores, classes
    distance = torch.cdist(boxes_a.double(), boxes_b.double(), p=float("inf")) / pixels
    distance = torch.maximum(distance, (scores_a[:, None].double() - scores_b[None].double()).abs() / score)
    distance[classes_a[:, None] != classes_b[None]] = float("inf")
    distance = distance.nan_to_num(nan=float("inf"), posinf=float("inf"))
    number = min(distance.shape)
    in_place = distance.diagonal() <= 1
    rows = [index for index in range(number) if in_place[index]]
    columns = list(rows)
    distance[:, columns] = float("inf")
    for row in sorted(set(range(len(boxes_a))) - set(rows)):
        if distance.shape[1] == 0:
            break
        value, column = distance[row].min(dim=0)
        if value == float("inf"):
            continue
        rows.append(row)
        columns.append(int(column))
        distance[:, column] = float("inf")
    return torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


def summarise(differences: list[Difference]) -> dict:
    """What is told of a comparison.

    Returns:
        "rows": every difference; "stages": of each stage the largest "max_abs" and "max_rel" and whether all of it is
        "equal" and "within"; "first_unequal" and "first_beyond": the first stage that is not equal to the last bit, and
        the first beyond the tolerance; None where there is none.
    """
    stages = {}
    for stage in STAGES:
        own = [difference for difference in differences if difference.stage == stage]
        if own:
            stages[stage] = {
                "max_abs": _max([difference.max_abs for difference in own]),
                "max_rel": _max([difference.max_rel for difference in own]),
                "equal": all(difference.equal for difference in own),
                "within": all(difference.within for difference in own),
            }
    return {
        "rows": [asdict(difference) for difference in differences],
        "stages": stages,
        "first_unequal": next((stage for stage, found in stages.items() if not found["equal"]), None),
        "first_beyond": next((stage for stage, found in stages.items() if not found["within"]), None),
    }


def _max(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    if any(value != value for value in there):  # NaN hides in max()
        return float("nan")
    return max(there, default=None)
