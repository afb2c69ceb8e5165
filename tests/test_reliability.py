"""A short run of what `python -m tests.reliability` does at length, and its table."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from tests import fault_table, reliability, soak

SEEN = {"memory_kib": 1000, "files": 9, "processes": 3}


def _run(module, *options, folder):
    result = folder / "result.json"
    command = [sys.executable, "-W", "ignore", "-m", module, *options, "--json", str(result)]
    done = subprocess.run(
        command, cwd=reliability.ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(result.read_text())


def test_killed_trainings_end_as_if_nothing_had_been(tmp_path):
    (run,) = _run("tests.kills", "--runs", "1", "--kills", "3", folder=tmp_path)
    assert run["wrong"] == [] and len(run["moments"]) == 3


def test_two_processes_are_one_and_a_killed_job_goes_on(tmp_path):
    lines = _run("tests.jobs", "--short", folder=tmp_path)
    assert len(lines) == 3 and all(well for _, well in lines), lines


def test_a_messy_set_with_stock_detectron2_and_with_ours(tmp_path):
    ((name, stock, ours),) = _run("tests.messy_table", "text as an image file", folder=tmp_path)
    assert name == "text as an image file" and stock.startswith("traceback while training: UnidentifiedImageError")
    assert ours.startswith("trains and evaluates; left out: ") and "1 x a file that is no image" in ours


def test_files_that_call_a_function_with_stock_detectron2_and_with_ours(tmp_path):
    names = [name for name in fault_table.CASES if "calls a function" in name]
    for _, stock, ours in _run("tests.fault_table", *names, folder=tmp_path):
        assert stock.startswith("RUNS ITS CODE; traceback: ")
        assert ours == "runs nothing of it; one line, status 2"


def test_a_short_soak_holds_its_files_and_processes(tmp_path):
    found = soak.judge([SEEN] * 20)
    assert found["flat"] and found["memory_kib"] == [1000, 1000]
    for key, late in (("memory_kib", 1030), ("files", 10), ("processes", 4)):
        rising = [SEEN] * 15 + [{**SEEN, key: late}] * 5
        assert not soak.judge(rising)["flat"]
    assert soak.judge([{**SEEN, "memory_kib": 1}] * 4 + [SEEN] * 16)["flat"]  # the first fifth does not count
    result = _run_soak(tmp_path)
    assert result["files"][0] == result["files"][1] > 5 and result["processes"] == [3, 3]  # two workers


def _run_soak(folder):
    code = "import json, sys, pathlib; from tests import soak\n"
    code += "print(json.dumps(soak.soak(pathlib.Path(sys.argv[1]), 20, 1)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], cwd=reliability.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def kept(tmp_path):
    moment = {"iteration": -1, "saved": 0, "saving": True, "ended": False}
    contents = {
        "kills-0": [{"moments": [moment, {**moment, "iteration": 3, "saving": False}], "wrong": []}],
        "kills-1": [{"moments": [moment], "wrong": ["weights"]}],
        "jobs": [["2 processes: within 1e-16", True], ["process 1 killed: ends", False]],
        "soak": {"iterations": 10_000, **{key: [value] * 2 for key, value in SEEN.items()}, "flat": True},
        "fuzz-voc-0": {"target": "voc", "inputs": 5, "read": 2, "refused": 3, "found": 0, "slowest": 1, "peak_mib": 9},
        "fuzz-voc-1": {"target": "voc", "inputs": 9, "read": 2, "refused": 6, "found": 1, "slowest": 2, "peak_mib": 8},
        "messy-00": [["a set", "traceback", "stops"], ["another", "trains; says nothing", "trains and evaluates"]],
        "faults": [["SIGTERM", "ends with status -15", "one line"]],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_table_says_what_is_there(kept, tmp_path, monkeypatch):
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{reliability.BEGIN}\nold\n{reliability.END}\nafter\n")
    monkeypatch.setattr(reliability, "DOCUMENT", document)
    assert reliability.main(["--table", "--folder", str(kept)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "3 times in 2 trainings: 2 in start-up, 2 while a checkpoint was written" in text
    assert "| 1 of 2 end with" in text and "| process 1 killed | once | FAILS: ends |" in text
    assert "| voc | 14 | 4 | 9 | 1 | 2.0 s | 9 MiB |" in text and "| together | 14 | | | 1 | | |" in text
    assert "10,000 iterations" in text and "flat" in text and "| a set | traceback | stops |" in text
    assert "2 sets. Stock Detectron2 ends with a traceback, dies or hangs on 1 of them, and says nothing of the" in text
    assert "sound of 1, stops before training in one sentence on 1, and ends with a traceback, dies or hangs on 0." in (
        text
    )
    assert "| SIGTERM | ends with status -15 | one line |" in text
    assert f"With torch {importlib.metadata.version('torch')}, " in text


def test_only_what_is_missing_is_run(kept, monkeypatch):
    asked = []

    def run(command, **rest):
        asked.append(command[2:])
        if "voc" in command:
            (kept / f"fuzz-voc-{command[command.index('--seed') + 1]}.unfinished").write_text("{}")

    monkeypatch.setattr(reliability.subprocess, "run", run)
    reliability.run_steps(["fuzz", "soak"], kept)
    targets = [command[command.index("--target") + 1] for command in asked]
    assert targets.count("voc") == reliability.FUZZ_ROUNDS - 2 and targets.count("coco") == reliability.FUZZ_ROUNDS
    assert (kept / "fuzz-voc-2.json").exists() and not (kept / "fuzz-coco-0.json").exists()
    assert reliability.FUZZ_INPUTS * reliability.FUZZ_ROUNDS * len(reliability.TARGETS) >= 1_000_000
    assert reliability.KILL_RUNS * reliability.KILLS >= 50
