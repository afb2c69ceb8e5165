"""What ``fpn-d2 levels`` does."""

import os
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode

from fpn_d2.analysis.errors.detections import read_truth
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.inference import Predictor
from fpn_d2.inference.load import configuration_of

from .collect import collect
from .pictures import draw_levels, draw_maps
from .report import Report, report_levels, write_report

_SHOWN = 4  # images in the picture


def levels_of_boxes(
    path: str,
    annotations: str,
    output: str,
    *,
    config: str | None = None,
    opts: Sequence[str] = (),
    canonical_box_size: float | None = None,
    canonical_level: int | None = None,
    other_rule: str | None = None,
) -> tuple[Report, list[str]]:
    """Report on the boxes of a data set alone.

    Args:
        path: a checkpoint, or a configuration file (".yaml").
        annotations: COCO json.
        output: folder for the report.
        config: of a checkpoint that holds none.
        opts: over the configuration.
        canonical_box_size: of a rule to compare with.
        canonical_level: of a rule to compare with.
        other_rule: name of a rule to compare with, as "finest".

    Returns:
        The report, and the files that were written.
    """
    if path.endswith((".yaml", ".yml")):
        config = path
    cfg, _ = configuration_of(path, config, opts)
    rule = Rule.of(cfg)
    others = _others(cfg, rule, canonical_box_size, canonical_level, other_rule)
    report = report_levels(read_truth(annotations), rule, with_model=False, others=others)
    return report, write_report(report, output)


def levels_of_model(
    predictor: Predictor,
    annotations: str,
    images: str,
    output: str,
    *,
    max_images: int | None = None,
    picture_score: float = 0.5,
    canonical_box_size: float | None = None,
    canonical_level: int | None = None,
    other_rule: str | None = None,
    progress: bool = True,
) -> tuple[Report, list[str]]:
    """Report on a model that runs over a data set, with ``detections.jpg`` (by level) and ``maps.jpg``.

    Args:
        predictor: the model.
        annotations: COCO json.
        images: folder of its images.
        output: folder for the report.
        max_images: run it on so many, spread evenly; None: on all.
        picture_score: detections of at least this score are drawn.
        canonical_box_size: of a rule to compare with.
        canonical_level: of a rule to compare with.
        other_rule: name of a rule to compare with, as "finest".
        progress: whether to show a bar.

    Returns:
        The report, and the files that were written.
    """
    rule = Rule.of(predictor.cfg)
    others = _others(predictor.cfg, rule, canonical_box_size, canonical_level, other_rule)
    scored, proposals = collect(predictor, annotations, images, max_images, progress)
    report = report_levels(scored, rule, proposals, others=others)
    paths = write_report(report, output)
    chosen = np.unique(np.linspace(0, len(scored.files) - 1, min(_SHOWN, len(scored.files))).round().astype(int))
    shown = [os.path.join(images, scored.files[i]) for i in chosen]
    for name, make in (
        ("detections.jpg", lambda: draw_levels(predictor, rule, shown, picture_score)),
        ("maps.jpg", lambda: draw_maps(predictor, shown[0])),
    ):
        paths.append(os.path.join(output, name))
        cv2.imwrite(paths[-1], make(), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return report, paths


def _others(cfg: CfgNode, rule: Rule, size: float | None, level: int | None, name: str | None) -> tuple[Rule, ...]:
    found = () if size is None and level is None else (rule.other(size, level),)
    return found if name is None else (*found, Rule.of(cfg, name))
