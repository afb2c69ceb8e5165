"""Memory for large results in huge pages, used again once nobody holds it.

Being given a fresh map of 55 MB in pages of 4 KiB takes longer than most of what is done with it.
"""

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes; what is smaller is PyTorch's
KEPT = 120 << 20  # bytes of all blocks that may be used again
_PAGE = 2 << 20

_blocks: list[mmap.mmap] = []  # those used longest ago first
_lock = threading.Lock()
_IDLE = (lambda one: sys.getrefcount(one[0]))([object()])  # of what stands in a list and nowhere else
_CAN = hasattr(mmap, "MADV_HUGEPAGE") and getattr(sys, "_is_gil_enabled", lambda: True)()


def empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """``torch.empty`` on the CPU.

    A large tensor lies in a block of huge pages, on Linux. A block is handed out again once no tensor, view, graph or
    array holds it, which Python's count of references tells; at most ``KEPT`` bytes are kept so. As of a tensor that
    shares memory with NumPy, its storage cannot be resized.

    Args:
        shape: of the result; (N, C, H, W) if channels-last.
        dtype: of its numbers.
        channels_last: whether it lies so in memory.
    """
    last = torch.channels_last if channels_last else torch.contiguous_format
    count = math.prod(shape)
    size = count * torch.empty(0, dtype=dtype, device="cpu").element_size()
    block = _block(size) if _CAN and size >= LARGE else None
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=last)
    strides = torch.empty(shape, device="meta", memory_format=last).stride()
    # In place: a view may not be changed in place if it comes out of an autograd function.
    return torch.frombuffer(block, dtype=dtype, count=count).as_strided_(shape, strides)


def _block(size: int) -> mmap.mmap | None:
    size = -(-size // _PAGE) * _PAGE
    if not _lock.acquire(blocking=False):  # held by another thread, maybe one that a fork left behind
        return _fresh(size)
    try:
        idle = [i for i in range(len(_blocks)) if sys.getrefcount(_blocks[i]) == _IDLE]
        fits = [i for i in idle if size <= len(_blocks[i]) <= size + size // 4]
        if fits:
            block = _blocks.pop(min(fits, key=lambda i: (len(_blocks[i]), -i)))
        else:
            room = KEPT - sum(map(len, _blocks))
            while idle and room < size:
                room += len(_blocks.pop(idle.pop(0)))
                idle = [i - 1 for i in idle]
            block = _fresh(size)
            if block is None or room < size:
                return block
        _blocks.append(block)
        return block
    finally:
        _lock.release()


def _fresh(size: int) -> mmap.mmap | None:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None  # PyTorch says how much there was too little
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
