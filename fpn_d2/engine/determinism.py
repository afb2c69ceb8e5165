"""SOLVER.DETERMINISTIC: operations of PyTorch's that give the same bits each time, also on a GPU."""

import contextlib
import os
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode

from fpn_d2.errors import UserError

# What cuBLAS needs to add in one order; it is read when a program first multiplies matrices on a GPU.
_CUBLAS, _WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_REFUSED = "does not have a deterministic implementation"


def check_deterministic(cfg: CfgNode) -> None:
    """Check that the same bits can come out again.

    Raises:
        UserError: SEED is drawn anew for each run.
    """
    if cfg.SOLVER.DETERMINISTIC and cfg.SEED < 0:
        raise UserError("SOLVER.DETERMINISTIC needs the same random numbers each time: set SEED to a number, as 1")
    if cfg.SOLVER.DETERMINISTIC:
        os.environ.setdefault(_CUBLAS, _WORKSPACE)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within this context, if ``on``, an operation that cannot give the same bits each time is an error.

    On CPUs there is none in this package's models; on GPUs some of Detectron2's may be.

    Raises:
        UserError: Such an operation was met.
    """
    if not on:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False  # it chooses algorithms by how long they take
    try:
        yield
    except RuntimeError as error:
        if _REFUSED not in str(error):
            raise
        operation = str(error).split(_REFUSED)[0].strip()
        raise UserError(
            f"SOLVER.DETERMINISTIC: {operation} cannot give the same bits each time on this device: train without the "
            "key, or on a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark = benchmark
