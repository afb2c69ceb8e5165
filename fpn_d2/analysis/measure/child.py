"""Processes that measurements start."""

import os
from pathlib import Path

import fpn_d2


def child_environment() -> dict[str, str]:
    """This process' environment, in which Python imports this fpn_d2 and no other, also where it is not installed."""
    paths = [str(Path(fpn_d2.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
