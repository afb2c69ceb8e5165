"""What this machine can compute at most: the measure beside which a time says how much is left."""

import time

import torch

_SIDE = 2048


def matrix_peak(dtype: torch.dtype, rounds: int = 8) -> float:
    """Multiply-adds a second of a product of two matrices of 2048 x 2048, the fastest of ``rounds``, on the CPU.

    Args:
        dtype: of the matrices.
        rounds: products that are timed, after one.
    """
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    out, best = a @ b, float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return _SIDE**3 / best
