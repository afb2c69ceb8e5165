"""The results of an evaluation as a table for people."""

from collections.abc import Mapping

from detectron2.config import CfgNode
from tabulate import tabulate

# Task and metric, the first that was measured; as Detectron2's evaluators call them.
_HEADLINES = (
    ("bbox", "AP50"),
    ("segm", "AP50"),
    ("panoptic_seg", "PQ"),
    ("sem_seg", "mIoU"),
    ("box_proposals", "AR@1000"),
    ("box_proposals", "AR@100"),
)


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


def headline(cfg: CfgNode, results: Mapping) -> str:
    """The one figure of a run on the first of DATASETS.TEST, in percent: box AP50, as "AP50 84.1".

    Where there is none, what the task has instead, as "box_proposals AR@1000 57.3" or "sem_seg mIoU 40.2".
    """
    tasks = next(iter(by_dataset(cfg, results).values()), {})
    for task, metric in _HEADLINES:
        if metric in tasks.get(task, {}):
            return f"{'' if task == 'bbox' else f'{task} '}{metric} {tasks[task][metric]:.1f}"
    for task, metrics in tasks.items():  # of an evaluator of somebody's own
        for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
            return f"{task} {metric} {value:.1f}"
    return "nothing was measured"
