"""Peaks of memory: of this process, of one of its own, and of a GPU that is a fake."""

import os
import sys
from pathlib import Path

import pytest
import torch

import fpn_d2
from fpn_d2.analysis.compare.measure import MEMORY_WORKER
from fpn_d2.analysis.measure import memory as compare_memory

from ..small_detectors import write


def test_peak_of_memory_is_what_was_taken():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("a process cannot start its peak anew here: that free memory does not hide it is NOT tested")
    # 100 MB that the C library keeps once they are free, below a last piece that stays in use.
    kept = [bytearray(2**16) for _ in range(1600)]
    del kept[:-1]
    assert 60 < compare_memory.raised_peak(lambda: torch.ones(64, 2**18).sum()) < 90  # 64 MB, given back at once
    assert compare_memory.raised_peak(lambda: None) < 2


def test_memory_of_a_model_in_a_process_of_its_own(tmp_path):
    task = {"config": write(tmp_path / "small.yaml"), "opts": [], "weights": "", "optimize": ""}
    task |= {"size": [64, 96], "batch": 1, "threads": torch.get_num_threads()}
    peaks = {mode: compare_memory.peak_in_child(MEMORY_WORKER, task | {"mode": mode}) for mode in compare_memory.MODES}
    # Gradients and momentum of 11 million parameters are 85 MB.
    assert 80 < peaks["training"] < 400 and 0 <= peaks["inference"] < peaks["training"]


def test_a_child_that_fails_is_told_in_words(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\necho first >&2\necho "out of $MEMORY in $PYTHONPATH" >&2\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    told = compare_memory.peak_in_child(MEMORY_WORKER, {"variables": {"MEMORY": "memory"}})
    # This fpn_d2, also where it is not installed.
    here = Path(fpn_d2.__file__).resolve().parents[1]
    assert told == f"the process that measures it ended with 3: out of memory in {here}{os.pathsep}/theirs"


def test_peak_on_a_gpu_counts_what_the_first_step_leaves(monkeypatch):
    """With a GPU of a fake: gradients and the optimizer's state stay after the first step, activations do not."""
    held = {"now": 200, "peak": 500}

    def step():
        held["now"] = max(held["now"], 200 + 90)
        held["peak"] = max(held["peak"], held["now"] + 30)

    for name, what in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: held.update(peak=held["now"]),
        "memory_allocated": lambda device: held["now"] * 2**20,
        "max_memory_allocated": lambda device: held["peak"] * 2**20,
    }.items():
        monkeypatch.setattr(compare_memory.torch.cuda, name, what)
    assert compare_memory.peak_on_gpu(step, torch.device("cuda")) == 90 + 30
