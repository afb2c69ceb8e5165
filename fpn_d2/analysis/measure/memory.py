"""Peak of memory of a call, by which it raises that of its process, or of a process of its own.

A process has one peak for all that it ever did: what a model before it took would hide what this one takes.
"""

import ctypes
import gc
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .child import child_environment

MODES = ("inference", "training")
# The first call makes room that later ones use again.
CALLS = 2


def peak_on_gpu(call: Callable[[], object], device: torch.device) -> float:
    """MB by which ``call`` raises the peak of what PyTorch's tensors take on ``device``, what it leaves there included.

    A training step leaves gradients and the optimizer's state, which the next one finds there: hence the first counts.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_in_child(worker: str, task: dict) -> float | str:
    """MB by which a call raises the peak of a fresh process' resident memory; or, in words, why that is not known.

    Args:
        worker: the module that does in that process what ``task`` says, as ``python -m worker JSON``, and writes
            {"peak": MB} to the file task["result"].
        task: what it is told; "variables", where there are any, are set in the environment of the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = child_environment() | task.get("variables", {})
        command = [sys.executable, "-m", worker, json.dumps(task | {"result": str(result)})]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not result.exists():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return f"the process that measures it ended with {done.returncode}: {last}"
        return json.loads(result.read_text())["peak"]


def raised_peak(call: Callable[[], object]) -> float | str:
    """MB by which ``call`` raises the peak of this process' memory above what it holds now."""
    gc.collect()
    _give_back_free_memory()
    _forget_peak()
    before, peak_before = _memory("VmRSS"), _memory("VmHWM")
    call()
    peak = _memory("VmHWM")
    if peak <= peak_before and peak_before - before > 1:
        return "less than what building the model took"
    return peak - before


def _give_back_free_memory() -> None:
    """Hand what the C library keeps for later to the system: work that fits in there would seem to take nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library than GNU's
        pass


def _forget_peak() -> None:
    """Let Linux start the peak anew, where it is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _memory(field: str) -> float:
    """MB of resident memory: what Linux calls ``field``; elsewhere the peak of the process."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had when it started this process
        return int(re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
