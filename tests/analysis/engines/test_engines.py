"""Detectors in other engines: processes in turn, and on small detectors the rows and columns that they are for."""

import json

import pytest

from fpn_d2 import cli
from fpn_d2.analysis.benchmark.engines import engines
from fpn_d2.analysis.benchmark.line import Timing
from fpn_d2.analysis.engines import processes
from fpn_d2.errors import UserError

from ..small_detectors import STOCK, write

FAST = ["MODEL.NUMERICS", "fast", "MODEL.PROPOSAL_GENERATOR.NAME", "FPNRPN"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "_REST", 0.0)


def test_processes_work_in_turn_and_never_two_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WORKER", "tests.analysis.engines.sleeper")
    log, seen = tmp_path / "calls", []
    tasks = {
        name: {"name": name, "seconds": seconds, "detections": number, "log": str(log)}
        for number, (name, seconds) in enumerate({"A": 0.5, "B, twice": 1.0}.items())
    }
    samples, detections = processes.time_in_processes(tasks, 2, 1, tmp_path, lambda: seen.append(0))
    assert samples == {"A": [0.5, 0.5], "B, twice": [1.0, 1.0]} and detections == {"A": 0, "B, twice": 1}
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [name for name, _, _ in calls] == ["A", "B, twice"] * 3 and len(seen) == 6
    assert all(end <= begin for (_, _, end), (_, begin, _) in zip(calls, calls[1:], strict=False))


def test_a_process_that_ends_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WORKER", "tests.analysis.engines.sleeper")
    with pytest.raises(UserError, match="the process of openvino ended with 1: no such engine"):
        processes.time_in_processes({"openvino": {"fails": True}}, 1, 0, tmp_path)


@pytest.mark.slow  # exports, and starts six processes
def test_rows_of_the_benchmark(tmp_path):
    for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    config, steps = write(tmp_path / "small.yaml"), []
    timing = Timing(2, 0, lambda done, total: steps.append((done, total)))
    lines = engines(timing, size=(64, 96), config=config, opts=FAST)
    assert [(line["ours"], line["against"]) for line in lines] == [
        ("optimised, float32", "onnxruntime"),
        ("optimised, float32", "openvino"),
        ("optimised, bfloat16", "onnxruntime"),
        ("optimised, bfloat16", "openvino-bfloat16"),
        ("optimised, bfloat16", "openvino-int8"),
    ]
    assert all("not_measured" not in line and line["ratio"]["n"] == 2 and line["checks"] for line in lines), lines
    assert "10 and 10 detections" in lines[0]["note"] and steps == [(n, 12) for n in range(1, 13)]


@pytest.mark.slow
def test_columns_of_a_comparison(tmp_path, capsys):
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    config, output = write(tmp_path / "small.yaml"), tmp_path / "out"
    command = ["compare", config, config, "--opts-b", *STOCK, "--sizes", "64x96", "--rounds", "2", "--warmup", "0"]
    command += ["--no-memory", "--engines", "onnxruntime", "openvino-bfloat16", "--output", str(output)]
    assert cli.main(command) == 0
    said, result = capsys.readouterr().out, json.loads((output / "compare.json").read_text())
    assert list(result["inference"][0]["seconds"]) == ["A", "B", "onnxruntime", "openvino-bfloat16"]
    assert list(result["engines"]["onnxruntime"]["stages"]) == ["input", "pyramid", "proposals", "detections"]
    assert all(stage["within"] for engine in result["engines"].values() for stage in engine["stages"].values())
    assert "Outputs of other engines" in said and "each column in a process of its own" in said
    assert "openvino-bfloat16" in (output / "compare.html").read_text()
