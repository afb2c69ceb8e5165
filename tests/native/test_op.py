"""What holds for every compiled operation: trial, switch, log, profiler, threads."""

import logging
import os
import threading

import numpy as np
import pytest
import torch

from fpn_d2.data import enlarge
from fpn_d2.fast import depthwise, group_norm, nms, winograd
from fpn_d2.fast.roi_align import compiled_roi_align
from fpn_d2.native import build
from fpn_d2.native import op as module

OPS = {one.OP.name: one.OP for one in (compiled_roi_align, winograd, depthwise, group_norm, nms, enlarge)}


@pytest.fixture(params=sorted(OPS))
def op(request):
    one = OPS[request.param]
    if one.library() is None:
        pytest.skip(f"no C++ compiler on this machine, or no vectors: {one.name} is NOT tested")
    one.forget()
    yield one
    one.forget()


@pytest.mark.parametrize("name", sorted(OPS))
def test_runs_where_there_is_a_compiler(name, monkeypatch, caplog):
    """Or all tests of an operation that fails its trial would be skipped."""
    monkeypatch.delenv(module.VARIABLE, raising=False)
    try:
        build.find_compiler()
    except OSError as error:
        pytest.skip(f"{error}: compiled operations are NOT tested")
    if name == "winograd" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("minimal filtering needs a processor with vectors: it is NOT tested")
    OPS[name].forget()
    assert OPS[name].library() is not None, caplog.text


def test_names():
    assert sorted(OPS) == sorted(module.NAMES)


def test_one_line_in_the_log(op, caplog):
    with caplog.at_level(logging.INFO, logger="fpn_d2"):
        assert op.library() is not None and op.library() is op.library()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{op.does} runs compiled: found ")


class Wrong:
    """A library whose functions do what the real ones do, and then spoil a number of the result."""

    def __init__(self, real, op):
        self.real, self.op, self.use_openmp = real, op, real.use_openmp if hasattr(real, "use_openmp") else print

    def __getattr__(self, name):
        function = getattr(self.real, name)
        if name not in self.op.functions:
            return function

        class Spoiled:
            def __call__(self, pointer):
                result, problem = function(pointer), pointer._obj
                at = {"roi_align": "pooled", "nms": "kept", "winograd": "output", "enlarge": "result"}
                at |= {"depthwise": "input_gradient", "group_norm": "output"}
                import ctypes

                number = ctypes.c_uint8.from_address(getattr(problem, at[OP_NAME]) + 2)
                number.value ^= 0x7F
                return result

        OP_NAME = self.op.name
        return Spoiled()


def test_wrong_results_are_refused(op, monkeypatch, caplog):
    real = module.build.load
    monkeypatch.setattr(module.build, "load", lambda *a: (Wrong(real(*a)[0], op), "found"))
    assert op.library() is None and op.library() is None
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(f"{op.does} runs {op.otherwise}, not compiled: ") and "\n" not in line


def test_trials_that_raise_are_refused(op, monkeypatch, caplog):
    def trial():
        raise TypeError("one line\nand another")

    monkeypatch.setattr(op, "trial", trial)
    assert op.library() is None
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.endswith("not compiled: a trial of it failed (TypeError: one line)")


def test_trials_know_nothing_of_the_modes_they_are_called_in(op):
    """Of the first call's: it may be under autocast, in a trace, while somebody counts operations."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch(), torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert op.library() is not None
    assert not seen


def test_random_numbers_stay_as_they_were(op):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    op.library()
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_switch(op, monkeypatch):
    for value, runs in (("on", True), ("off", False), (op.name, False), (f"{op.name}, nms", False), ("", True)):
        monkeypatch.setenv("FPN_D2_NATIVE", value)
        assert (op.library() is not None) == runs, value
    monkeypatch.setenv("FPN_D2_NATIVE", ",".join(set(module.NAMES) - {op.name}))
    assert op.library() is not None
    monkeypatch.setenv("FPN_D2_NATIVE", "winogard")
    with pytest.raises(ValueError, match="FPN_D2_NATIVE is 'winogard'; expected on, off, or some of roi_align, wino"):
        op.library()


def test_loaded_once_by_many_threads(op, monkeypatch):
    loads, real = [], module.build.load
    monkeypatch.setattr(module.build, "load", lambda *a: loads.append(1) or real(*a))
    found = []
    threads = [threading.Thread(target=lambda: found.append(op.library())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(found) == 8 and set(map(id, found)) == {id(op.library())}


def test_a_fork_while_another_thread_loads(monkeypatch):
    """The child has the lock, and not the thread that would let it go."""
    op = OPS["nms"]
    with module._lock:
        child = os.fork()
        if child == 0:
            op.forget()
            os._exit(0 if op.library() is not None or op.library() is None else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_profiler_sees_calls_by_name():
    if nms.library() is None:
        pytest.skip("no C++ compiler on this machine: what a profiler sees is NOT tested")
    arguments = torch.rand(9, 4), torch.rand(9), torch.zeros(9, dtype=torch.int64), 0.5
    with torch.profiler.profile() as profiler:
        nms.batched_nms(*arguments)
    assert "fpn_d2::nms_float32" in [event.key for event in profiler.key_averages()]


def test_no_memory_is_an_error(monkeypatch):
    if nms.library() is None:
        pytest.skip("no C++ compiler on this machine: errors of compiled code are NOT tested")
    monkeypatch.setattr(nms.library(), "nms_float32", lambda problem: -1)
    with pytest.raises(MemoryError, match="Non-maximum suppression, compiled .nms_float32., ran out of memory or thr"):
        nms.batched_nms(torch.rand(9, 4), torch.rand(9), torch.zeros(9, dtype=torch.int64), 0.5)


def test_threads_are_those_of_torchs_openmp():
    """A second OpenMP runtime, or threads beside it, would compete with torch's for the cores."""
    if "OpenMP" not in torch.__config__.parallel_info() or not os.path.exists("/proc/self/maps"):
        pytest.skip("this torch has no OpenMP, or this is no Linux: shared threads are NOT tested")
    assert module._openmp() is not None
    maps = open("/proc/self/maps").read()
    assert len({line.split()[-1] for line in maps.splitlines() if "/libgomp" in line or "/libiomp5" in line}) == 1
