"""Benchmarks: files that are whole or not there, what is measured again, the table."""

import importlib.util
import inspect
import json
import os
from pathlib import Path

import pytest
import torch

from fpn_d2 import cli
from fpn_d2.analysis.benchmark import rows as benchmark_rows
from fpn_d2.analysis.benchmark import run as benchmarks
from fpn_d2.analysis.benchmark.line import Check, Timing, line
from fpn_d2.analysis.benchmark.rows import NO_COMPILER, ROWS, Row, choose_rows
from fpn_d2.analysis.benchmark.run import measure_row, read_results, run_benchmarks
from fpn_d2.analysis.benchmark.table import show_table
from fpn_d2.analysis.compare.run import plain
from fpn_d2.errors import UserError
from fpn_d2.native import build as compiled

ROOT = Path(__file__).resolve().parents[3]
ONCE = Timing(rounds=1, warmup=0)


def good_line(**more):
    check = Check("maps", 2e-7, 1e-5, "px", True)
    return line("fast", [0.4, 0.9, 0.6], [0.2, 0.3, 0.3], "s", [check], "3 boxes") | more


# ---- The rows there are ----------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_table():
    assert {row.measure.__name__ for row in ROWS.values()} == {
        *("pooling", "neck", "proposals", "inference", "training", "training_memory", "loading", "evaluation"),
        "engines",
    }
    assert len(ROWS) == 24
    for row in ROWS.values():
        inspect.signature(row.measure).bind(ONCE, **row.settings)
        assert (row.unit == "MB") == (row.name == "training-memory")
    assert {name for name, row in ROWS.items() if row.variables} == {
        *("inference-no-compiler-480x640", "inference-no-compiler-800x1067", "loading-no-compiler"),
    }


def test_rows_are_chosen_by_name_and_pattern():
    assert [row.name for row in choose_rows(["loading", "neck-*"])] == ["neck-float32", "neck-bfloat16", "loading"]
    assert choose_rows(None) == list(ROWS.values())
    with pytest.raises(UserError, match="no row 'sleeping'; there are pooling-1000, "):
        choose_rows(["loading", "sleeping"])


# ---- Running them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def three_rows(monkeypatch):
    rows = {name: Row(name, f"the {name}", lambda timing: [], {"size": (2, 3)}) for name in ("one", "two", "three")}
    monkeypatch.setattr(benchmark_rows, "ROWS", rows)
    monkeypatch.setattr(benchmarks, "ROWS", rows)
    return rows


class Recorder:
    """Measures nothing, and keeps what it was asked for."""

    def __init__(self, **found):
        self.asked, self.found = [], found

    def __call__(self, row, settings, progress):
        self.asked.append(row.name)
        progress(1, 2)
        found = self.found.get(row.name, {"lines": [good_line()]})
        if isinstance(found, BaseException):
            raise found
        return found


def run(folder, measure, **more):
    return run_benchmarks(str(folder), measure=measure, progress=False, **more)


def test_rows_are_kept_and_not_measured_again(tmp_path, three_rows):
    first = Recorder()
    results = run(tmp_path / "out", first)
    assert first.asked == ["one", "two", "three"]
    kept = json.loads((tmp_path / "out" / "two.json").read_text())
    assert kept == results["two"] and kept["what"] == "the two" and kept["lines"][0]["ratio"]["median"] == 2
    assert kept["settings"] == {"rounds": 10, "warmup": 2, "threads": torch.get_num_threads()} | {
        "size": [2, 3],
        "variables": {},
    }
    assert {"torch", "detectron2", "processor", "compiler", "packages", "code"} <= set(kept["environment"])
    again = Recorder()
    assert run(tmp_path / "out", again) == results and again.asked == []
    assert read_results(tmp_path / "out") == results
    asked_for = Recorder()
    run(tmp_path / "out", asked_for, rows=["two"], repeat=True)
    assert asked_for.asked == ["two"]


def test_other_settings_versions_or_code_are_measured_again(tmp_path, three_rows, monkeypatch):
    run(tmp_path, Recorder())

    def asked(**more):
        recorder = Recorder()
        run(tmp_path, recorder, **more)
        return recorder.asked

    assert asked(rounds=3) == ["one", "two", "three"] and asked(rounds=3) == []
    assert asked(rounds=3, warmup=0) == ["one", "two", "three"]
    assert asked(rounds=3, warmup=0, threads=7) == ["one", "two", "three"]
    more = {"rounds": 3, "warmup": 0, "threads": 7}
    three_rows["two"] = Row("two", "the two", three_rows["two"].measure, {"size": (2, 4)})
    assert asked(**more) == ["two"]
    three_rows["two"] = Row("two", "the two", three_rows["two"].measure, {"size": (2, 4)}, {"SOME": "1"})
    assert asked(**more) == ["two"]
    monkeypatch.setattr(benchmarks, "_code", lambda: "other")
    assert asked(**more) == ["one", "two", "three"] and asked(**more) == []
    for variable, value in (("FPN_D2_ROI_ALIGN", "torch"), ("THP_MEM_ALLOC_ENABLE", "other")):
        monkeypatch.setenv(variable, value)
        assert asked(**more) == ["one", "two", "three"] and asked(**more) == []


def test_most_rounds_of_a_row(tmp_path, three_rows):
    three_rows["one"] = Row("one", "", three_rows["one"].measure, {}, most_rounds=4)
    settings = {name: result["settings"] for name, result in run(tmp_path, Recorder()).items()}
    assert (settings["one"]["rounds"], settings["one"]["warmup"]) == (4, 1) and settings["two"]["rounds"] == 10


def test_a_row_that_fails_says_why_and_the_others_go_on(tmp_path, three_rows):
    results = run(tmp_path, Recorder(two={"failed": "ValueError: no luck"}))
    assert results["two"]["failed"] == "ValueError: no luck" and "lines" in results["three"]
    again = Recorder()
    run(tmp_path, again)
    assert again.asked == ["two"]  # it may be better now


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, three_rows):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Recorder(two=KeyboardInterrupt()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json"]
    (tmp_path / "three.json").write_text('{"schema": 1, "li')  # another program's doing: never ours
    again = Recorder()
    assert set(run(tmp_path, again)) == set(three_rows) and again.asked == ["two", "three"]


@pytest.mark.parametrize("content", ["[1]", '{"lines": []}', ""])
def test_a_file_of_another_kind_counts_for_nothing(content, tmp_path, three_rows):
    results = run(tmp_path, Recorder())
    text = json.dumps(results["one"] | {"schema": 0}) if not content else content
    (tmp_path / "one.json").write_text(text)
    assert set(read_results(tmp_path)) == {"two", "three"}
    again = Recorder()
    assert run(tmp_path, again) == results and again.asked == ["one"]


def test_no_file_is_left_half_written(tmp_path, three_rows, monkeypatch):
    real = os.replace

    def disk_full(source, target):
        raise OSError("disk full")

    run(tmp_path, Recorder())
    before = (tmp_path / "one.json").read_text()
    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(UserError, match="disk full"):
        run(tmp_path, Recorder(), repeat=True)
    monkeypatch.setattr(os, "replace", real)
    assert (tmp_path / "one.json").read_text() == before


def test_numbers_that_json_lacks_are_none(tmp_path, three_rows):
    bad = good_line(checks=[{"what": "maps", "difference": float("nan"), "allowed": 1.0, "unit": "", "within": False}])
    results = run(tmp_path, Recorder(one={"lines": [bad]}), rows=["one"])
    assert results["one"]["lines"][0]["checks"][0]["difference"] is None


def test_mistakes(tmp_path):
    for wrong in ({"rounds": 0}, {"warmup": -1}, {"threads": -1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is -?[01]; expected at least"):
            run_benchmarks(str(tmp_path / "out"), **wrong)
    with pytest.raises(UserError, match="no row 'x'"):
        run_benchmarks(str(tmp_path / "out"), rows=["x"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no folder .*out: run fpn-d2 benchmark"):
        read_results(tmp_path / "out")


def test_the_digest_is_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "fpn_d2" / "modeling" / "ops").mkdir(parents=True)
    source = tmp_path / "fpn_d2" / "modeling" / "ops" / "fast.cpp"
    source.write_text("a")
    assert len(benchmarks._code()) == 12
    monkeypatch.setattr(benchmarks, "_ROOT", tmp_path)
    before = benchmarks._code()
    source.write_text("b")
    after = benchmarks._code()
    (source.parent / "notes.txt").write_text("c")
    assert before != after == benchmarks._code()


@pytest.mark.parametrize("pattern", benchmarks._CODE)
def test_every_place_of_the_digest_exists(pattern):
    assert list(benchmarks._ROOT.glob(pattern))


def test_measure_row_tells_what_went_wrong():
    def broken(timing, size):
        raise RuntimeError(f"{size}\n  is too  large")

    settings = {"rounds": 1, "warmup": 0}
    found = measure_row(Row("x", "", broken, {"size": 3}), settings, lambda done, total: None)
    assert found == {"failed": "RuntimeError: 3 is too large"}


def test_a_real_row_in_a_process_of_its_own(tmp_path, capsys):
    """Through the command line; the smallest row there is."""
    command = ["benchmark", "--rows", "proposals-480x640", "--rounds", "1", "--warmup", "0", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "| `fpn-d2 benchmark --rows proposals-480x640` |" in shown and "pooling of" not in shown
    kept = json.loads((tmp_path / "proposals-480x640.json").read_text())
    (one,) = kept["lines"]
    assert one["ratio"]["n"] == 1 and one["note"] == "1000 kept of 76740 anchors"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".log"]


def test_a_child_that_dies_is_a_failed_row(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'call 3 of 4'\necho last words >&2\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setattr(benchmarks.sys, "executable", str(script))
    steps = []
    settings = {"rounds": 1, "warmup": 0, "threads": 1}
    measure = benchmarks._InChild(tmp_path)
    found = measure(ROWS["loading"], settings, lambda done, total: steps.append((done, total)))
    assert found == {"failed": "its process ended with 9: last words"} and steps == [(3, 4)]


def test_a_child_has_the_variables_of_its_row(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$CXX" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(benchmarks.sys, "executable", str(script))
    settings = {"rounds": 1, "warmup": 0, "threads": 1}
    found = benchmarks._InChild(tmp_path)(ROWS["inference-no-compiler-480x640"], settings, lambda done, total: None)
    assert found["failed"] == f"its process ended with 1: {NO_COMPILER['CXX']}"


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    for name, value in NO_COMPILER.items():
        monkeypatch.setenv(name, value)
    for path in sorted(Path(compiled.__file__).parent.glob("*.cpp")):
        with pytest.raises(OSError, match="no C\\+\\+ compiler"):
            compiled.load(path, (), ())


# ---- The table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, three_rows):
    three_rows["four"] = Row("four", "the four", three_rows["one"].measure, {}, unit="MB")
    lines = [good_line(), {"ours": "compiled", "not_measured": "no compiler: g++ | clang++."}]
    memory = [line("fast", [2000.0], [1500.0], "MB", note="n")]
    found = {"one": {"lines": lines}, "two": {"failed": "OSError: gone"}, "four": {"lines": memory}}
    return run(tmp_path / "results", Recorder(**found), rows=["one", "two", "four"])


def test_table(results, three_rows):
    results["one"]["lines"][0]["of_peak"] = {"theirs": 0.312, "own": 1.05}
    text = show_table(results, three_rows)
    parts = text.split("\n\n")
    assert parts[0].startswith("Measured with torch ") and len(parts[0].splitlines()) == 1
    measured = "| the one | fast | 2.00 (2.00 to 2.50; 3) | 600, 300 | 31%, 105% | maps 2e-07 px; 3 boxes |"
    assert parts[1].splitlines()[2:] == [
        f"{measured} `fpn-d2 benchmark --rows one` |",
        "| the one | compiled | not measured: no compiler: g++ \\| clang++ |  |  |  | `fpn-d2 benchmark --rows one` |",
        "| the two |  | not measured: OSError: gone |  |  |  | `fpn-d2 benchmark --rows two` |",
        "| the three |  | not run yet |  |  |  | `fpn-d2 benchmark --rows three` |",
    ]
    assert "share of Detectron2's memory" in parts[2]
    assert parts[2].splitlines()[2:] == [
        "| the four | fast | 0.75 (0.75 to 0.75; 1) | 2000, 1500 | n | `fpn-d2 benchmark --rows four` |"
    ]


def test_table_tells_where_machines_or_versions_differ(results, three_rows):
    results["two"]["environment"]["torch"] = "1.0"
    first, second = show_table(results, three_rows).split("\n\n")[0].splitlines()
    assert (
        first.endswith(": one, four.") and second.startswith("- Measured with torch 1.0") and second.endswith(": two.")
    )


def test_table_of_another_baseline(three_rows, results):
    results["one"]["lines"] = [good_line(against="pycocotools")]
    assert "| the one, against pycocotools | fast |" in show_table(results, three_rows)


def test_table_goes_between_the_marks_of_the_document(results, tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    document = ROOT / "docs" / "benchmarks.md"
    before = document.read_text()
    after = generate.generate(benchmarks=str(tmp_path / "results"))[document]
    assert "| the one | fast | 2.00 (2.00 to 2.50; 3) |" in after
    assert document.read_text() == before and document not in generate.generate()

    def outside(text):
        start, end = text.index("<!-- speed: begin"), text.index("<!-- speed: end -->")
        return text[:start], text[end:]

    assert outside(before) == outside(after)


def test_every_row_is_in_the_document():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    table = text[text.index("<!-- speed: begin") : text.index("<!-- speed: end -->")]
    for name in ROWS:
        assert f"`fpn-d2 benchmark --rows {name}`" in table, "run make benchmarks"


def test_command_line_has_the_defaults_of_the_function():
    args = vars(cli.build_parser().parse_args(["benchmark"]))
    for name, parameter in inspect.signature(run_benchmarks).parameters.items():
        if name not in ("output", "progress", "measure"):
            assert args[name] == parameter.default, name


def test_settings_of_the_rows_are_plain():
    for row in ROWS.values():
        settings = benchmarks._settings(row, 10, 2, 2)
        assert json.loads(json.dumps(settings)) == plain(settings)
