"""Trainings that torchrun starts again after one of their processes has failed."""

import os

from detectron2.utils import comm

from fpn_d2.checkpoint.folder import newest_good

_FIRST = "first_attempt"  # a file that is as old as the training


def resumes(asked: bool, folder: str) -> bool:
    """Whether to go on from a checkpoint: if the user says so, or if torchrun has started this training once more.

    torchrun repeats the command as it was given, without --resume. What was in ``folder`` before its first attempt is
    left alone then, as the first attempt did. All processes call this together.

    Args:
        asked: Whether --resume was given.
        folder: OUTPUT_DIR.
    """
    attempt = max(comm.all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    if asked or "TORCHELASTIC_RUN_ID" not in os.environ or "://" in folder:
        return asked
    first = os.path.join(folder, _FIRST)
    resume = False
    if comm.is_main_process():
        if attempt == 0 or not os.path.exists(first):
            with open(first, "w"):
                pass
        else:
            found = newest_good(folder)
            resume = bool(found) and os.path.getmtime(found) >= os.path.getmtime(first)
    return comm.all_gather(resume)[0]
