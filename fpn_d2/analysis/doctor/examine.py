"""What ``fpn-d2 doctor`` does: reads, says, and writes a configuration if asked to."""

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fpn_d2.analysis.errors.detections import Objects, Scored
from fpn_d2.engine import load_prepared
from fpn_d2.engine.checks import check_data_files
from fpn_d2.engine.device import on_this_machine
from fpn_d2.errors import UserError
from fpn_d2.files import write_atomically

from .config_advice import Advice, advise
from .memory import memory_advice


def examine(config: str, opts: list[str]) -> tuple[CfgNode, list[Advice]]:
    """Look at a configuration beside the data sets that it trains on; nothing is changed.

    Args:
        config: path of a YAML file.
        opts: KEY value pairs over it.

    Raises:
        UserError: something in the configuration is wrong, or it names no data to train on.
    """
    cfg = on_this_machine(load_prepared(config, opts), warn=False)
    if not cfg.DATASETS.TRAIN:
        raise UserError(f"{config} names nothing to train on: set DATASETS.TRAIN")
    check_data_files(cfg, train=True)
    data = training_set(cfg)
    return cfg, [*advise(cfg, data), *memory_advice(cfg, data)]


def training_set(cfg: CfgNode) -> Scored:
    """The data sets of ``DATASETS.TRAIN`` as arrays."""
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    names = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", []))
    rows = [(i, one) for i, record in enumerate(records) for one in record.get("annotations", [])]
    box = np.array([BoxMode.convert(one["bbox"], one["bbox_mode"], BoxMode.XYXY_ABS) for _, one in rows], float)
    truth = Objects(
        np.array([i for i, _ in rows], np.int64),
        np.array([one["category_id"] for _, one in rows], np.int64),
        box.reshape(-1, 4),
        np.ones(len(rows)),
        np.array([bool(one.get("iscrowd", 0)) for _, one in rows], bool),
    )
    sizes = np.array([[record["height"], record["width"]] for record in records], float).reshape(-1, 2)
    nothing = Objects(*(getattr(truth, name)[:0] for name in ("image", "label", "box", "score", "crowd")))
    return Scored([record["file_name"] for record in records], sizes, names, truth, nothing)


def write_config(config: str, advice: list[Advice], path: str) -> None:
    """Write a configuration on top of ``config`` with what is proposed, each with its reason as a comment.

    Raises:
        UserError: the file is there already.
    """
    if os.path.exists(path):
        raise UserError(f"{path} exists already: name another file")
    base = os.path.relpath(os.path.abspath(config), os.path.dirname(os.path.abspath(path)))
    lines = [f'_BASE_: "{base}"']
    chosen = sorted((one for one in advice if one.value is not None), key=lambda one: one.key)
    open_sections: list[str] = []
    for one in chosen:
        *sections, name = one.key.split(".")
        common = 0
        while common < min(len(sections), len(open_sections)) and sections[common] == open_sections[common]:
            common += 1
        for depth in range(common, len(sections)):
            lines.append(f"{'  ' * depth}{sections[depth]}:")
        open_sections = sections
        indent = "  " * len(sections)
        lines.append(f"{indent}# {one.reason}" + (f"; expected: {one.gain}" if one.gain else ""))
        lines.append(f"{indent}{name}: {_yaml(one.value)}  # was {_yaml(one.now)}")
    write_atomically(path, "\n".join(lines) + "\n")


def _yaml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
