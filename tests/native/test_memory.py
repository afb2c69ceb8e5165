"""Memory that is used again: never while somebody holds it, and not without bound."""

import copy
import os
import pickle
import threading

import pytest
import torch

from fpn_d2.native import memory

pytestmark = pytest.mark.skipif(not memory._CAN, reason="no huge pages here: memory is PyTorch's own")
SHAPE = (1, 16, 300, 301)  # 5.8 MB of float32


@pytest.fixture(autouse=True)
def own_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_blocks", [])


def test_shapes_types_and_layouts():
    for shape in (SHAPE, (3, 16, 5, 7), (0, 16, 300, 300), (40, 256, 7, 7)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for last in (False, True):
                format = torch.channels_last if last else torch.contiguous_format
                expected = torch.empty(shape, dtype=dtype, memory_format=format)
                tensor = memory.empty(shape, dtype, channels_last=last)
                assert (tensor.shape, tensor.dtype) == (expected.shape, dtype)
                assert tensor.numel() == 0 or tensor.stride() == expected.stride()
                assert tensor.is_contiguous(memory_format=format) and not tensor._is_view()
                assert tensor.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert memory.empty((2, 30, 8), torch.uint8).fill_(7).numpy().sum() == 7 * 480


def test_used_again_once_nobody_holds_it():
    tensor = memory.empty(SHAPE, torch.float32)
    at = tensor.data_ptr()
    other = memory.empty(SHAPE, torch.float32)
    assert other.data_ptr() != at
    del tensor
    assert memory.empty(SHAPE, torch.float32).data_ptr() == at
    assert memory.empty((1, 16, 300, 300), torch.float32, channels_last=True).data_ptr() == at  # a little smaller
    assert memory.empty((1, 16, 300, 150), torch.float32).data_ptr() != at  # half of it would lie idle


HOLDERS = {
    "view": lambda t: t[0, 3, :2, :2],
    "detached": lambda t: t.detach(),
    "numpy": lambda t: t.numpy(),
    "data": lambda t: torch.empty(0).set_(t.data),
    "storage": lambda t: t.untyped_storage(),
    "graph": lambda t: t.requires_grad_().square(),  # which needs it for its gradient
    "gradient": lambda t: _with_gradient(t),
    "dlpack": lambda t: torch.from_dlpack(t),
    "closure": lambda t: lambda: t,
    "circle": lambda t: [].append(t) or _circle(t),
}


def _with_gradient(tensor):
    leaf = torch.zeros(SHAPE, requires_grad=True)
    leaf.grad = tensor
    return leaf


def _circle(tensor):
    one = [tensor]
    one.append(one)
    return one


@pytest.mark.parametrize("holder", HOLDERS)
def test_not_while_it_is_held(holder):
    tensor = memory.empty(SHAPE, torch.float32).fill_(1)
    at = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    others = [memory.empty(SHAPE, torch.float32).fill_(2) for _ in range(3)]
    assert at not in [other.data_ptr() for other in others]
    assert held is not None


def test_copies_have_memory_of_their_own():
    tensor = memory.empty(SHAPE, torch.float32).fill_(3)
    copies = [copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.clone()]
    shared = tensor.clone().share_memory_()
    del tensor
    memory.empty(SHAPE, torch.float32).fill_(4)
    assert all((other == 3).all() for other in (*copies, shared))


def test_shared_with_another_process_is_not_used_again():
    tensor = memory.empty(SHAPE, torch.float32).fill_(5)
    tensor.share_memory_()
    other = memory.empty(SHAPE, torch.float32).fill_(6)
    assert tensor.data_ptr() != other.data_ptr() and (tensor == 5).all()


def test_bound(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 20 << 20)
    tensors = [memory.empty((n, 1 << 20), torch.float32) for n in (1, 2, 3, 4, 2, 1)]
    assert sum(map(len, memory._blocks)) <= 20 << 20
    del tensors
    assert sum(map(len, memory._blocks)) <= 20 << 20
    memory.empty((5, 1 << 20), torch.float32)  # takes the place of what lay idle longest
    assert [len(block) >> 20 for block in memory._blocks] == [20]
    assert memory.empty((6, 1 << 20), torch.float32).shape == (6, 1 << 20)
    assert sum(map(len, memory._blocks)) <= 20 << 20


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(value):
        for _ in range(60):
            tensor = memory.empty(SHAPE, torch.float32).fill_(value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forked_child_has_its_own():
    """Even if another thread was being given memory at the fork."""
    tensor = memory.empty(SHAPE, torch.float32).fill_(1)
    idle = memory.empty(SHAPE, torch.float32).data_ptr()
    with memory._lock:
        child = os.fork()
        if child == 0:
            memory.empty(SHAPE, torch.float32).numpy()[:] = 9
            tensor.numpy()[:] = 9
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tensor == 1).all() and idle


def test_large_pages():
    tensor = memory.empty((1, 16, 1024, 1024), torch.float32).fill_(1)
    at = tensor.data_ptr()
    advised = False
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            inside = start <= at < end
        elif inside and words[0] == "VmFlags:":
            advised = "hg" in words
    assert advised


def test_without_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "_CAN", False)
    assert memory.empty(SHAPE, torch.float32).shape == SHAPE and not memory._blocks
