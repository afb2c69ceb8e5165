"""The results of a study in one small file, to hand on: to go on elsewhere, or to set a variant of one's own beside.

    records.json    {"runs/fpn/seed_1/result.json": {"settings": digest of them, "AP": ..., ...}, ...}
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fpn_d2.errors import UserError
from fpn_d2.files import locate, write_atomically

NAME = "records.json"


def write_records(folder: Path) -> None:
    """Write ``records.json`` of all results that are in the folder of a study."""
    records = {}
    for path in sorted(folder.glob("*/*/*/result.json")):
        found = json.loads(path.read_text())
        records[path.relative_to(folder).as_posix()] = found | {"settings": _digest(found["settings"])}
    # A line for each, so that a new one is one line of a change.
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in records.items()]
    write_atomically(str(folder / NAME), "{\n" + ",\n".join(lines) + "\n}\n")


def take_over(records: str | os.PathLike, folder: Path, tasks: Iterable[dict]) -> int:
    """Write the results of those tasks that have none and are recorded with the same settings.

    Args:
        records: a file that :func:`write_records` wrote.
        folder: of this study.
        tasks: see :mod:`.worker`.

    Returns:
        How many.

    Raises:
        UserError: there is no such file, or it is none of records.
    """
    path = locate(records, "the results of another study")
    try:
        known = json.loads(path.read_text())
        pairs = {name: (found.pop("settings"), found) for name, found in known.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no {NAME} of a study ({error!r}); expected one that fpn-d2 study wrote") from None
    taken = 0
    for task in tasks:
        result = Path(task["result"])
        name = result.relative_to(folder).as_posix()
        if not result.exists() and name in pairs and pairs[name][0] == _digest(task["settings"]):
            result.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(str(result), json.dumps({"settings": task["settings"], **pairs[name][1]}, indent=1) + "\n")
            taken += 1
    return taken


def _digest(settings: dict) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
