"""The results of an evaluation as a table for people."""

import math
from collections.abc import Mapping

from detectron2.config import CfgNode
from tabulate import tabulate


def by_dataset(cfg: CfgNode, results: Mapping) -> dict[str, dict]:
    """Bring results into one shape: {data set: {task: {metric: value}}}.

    Detectron2 leaves out the level of the data set where DATASETS.TEST has one entry.
    """
    names = list(cfg.DATASETS.TEST)
    if len(names) == 1:
        return {names[0]: dict(results)}
    found: dict[str, dict] = {name: {} for name in names}
    for key, tasks in results.items():
        name = key.removesuffix("_TTA")
        for task, metrics in tasks.items():
            found.setdefault(name, {})[task if key == name else f"{task}_TTA"] = metrics
    return found


def results_table(cfg: CfgNode, results: Mapping) -> str:
    """Tables of AP, AP50, AP75 and AP by size, and of AP by class, for each data set and task.

    Args:
        cfg: The configuration; DATASETS.TEST is read.
        results: As `Trainer.train` and `Trainer.test` return them. Metrics are in percent; nan where there is
            nothing to measure.
    """
    blocks = []
    for dataset, tasks in by_dataset(cfg, results).items():
        for task, metrics in tasks.items():
            if not isinstance(metrics, Mapping):
                continue
            summary = {k: v for k, v in metrics.items() if "-" not in k}
            by_class = {k.split("-", 1)[1]: v for k, v in metrics.items() if k.startswith("AP-")}
            lines = [f"{dataset}, {task}", _table([summary.values()], list(summary))]
            if by_class:
                lines.append(_table(by_class.items(), ["class", "AP"]))
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _table(rows: object, headers: list[str]) -> str:
    return tabulate([list(row) for row in rows], headers=headers, floatfmt=".1f", tablefmt="simple")


def ap50(cfg: CfgNode, results: Mapping) -> float:
    """Box AP50, in percent, on the first of DATASETS.TEST; nan where it was not measured."""
    for tasks in by_dataset(cfg, results).values():
        return float(tasks.get("bbox", {}).get("AP50", math.nan))
    return math.nan
