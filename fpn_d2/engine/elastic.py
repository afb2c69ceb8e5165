"""Trainings that torchrun starts again after one of their processes, or a machine, has failed."""

import contextlib
import os
import socket
from pathlib import Path

from detectron2.utils import comm

from fpn_d2.checkpoint.folder import newest_good
from fpn_d2.files import UNFINISHED

_FIRST = "first_attempt"  # a file that is as old as the training, and names the torchruns that have had a part in it


def resumes(asked: bool, folder: str) -> bool:
    """Whether to go on from a checkpoint: if the user says so, or if torchrun has started this training once more.

    torchrun repeats the command as it was given, without --resume. What was in ``folder`` before its first attempt is
    left alone then, as the first attempt did. Where machines come and go, torchrun starts the processes again without
    counting it: then one of the torchruns has had a part in the training before. All processes call this together.

    Args:
        asked: Whether --resume was given.
        folder: OUTPUT_DIR.
    """
    attempt = max(comm.all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    agents = set(comm.all_gather(_torchrun()))
    if asked or "TORCHELASTIC_RUN_ID" not in os.environ or "://" in folder:
        return asked
    first = Path(folder, _FIRST)
    resume = False
    if comm.is_main_process():
        before = set(first.read_text().splitlines()) if first.exists() else set()
        if first.exists() and (attempt > 0 or before & agents):
            begun = first.stat().st_mtime
            found = newest_good(folder)
            resume = bool(found) and os.path.getmtime(found) >= begun
            _write(first, agents | before, begun)
        else:
            _write(first, agents)
    return comm.all_gather(resume)[0]


def _write(first: Path, agents: set[str], begun: float | None = None) -> None:
    unfinished = first.with_name(first.name + UNFINISHED)
    unfinished.write_text("\n".join(sorted(agents)))
    if begun is not None:
        os.utime(unfinished, (begun, begun))
    os.replace(unfinished, first)


def _torchrun() -> str:
    """The process that has started this one: its machine, number and start."""
    start = ""
    with contextlib.suppress(OSError, IndexError):  # another system than Linux
        # Behind the program's name, which may hold anything, the 20th number.
        start = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{socket.gethostname()} {os.getppid()} {start}"
