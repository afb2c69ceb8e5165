"""What the output folder of a run holds: each part, or in words why it is not there."""

import os
import re
from dataclasses import dataclass, field

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_d2.analysis.doctor.run_advice import explain_run, read_metrics
from fpn_d2.analysis.errors.detections import Scored, read
from fpn_d2.data.coco_format import sources
from fpn_d2.data.findings import file_about
from fpn_d2.errors import UserError, not_found, one_line
from fpn_d2.files import locate
from fpn_d2.inference.load import configuration_of

_MARKS = ("config.yaml", "metrics.json", "log.txt", "last_checkpoint")  # one of them makes a folder a run's
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Run:
    """A run.

    Attributes:
        folder: its output folder.
        cfg: its configuration.
        records: of ``metrics.json``, in order.
        remarks: of the doctor.
        environment: lines of Detectron2's report in ``log.txt``, name and value, of the last start.
        command: the command line of the last start.
        checkpoints: name and bytes of each.
        scored: the test set and the last evaluation's detections in it.
        dataset: name of that set.
        images: folder of its images; "" if it is not there.
        missing: what is not there, and why, by the name of the part.
    """

    folder: str
    cfg: CfgNode | None = None
    records: list[dict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    command: str = ""
    checkpoints: list[tuple[str, int]] = field(default_factory=list)
    scored: Scored | None = None
    dataset: str = ""
    images: str = ""
    missing: dict[str, str] = field(default_factory=dict)

    def series(self, *names: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Iterations and values of what was recorded, by name; of a resumed run the values that were recorded last."""
        found = {}
        for name in names:
            values = {
                record["iteration"]: record[name]
                for record in self.records
                if isinstance(record.get(name), (int, float))
            }
            if values:
                order = sorted(values)
                found[name] = np.array(order), np.array([values[i] for i in order], float)
        return found

    def names(self, pattern: str) -> list[str]:
        """Names of records that match a pattern as a whole, in their order."""
        every = {name: None for record in self.records for name in record}
        return [name for name in every if re.fullmatch(pattern, name)]


def read_run(folder: str, annotations: str | None = None, images: str | None = None) -> Run:
    """Read what there is.

    Args:
        folder: the output folder of a run.
        annotations: of the test set; None: what the configuration says.
        images: folder of the test set's images; None: what the configuration says.

    Raises:
        UserError: there is no such folder, or it is not one of a run.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: {not_found(folder)}")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _MARKS):
        raise UserError(f"{folder} is not the output folder of a run: it has none of {', '.join(_MARKS)}")
    run = Run(folder)
    for part, fill in (
        ("config", _configuration),
        ("metrics", _metrics),
        ("log", _log),
        ("detections", lambda one: _detections(one, annotations, images)),
    ):
        try:
            fill(run)
        except (ValueError, OSError) as error:  # a UserError is one
            run.missing[part] = one_line(error)
    run.checkpoints = [
        (entry.name, entry.stat().st_size)
        for entry in sorted(os.scandir(folder), key=lambda one: one.name)
        if entry.name.endswith(".pth") and entry.is_file()
    ]
    return run


def _configuration(run: Run) -> None:
    path = os.path.join(run.folder, "config.yaml")
    if not os.path.isfile(path):
        raise UserError("config.yaml is not in the folder")
    cfg = configuration_of("", path)[0].clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = run.folder  # where it lies now
    run.cfg = cfg


def _metrics(run: Run) -> None:
    if not os.path.isfile(os.path.join(run.folder, "metrics.json")):
        raise UserError("metrics.json is not in the folder")
    run.records = read_metrics(run.folder)
    run.remarks = explain_run(run.folder)


def _log(run: Run) -> None:
    """Of the last start in the log: the table of Detectron2's environment report, and the command."""
    path = os.path.join(run.folder, "log.txt")
    if not os.path.isfile(path):
        raise UserError("log.txt is not in the folder")
    inside = 0  # rules of the table that were passed
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            line = _COLOURS.sub("", line.rstrip())
            if line.endswith("Environment info:"):
                run.environment, inside = [], 0
            elif set(line) == {"-", " "} and inside < 2:
                inside += 1
            elif inside == 1:
                name, _, value = line.partition("  ")
                run.environment.append((name.strip(), value.strip()))
            elif "Command line arguments: " in line:
                run.command, inside = line.split("Command line arguments: ", 1)[1], 2


def _detections(run: Run, annotations: str | None, images: str | None) -> None:
    path = os.path.join(run.folder, "inference", "coco_instances_results.json")
    if not os.path.isfile(path):
        raise UserError("inference/coco_instances_results.json is not in the folder: the run was not evaluated")
    if run.cfg is not None and run.cfg.DATASETS.TEST:
        run.dataset = run.cfg.DATASETS.TEST[-1]  # of several, the last one's are left in the file
    if annotations is None or images is None:
        if not run.dataset:
            raise UserError("it is not known which data set was evaluated: name it (--annotations, --images)")
        known = _source(run.cfg, run.dataset)
        annotations, images = annotations or known[0], images or known[1]
    run.scored = read(str(locate(annotations, f"the annotations of {run.dataset or 'the test set'}")), path)
    try:
        run.images = str(locate(images, f"the images of {run.dataset or 'the test set'}", folder=True))
    except UserError as error:
        run.missing["images"] = one_line(error)


def _source(cfg: CfgNode, name: str) -> tuple[str, str]:
    """Annotation file and image folder of a data set: the repaired copy where the run made one."""
    copy = str(file_about(cfg, name, ".json"))
    known = sources(cfg).get(name)
    if known is None and name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        known = metadata.get("json_file"), metadata.get("image_root")
    json_file = copy if os.path.isfile(copy) else known and known[0]
    if not json_file or not known[1]:
        raise UserError(f"where data set {name} lies is not known here: name it (--annotations, --images)")
    return json_file, known[1]
