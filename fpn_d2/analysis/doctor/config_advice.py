"""What to change in a configuration for a data set, with the reason: nothing is changed here."""

from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode

from fpn_d2.analysis.errors.detections import Scored, take
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.modeling.roi_rules import combines_levels

from .anchors import Anchors, coverage, propose

# A share of boxes has to grow by this much before a change is proposed, and no other may fall by that.
_GAIN, _LOSS = 0.02, 0.005
# Cells that a box at the border of a level should have on it, as many as a RoI is pooled to.
_CELLS = 7
_RARE = 0.1  # share of the images that hold a class, below which it is rare
_ENOUGH_PIXELS = 8.0  # side of the smallest objects that a stride of 4 can tell


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        key: of the configuration.
        now: its value.
        value: what is proposed; None: nothing to set, only to know.
        reason: why.
        gain: what it should bring.
    """

    key: str
    now: object
    value: object
    reason: str
    gain: str = ""

    def words(self) -> str:
        """In a line or two."""
        change = f"{self.now!r} -> {self.value!r}" if self.value is not None else f"{self.now!r}"
        return f"{self.key}: {change}\n    {self.reason}" + (f"; expected: {self.gain}" if self.gain else "")


def advise(cfg: CfgNode, data: Scored) -> list[Advice]:
    """Look at a configuration beside its training data.

    Args:
        cfg: the configuration.
        data: the training set; detections in it are not looked at.

    Returns:
        What to change, and what to know, in the order of the image's way.
    """
    truth = take(data.truth, ~data.truth.crowd & (data.truth.area > 0))
    scales = training_scales(cfg, data.sizes)
    boxes = truth.box * scales[truth.image][:, None]
    found = [*_sizes(cfg, data, boxes, scales)]
    if len(boxes):
        found += [*_anchors(cfg, boxes), *_levels(cfg, boxes)]
        found += [*_per_image(cfg, truth.image, len(data.files)), *_classes(cfg, data, truth)]
    return [*found, *_schedule(cfg, len(data.files))]


def training_scales(cfg: CfgNode, sizes: np.ndarray) -> np.ndarray:
    """(I,) by how much images are enlarged in training, at the middle of ``INPUT.MIN_SIZE_TRAIN``."""
    shorter = float(np.median(cfg.INPUT.MIN_SIZE_TRAIN))
    if shorter == 0:
        return np.ones(len(sizes))
    return np.minimum(shorter / sizes.min(1), cfg.INPUT.MAX_SIZE_TRAIN / sizes.max(1))


def anchors_of(cfg: CfgNode) -> Anchors | None:
    """The anchors of a configuration; None where they are of another kind than `DefaultAnchorGenerator`'s."""
    generator = cfg.MODEL.ANCHOR_GENERATOR
    retina = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    names = cfg.MODEL.RETINANET.IN_FEATURES if retina else cfg.MODEL.RPN.IN_FEATURES
    if generator.NAME != "DefaultAnchorGenerator" or not all(name[:1] == "p" and name[1:].isdigit() for name in names):
        return None
    strides = tuple(2 ** int(name[1:]) for name in names)
    sizes = [tuple(float(s) for s in level) for level in generator.SIZES]
    sizes = sizes * len(strides) if len(sizes) == 1 else sizes
    ratios = generator.ASPECT_RATIOS
    if len(sizes) != len(strides) or len(ratios) != 1:
        return None
    return Anchors(strides, tuple(sizes), tuple(float(r) for r in ratios[0]))


def _sizes(cfg: CfgNode, data: Scored, boxes: np.ndarray, scales: np.ndarray):
    key, now = "INPUT.MIN_SIZE_TRAIN", list(cfg.INPUT.MIN_SIZE_TRAIN)
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    tiny = float((sides < _ENOUGH_PIXELS).mean()) if len(sides) else 0.0
    if tiny > _GAIN:
        reason = f"{100 * tiny:.0f} % of the objects are smaller than {_ENOUGH_PIXELS:g} pixels after resizing"
        if np.median(scales) < 1:
            largest = int(round(float(np.median(data.sizes.min(1)))))
            yield Advice(key, now, [largest], f"{reason}, and images are shrunk", "fewer missed small objects")
        else:
            yield Advice(key, now, None, f"{reason}: predict with --tile, or enlarge images", "")
    large = float((scales > 2.5).mean())
    if large > 0.5:
        least = int(round(2 * float(np.median(data.sizes.min(1)))))
        reason = f"{100 * large:.0f} % of the images are enlarged by more than 2.5, which shows nothing new"
        yield Advice(key, now, [least], reason, f"about {np.median(scales) ** 2 / 4:.1f} times as fast")


def _anchors(cfg: CfgNode, boxes: np.ndarray):
    anchors = anchors_of(cfg)
    if anchors is None:
        return
    offset = cfg.MODEL.ANCHOR_GENERATOR.OFFSET
    now = coverage(boxes, anchors, offset)
    better = propose(boxes, anchors)
    then = coverage(boxes, better, offset)
    gains = then[0] - now[0], then[1] - now[1]
    if max(gains) < _GAIN or min(gains) < -_LOSS:
        return
    shares = "{:.1f} % of the boxes by IoU 0.5 and {:.1f} % by 0.7"
    reason = f"the anchors cover {shares.format(*(100 * share for share in now))}"
    gain = shares.format(*(100 * share for share in then))
    sizes = [list(level) for level in better.sizes]
    yield Advice("MODEL.ANCHOR_GENERATOR.SIZES", [list(level) for level in anchors.sizes], sizes, reason, gain)
    if better.ratios != anchors.ratios:
        together = "goes with the sizes: heights / widths of these boxes"
        yield Advice("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [list(anchors.ratios)], [list(better.ratios)], together)


def _levels(cfg: CfgNode, boxes: np.ndarray):
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    pools = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN")
    if not pools or len(names) < 2 or not all(name[:1] == "p" for name in names):
        return
    rule = Rule.of(cfg)
    if rule.assigner is not None or combines_levels(cfg):  # the canonical size says little about other rules
        return
    now = _shares(rule, boxes)
    if now.max() < 0.8:
        return
    sides = (rule.canonical_box_size * 2.0**step for step in np.arange(-4, 4.5, 0.5))
    others = [rule.other(round(side)) for side in sides if side >= _CELLS * 2.0**rule.canonical_level]
    if not others:
        return
    best = min(others, key=lambda one: (round(float(_shares(one, boxes).max()), 3), one.canonical_box_size))
    then = _shares(best, boxes)
    if now.max() - then.max() > 0.1:
        key = "MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE"
        reason = f"nearly all objects are on one level (percent: {_percent(rule, now)})"
        yield Advice(key, rule.canonical_box_size, best.canonical_box_size, reason, _percent(best, then))


def _percent(rule: Rule, shares: np.ndarray) -> str:
    return ", ".join(f"p{level} {100 * share:.0f}" for level, share in zip(rule.levels, shares, strict=True))


def _shares(rule: Rule, boxes: np.ndarray) -> np.ndarray:
    level = rule.assign(boxes, np.ones(len(boxes)))
    return np.array([(level == k).mean() for k in rule.levels])


def _per_image(cfg: CfgNode, image: np.ndarray, images: int):
    most = int(np.bincount(image, minlength=images).max())
    if cfg.TEST.DETECTIONS_PER_IMAGE < 1.2 * most:
        value = int(np.ceil(1.5 * most / 100) * 100)
        reason = f"an image has {most} objects, and every false detection takes a place"
        yield Advice("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE, value, reason, "no object is cut off")
    for key in ("POST_NMS_TOPK_TRAIN", "POST_NMS_TOPK_TEST"):
        now = cfg.MODEL.RPN[key]
        if cfg.MODEL.META_ARCHITECTURE != "RetinaNet" and now < 5 * most:
            value = int(np.ceil(10 * most / 100) * 100)
            reason = f"an image has {most} objects: {now} proposals leave fewer than 5 for each"
            yield Advice(f"MODEL.RPN.{key}", now, value, reason, "recall in full images")


def _classes(cfg: CfgNode, data: Scored, truth):
    holding = np.zeros(len(data.class_names), int)
    for label in range(len(data.class_names)):
        holding[label] = len(np.unique(truth.image[truth.label == label]))
    shares = holding / max(len(data.files), 1)
    absent = [name for name, number in zip(data.class_names, holding, strict=True) if number == 0]
    if absent:
        reason = f"no image has an object of {', '.join(absent[:5])}: its AP will be nan or 0"
        yield Advice("DATASETS.TRAIN", list(cfg.DATASETS.TRAIN), None, reason)
    rare = [(n, s) for n, s in zip(data.class_names, shares, strict=True) if 0 < s < _RARE and s < 0.3 * shares.max()]
    if rare and cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        named = ", ".join(f"{name} {100 * share:.1f}" for name, share in rare[:5])
        reason = f"rare classes (percent of the images that hold one: {named})"
        gain = "they are seen more often: repeat-factor sampling of LVIS"
        yield Advice("DATALOADER.SAMPLER_TRAIN", "TrainingSampler", "RepeatFactorTrainingSampler", reason, gain)
        threshold = float(round(min(_RARE, float(shares.max())), 3))
        now = cfg.DATALOADER.REPEAT_THRESHOLD
        yield Advice("DATALOADER.REPEAT_THRESHOLD", now, threshold, "goes with the sampler: classes below are repeated")


def _schedule(cfg: CfgNode, images: int):
    batch, rate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    sgd = cfg.SOLVER.OPTIMIZER == "SGD"
    usual = (0.02 if "RetinaNet" not in cfg.MODEL.META_ARCHITECTURE else 0.01) * batch / 16
    if sgd and not usual / 3 <= rate <= usual * 3:
        what = "diverges" if rate > usual else "learns slowly"
        reason = f"SGD with {batch} images a batch often {what} so; the usual rate is in proportion to the batch"
        yield Advice("SOLVER.BASE_LR", rate, float(f"{usual:.3g}"), reason, "a loss that falls")
    if not sgd and not 3e-5 <= rate <= 2e-3:
        reason = f"{cfg.SOLVER.OPTIMIZER} wants 0.0001 to 0.001"
        yield Advice("SOLVER.BASE_LR", rate, 0.0005, reason, "a loss that falls")
    epochs = cfg.SOLVER.MAX_ITER * batch / max(images, 1)
    if epochs < 6:
        value = int(np.ceil(12 * images / batch / 10) * 10)
        reason = f"{cfg.SOLVER.MAX_ITER} iterations of {batch} images are {epochs:.1f} times over the {images} images"
        yield Advice("SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER, value, reason, "12 times over the data, as in 1x")
    steps = [step for step in cfg.SOLVER.STEPS if step >= cfg.SOLVER.MAX_ITER]
    if steps and cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        value = [int(cfg.SOLVER.MAX_ITER * share) for share in (0.67, 0.89)]
        reason = f"the rate never falls: the steps {steps} are behind the end, iteration {cfg.SOLVER.MAX_ITER}"
        yield Advice("SOLVER.STEPS", list(cfg.SOLVER.STEPS), value, reason, "several points of AP at the end")
