"""What becomes of a report: an error that stops, or warnings and a list of what was left out."""

import hashlib
import logging
import multiprocessing
import os
import re
from pathlib import Path

from detectron2.config import CfgNode

from fpn_d2.errors import UserError

from .defects import FILL, MEND, SKIP, STOP, TELL, Report

logger = logging.getLogger(__name__)

ON_BAD_DATA = ("skip", "error")
# What is used as it is and may still be a mistake, or end badly: warned of.
_DOUBTFUL = ("box_like_corners", "category_name_twice", "many_objects", "pixels_16_bit", "pixels_float")
# What has been said at registration, which comes before the log file is set up.
_said: dict[str, list[str]] = {}


def refuse(report: Report, on_bad_data: str) -> None:
    """Stop if the set cannot be used, or has defects and DATASETS.ON_BAD_DATA is "error".

    Raises:
        UserError: No such value; or one message that counts the defects by kind and names the first of each.
    """
    if on_bad_data not in ON_BAD_DATA:
        raise UserError(f"DATASETS.ON_BAD_DATA is {on_bad_data!r}; it must be {' or '.join(ON_BAD_DATA)}")
    if report.kinds(STOP):
        raise UserError(f"{report.source}: {report.reasons()}" + _and(" (also found: ", report.phrase(SKIP), ")"))
    if on_bad_data == "error" and report.count(SKIP, MEND):
        raise UserError(
            f"{report.source}: {report.count(SKIP, MEND)} defects: {report.phrase(SKIP, MEND)}. `fpn-d2 data check` "
            "lists and mends them; DATASETS.ON_BAD_DATA skip goes on without what is of no use"
        )


def say(report: Report, copy: Path | None, list_file: Path, *more: str) -> None:
    """Warn of what was left out and mended, and write the list of it.

    Args:
        report: What was found.
        copy: Copy of the annotations that is used instead; None: there is none.
        list_file: Where the list goes.
        *more: Further warnings of this set; empty ones are passed over.
    """
    lines = [
        line
        for line in (
            _and(f"{report.source}: left out: ", report.phrase(SKIP)),
            _and(f"{report.source}: mended: ", report.phrase(MEND)),
        )
        if line
    ]
    if lines:
        list_file.parent.mkdir(parents=True, exist_ok=True)
        report.write(list_file, used=str(copy) if copy else None)
        lines.append(f"All of it is listed in {list_file}")
    lines += [f"{report.source}: {report.counted(kind)}" for kind in _DOUBTFUL if report.counts[kind]]
    lines += [f"{report.source}: {text}" for text in more if text]
    if _speaks():
        for line in lines:
            logger.warning(line)
        for line in (
            _and(f"{report.source}: used as it is: ", report.phrase(TELL)),
            _and(f"{report.source}: filled in for COCO's tools: ", report.phrase(FILL)),
            f"{report.source}: uses the copy {copy}" if copy else "",
        ):
            if line:
                logger.info(line)
                lines.append(line)
    _said[report.source] = lines


def into_the_log() -> None:
    """Write what has been said of all sets once more, into the log file alone: now it is there."""
    for lines in _said.values():
        for line in lines:
            logger.debug(line)


def file_about(cfg: CfgNode, name: str, ending: str) -> Path:
    """Where a file about the data set ``name`` is written."""
    plain = re.sub(r"[^\w.-]", "_", name)
    if plain != name:  # the names "my val" and "my/val" are two files
        plain += "_" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return Path(os.path.abspath(cfg.OUTPUT_DIR)) / "data_sets" / f"{plain}{ending}"


def _and(before: str, text: str, after: str = "") -> str:
    return f"{before}{text}{after}" if text else ""


def _speaks() -> bool:
    """Whether this process is the one that speaks: not one that another has started, nor another rank than 0."""
    return multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
