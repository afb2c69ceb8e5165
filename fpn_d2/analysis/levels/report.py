"""What `fpn-d2 levels` shows: who is on which level, how well it does there, and what another rule would do."""

import json
import os
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from fpn_d2.analysis.errors.detections import Objects, Scored, take
from fpn_d2.analysis.errors.tide import average_precision, match, overlaps
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.files import writable_folder, write_atomically

_IOUS = np.linspace(0.5, 0.95, 10)
SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))  # COCO's


@dataclass
class Report:
    """Figures by level and by size.

    Attributes:
        rule: the level rule.
        objects: side in pixels of the network's input, and level, of each object.
        rows: for each level and size: "objects", "cells" (median side of an object in cells of its level), and where a
            model ran "proposals", "detections", "proposal_recall" and "recall" at IoU 0.5, "AP", in percent.
        others: share of the objects on each level under other rules, by their words.
    """

    rule: Rule
    objects: tuple[np.ndarray, np.ndarray]
    rows: dict[str, dict]
    others: dict[str, list[float]]

    def table(self) -> str:
        """Two tables in Markdown."""
        keys = list(next(iter(self.rows.values())))
        lines = ["| | " + " | ".join(key.replace("_", " ") for key in keys) + " |", "| --- |" + " ---: |" * len(keys)]
        for name, row in self.rows.items():
            lines.append(f"| {name} | " + " | ".join(_number(row[key]) for key in keys) + " |")
        levels = [f"p{level}" for level in self.rule.levels]
        lines += ["", "Objects per level, in percent:", ""]
        lines += ["| canonical box size, level, or rule | " + " | ".join(levels) + " |"]
        lines += ["| --- |" + " ---: |" * len(levels)]
        for name, shares in self.others.items():
            lines.append(f"| {name} | " + " | ".join(f"{100 * share:.0f}" for share in shares) + " |")
        return "\n".join(lines)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else "" if np.isnan(value) else f"{value:.1f}"


def report_levels(
    scored: Scored, rule: Rule, proposals: Objects | None = None, with_model: bool = True, others: tuple[Rule, ...] = ()
) -> Report:
    """Count and measure by level.

    Args:
        scored: the data set; its detections count with ``with_model``.
        rule: of the model.
        proposals: what its RPN gave.
        with_model: whether a model ran.
        others: rules to compare with; those of half and of twice the canonical box size are always there.
    """
    scales = rule.scales(scored.sizes)
    truth = take(scored.truth, ~scored.truth.crowd)
    level = rule.assign(truth.box, scales[truth.image])
    sides = np.sqrt(truth.area) * scales[truth.image]
    groups = {f"p{k}": (lambda o, k=k: rule.assign(o.box, scales[o.image]) == k) for k in rule.levels}
    groups |= {name: (lambda o, a=a, b=b: (o.area >= a) & (o.area < b)) for name, a, b in SIZES}
    rows = {}
    pairs = overlaps(scored, 0.5) if with_model else None
    of_proposals = None
    if proposals is not None:
        of_proposals = Scored(scored.files, scored.sizes, [""], _without_class(scored.truth), proposals)
        near = np.unique(overlaps(of_proposals, 0.5)[1])
    for name, member in groups.items():
        inside = member(truth)
        cells = sides[inside] / 2.0 ** level[inside]
        row: dict = {"objects": int(inside.sum()), "cells": float(np.median(cells)) if len(cells) else float("nan")}
        if of_proposals is not None:
            here = member(scored.truth) & ~scored.truth.crowd
            row["proposals"] = int(member(proposals).sum())
            row["proposal_recall"] = 100 * float(np.isin(np.flatnonzero(here), near).mean()) if here.any() else np.nan
        if with_model:
            row["detections"] = int(member(scored.found).sum())
            row |= dict(zip(("AP", "recall"), group_ap(scored, pairs, member), strict=True))
        rows[name] = row
    shares = {}
    half, twice = (rule.other(rule.canonical_box_size * factor) for factor in (0.5, 2.0))
    for one in (rule, half, twice, *others):
        found = one.assign(truth.box, one.scales(scored.sizes)[truth.image])
        shares[one.words()] = [float((found == k).mean()) if len(found) else 0.0 for k in one.levels]
    return Report(rule, (sides, level), rows, shares)


def _without_class(objects: Objects) -> Objects:
    one = take(objects, np.arange(len(objects)))
    one.label = np.zeros(len(one), np.int64)
    return one


def group_ap(scored: Scored, pairs: tuple, member) -> tuple[float, float]:
    """AP over IoU 0.5 to 0.95 and the recall at 0.5 for the objects of one group, in percent.

    As in COCO's figures by area: detections that match an object of another group count for nothing, and of those that
    match none only the ones that are of the group themselves count as wrong.

    Args:
        scored: the data set.
        pairs: `overlaps` of it from IoU 0.5 on.
        member: tells of objects which are of the group.
    """
    found, truth = scored.found, scored.truth
    objects, own = member(truth) & ~truth.crowd, member(found)
    if not objects.any():
        return float("nan"), float("nan")
    detection, object_, iou = pairs
    same = found.label[detection] == truth.label[object_]
    values, recall = [], 0.0
    for t_f in _IOUS:
        matched, target = match(scored, detection[same], object_[same], iou[same], t_f)
        right = (target >= 0) & objects[np.maximum(target, 0)]
        counts = right | ((target < 0) & own)
        if t_f == _IOUS[0]:
            recall = 100.0 * float((matched[objects] >= 0).mean())
        for label in np.unique(truth.label[objects]):
            rows = counts & (found.label == label)
            number = int((objects & (truth.label == label)).sum())
            values.append(average_precision(found.score[rows], right[rows], number))
    return float(np.mean(values)), recall


def figure(report: Report) -> Figure:
    """Sizes with the borders of the levels; who is on which level; how well it does; other rules."""
    rule, (sides, _) = report.rule, report.objects
    names = [f"p{level}" for level in rule.levels]
    rows = [report.rows[name] for name in names]
    measured = [key for key in ("proposal_recall", "recall", "AP") if key in rows[0]]
    fig = Figure(figsize=(15 if measured else 11.5, 3.8), layout="constrained")
    axes = fig.subplots(1, 4 if measured else 3)
    low, high = (np.log2(max(s, 1.0)) for s in ((sides.min(), sides.max()) if len(sides) else (16, 512)))
    edges = 2.0 ** np.arange(np.floor(low * 4) / 4, high + 0.5, 0.25)
    axes[0].hist(sides, bins=edges, color="tab:blue")
    axes[0].set_xscale("log", base=2)
    axes[0].set(title="objects by size", xlabel="side in pixels of the network's input", ylabel="objects")
    for number, level in enumerate(rule.levels):
        start = rule.canonical_box_size * 2.0 ** (level - rule.canonical_level)
        if number:
            axes[0].axvline(start, color="black", linewidth=0.8, linestyle=":")
        x = start * 2**0.5 if number else start * 2 * 2**-0.5
        axes[0].text(x, 0.97, f"p{level}", ha="center", va="top", transform=axes[0].get_xaxis_transform())
    kinds = [key for key in ("objects", "proposals", "detections") if key in rows[0]]
    for number, key in enumerate(kinds):
        total = max(sum(row[key] for row in rows), 1)
        place = np.arange(len(names)) + (number - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
        axes[1].bar(place, [100 * row[key] / total for row in rows], 0.8 / len(kinds), label=f"{key} ({total})")
    axes[1].set_xticks(range(len(names)), names)
    axes[1].set(title="share of each level", ylabel="percent")
    _legend_below(axes[1])
    if measured:
        for number, key in enumerate(measured):
            place = np.arange(len(names)) + (number - (len(measured) - 1) / 2) * 0.8 / len(measured)
            axes[2].bar(place, [row[key] for row in rows], 0.8 / len(measured), label=key.replace("_", " "))
        axes[2].set_xticks(range(len(names)), names)
        axes[2].set(title="recall at IoU 0.5, and AP", ylabel="percent", ylim=(0, 100))
        _legend_below(axes[2])
    bottom = np.zeros(len(report.others))
    for number, name in enumerate(names):
        share = 100 * np.array([shares[number] for shares in report.others.values()])
        axes[-1].bar(range(len(bottom)), share, bottom=bottom, label=name)
        bottom += share
    axes[-1].set_xticks(range(len(bottom)), report.others, fontsize=8)
    axes[-1].set(title="objects by rule: size, level", ylabel="percent")
    axes[-1].legend(fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return fig


def _legend_below(axes) -> None:
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), columnspacing=1.0)


def write_report(report: Report, folder: str) -> list[str]:
    """Write ``levels.json``, ``levels.md`` and ``levels.png`` into a folder; returns the files."""
    writable_folder(folder)
    paths = [os.path.join(folder, name) for name in ("levels.json", "levels.md", "levels.png")]
    content = {"rows": report.rows, "others": report.others, "levels": list(report.rule.levels)}
    write_atomically(paths[0], json.dumps(content, indent=1) + "\n")
    write_atomically(paths[1], report.table() + "\n")
    figure(report).savefig(paths[2], dpi=110)
    return paths
