"""The speed of each part beside Detectron2's own: rows that are measured one by one, each in a process of its own.

    python -m fpn_d2.analysis.benchmark.run '{"row": ..., "rounds": ..., "result": ..., ...}'

measures one row in this process, which :func:`run_benchmarks` starts.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import fpn_d2
from fpn_d2.config_names import own_folder
from fpn_d2.engine import UserError
from fpn_d2.files import writable_folder, write_atomically
from fpn_d2.huge_pages import HUGE_PAGES
from fpn_d2.native.build import find_compiler

from ..compare.run import environment, plain
from ..measure.child import child_environment
from .line import Timing
from .rows import ROWS, Row, choose_rows

SCHEMA = 1  # of the files; another number, other keys
_ROOT = Path(fpn_d2.__file__).resolve().parents[1]
# What decides how fast a row is, and what measures it.
_CODE = (
    "fpn_d2/config.py",
    *(f"fpn_d2/{room}/**/*" for room in ("modeling", "inference", "data", "engine", "fast", "native")),
    *(f"fpn_d2/analysis/benchmark/{name}.py" for name in ("line", "parts", "detector", "data", "engines")),
    "fpn_d2/analysis/engines/*",
    *(f"fpn_d2/analysis/measure/{name}.py" for name in ("timing", "memory", "peak")),
    *("fpn_d2/analysis/subjects.py", "fpn_d2/analysis/compare/measure.py", "fpn_d2/analysis/compare/memory_worker.py"),
    *("configs/Base-FPN.yaml", "configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
)
_SUFFIXES = (".py", ".cpp", ".h", ".yaml")
_PACKAGES = (
    *("faster-coco-eval", "nncf", "numpy", "onnxruntime", "opencv-python", "opencv-python-headless", "openvino"),
    *("Pillow", "pycocotools"),
)
Progress = Callable[[int, int], object]
# Measures a row under the settings; {"lines": [...]}, or {"failed": why}.
Measure = Callable[[Row, dict, Progress], dict]


def run_benchmarks(
    output: str,
    *,
    rows: Sequence[str] | None = None,
    rounds: int = 10,
    warmup: int = 2,
    threads: int = 0,
    repeat: bool = False,
    progress: bool | None = None,
    measure: Measure | None = None,
) -> dict[str, dict]:
    """Measure rows and keep each in ``output``/NAME.json; those that are there already are kept.

    A row is measured again if its settings, the versions of what it runs on or the code have changed, or if it failed.
    One that fails does not stop the others.

    Args:
        output: folder; made if it is not there.
        rows: names of some of `benchmark_rows.ROWS`, with * for a part of a name; None: all.
        rounds: measured rounds, Detectron2's and ours in turn; rows whose calls take seconds have fewer.
        warmup: rounds before them.
        threads: of PyTorch; 0: as they are.
        repeat: measure rows again that are there.
        progress: show a progress bar; None: where stderr is a terminal.
        measure: measures one row; None: in a fresh process.

    Returns:
        What is in the files of the rows that were asked for, by name.

    Raises:
        UserError: there is no such row, or a number cannot be.
    """
    for name, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("threads", threads, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; expected at least {least}")
    chosen = choose_rows(rows)
    folder = writable_folder(output)
    measure = measure or _InChild(folder)
    results = {}
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=len(chosen), bar_format=bar_format, disable=None if progress is None else not progress) as bar:
        for index, row in enumerate(chosen):
            bar.set_description(row.name)
            settings = _settings(row, rounds, warmup, threads or torch.get_num_threads())
            path, about = folder / f"{row.name}.json", {"settings": settings, "environment": _environment(settings)}
            kept = _read(path)
            if repeat or not _is_done(kept, about):
                found = measure(row, settings, lambda done, total, index=index: _show(bar, index, done, total))
                kept = plain({"schema": SCHEMA, "row": row.name, "what": row.what, "unit": row.unit, **about, **found})
                write_atomically(str(path), json.dumps(kept, indent=1, allow_nan=False) + "\n")
            results[row.name] = kept
            _show(bar, index + 1, 0, 1)
    return results


def read_results(folder: str | os.PathLike) -> dict[str, dict]:
    """What :func:`run_benchmarks` has kept in ``folder``, by the name of the row; rows that never ran are missing.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: run fpn-d2 benchmark --output {folder} first")
    found = {name: _read(Path(folder) / f"{name}.json") for name in ROWS}
    return {name: result for name, result in found.items() if result is not None}


def _read(path: Path) -> dict | None:
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) and result.get("schema") == SCHEMA else None


def _is_done(kept: dict | None, about: dict) -> bool:
    return kept is not None and "lines" in kept and all(kept.get(key) == plain(value) for key, value in about.items())


def _show(bar: tqdm, rows: int, done: int, total: int) -> None:
    bar.set_postfix_str(f"call {done} of {total}" if done else "", refresh=False)
    bar.n = rows + done / max(total, 1)
    bar.refresh()


def _settings(row: Row, rounds: int, warmup: int, threads: int) -> dict:
    if row.most_rounds is not None:
        rounds, warmup = min(rounds, row.most_rounds), min(warmup, 1)
    timing = {"rounds": rounds, "warmup": warmup, "threads": threads}
    return {**timing, **row.settings, "variables": dict(row.variables)}


def _environment(settings: Mapping[str, object]) -> dict:
    """The versions, the machine and the code that a row is measured with."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    about = {**environment(torch.device("cpu")), "threads": settings["threads"]}
    ours = [name for name in os.environ if name.startswith("FPN_D2_") and name != "FPN_D2_CACHE"]
    set_here = {name: os.environ[name] for name in (*ours, HUGE_PAGES) if name in os.environ}
    return {**about, "compiler": _compiler(), "packages": packages, "variables": set_here, "code": _code()}


def _compiler() -> str | None:
    try:
        command = find_compiler()
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or command)[0]


def _code() -> str:
    """A digest of the code: another one, and what was measured may no longer hold."""
    digest = hashlib.sha256()
    roots = {pattern: own_folder().parent if pattern.startswith("configs/") else _ROOT for pattern in _CODE}
    files = {path.relative_to(root).as_posix(): path for pattern, root in roots.items() for path in root.glob(pattern)}
    for name, path in sorted(files.items()):
        if path.suffix in _SUFFIXES:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class _InChild:
    """Measures a row in a fresh process, whose messages go to NAME.log beside the results."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, row: Row, settings: dict, progress: Progress) -> dict:
        log = self._folder / f"{row.name}.log"
        with tempfile.TemporaryDirectory() as scratch, open(log, "w") as messages:
            result = Path(scratch) / "result.json"
            task = {name: settings[name] for name in ("rounds", "warmup", "threads")} | {"row": row.name}
            command = [sys.executable, "-m", __name__, json.dumps(task | {"result": str(result)})]
            variables = {**child_environment(), **row.variables}
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=variables)
            try:
                for words in child.stdout:
                    if found := re.fullmatch(r"call (\d+) of (\d+)\n", words):
                        progress(int(found[1]), int(found[2]))
                child.wait()
            finally:  # also where the user stops it
                child.kill()
                child.wait()
            if result.exists():
                return json.loads(result.read_text())
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return {"failed": f"its process ended with {child.returncode}: {last}"}


def measure_row(row: Row, settings: Mapping[str, object], progress: Progress) -> dict:
    """Measure a row in this process; see ``Measure``."""
    timing = Timing(settings["rounds"], settings["warmup"], progress)
    try:
        return {"lines": row.measure(timing, **row.settings)}
    except Exception as error:  # whatever it is, the other rows are still to be measured
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _main(task: dict) -> None:
    said = sys.stdout

    def progress(done: int, total: int) -> None:
        print(f"call {done} of {total}", file=said, flush=True)

    torch.set_num_threads(task["threads"])
    with contextlib.redirect_stdout(sys.stderr):  # tables and the like
        found = measure_row(ROWS[task["row"]], task, progress)
    write_atomically(task["result"], json.dumps(plain(found), allow_nan=False))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
