"""Mutation test of the wiring, run by hand: are single small faults between configuration and component noticed?

    python -m tests.mutation --sample 100 --seed 1

Faults are sampled from the files below, each a change of one node: a comparison, a number by one, True for False, `and`
for `or`, a `not` or an `if` the other way round, a keyword argument or a statement left out, two arguments swapped, a
string that is a key. Text for people (messages, log lines, annotations), what draws and what parses formats of files
are left out. For each fault the tests of the file that it is in run until one fails, in a fork of a process that has
imported PyTorch and Detectron2, on a copy of the repository, so that processes which tests start see the fault too.
Results are kept in .pytest_cache/mutation: the same command goes on where it stopped, and tries anew what was not
noticed.

(mutmut 3.8 leaves decorated functions alone, which are the builders here; cosmic-ray starts a Python for each fault.)
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".pytest_cache" / "mutation"
_WHOLE = ["fast/test_apply.py", "modeling/test_parity.py", "checkpoint/test_torchvision.py"]
# Files, and where their tests are: what is not called test_ and the file's name, there, comes behind it.
WIRING = {
    "fpn_d2/config.py": ["engine/test_prepare.py", "modeling/test_roi_heads.py", "test_docs.py", "test_configs.py"],
    "fpn_d2/modeling/*.py": ["modeling/test_roi_heads.py", "modeling/test_backbone.py", *_WHOLE],
    "fpn_d2/modeling/necks/*.py": ["modeling/test_necks.py", "modeling/test_backbone.py"],
    "fpn_d2/modeling/bottom_up/*.py": ["modeling/test_timm_backbone.py", "modeling/test_bottom_ups.py"],
    "fpn_d2/engine/*.py": ["engine/test_checks.py", "engine/test_trainer.py", "engine/test_hooks.py"],
    "fpn_d2/evaluation/*.py": ["evaluation"],
    "fpn_d2/checkpoint/*.py": ["checkpoint/test_torchvision_names.py", "checkpoint"],
    "fpn_d2/data/mapper.py": [],
    "fpn_d2/data/*_format.py": ["data/test_coco_format.py"],
    "fpn_d2/analysis/compare/*.py": ["analysis/compare", "analysis/test_subjects.py"],
    "fpn_d2/analysis/measure/*.py": ["analysis/measure"],
}
# What draws and what reads formats of files is no wiring: files, or functions of one.
LEFT_OUT = {"fpn_d2/analysis/compare/figures.py": None, "fpn_d2/analysis/compare/page.py": None}
LEFT_OUT["fpn_d2/evaluation/pictures.py"] = ("", "_pair", "_panel", "_colour", "_white", "_grid")
LEFT_OUT |= dict.fromkeys(
    f"fpn_d2/checkpoint/{name}.py" for name in ("pickled_arrays", "plain_pickle", "torch_file", "safetensors_file")
)
# Faults that change nothing that anybody could see: (file, line's text, fault), with the reason.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "fpn_d2/analysis/compare/measure.py",
        "device = torch.device(models[0].cfg.MODEL.DEVICE)",
        "0 -1",
    ): "all models are on one device, which run_compare has checked",
}

_SWAPPED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}


@dataclass(frozen=True)
class Fault:
    """One changed node: ``file`` with the bytes from ``start`` to ``end`` replaced by ``new``."""

    file: str
    line: int
    function: str  # "" at the top of the file
    start: int
    end: int
    new: str
    what: str
    text: str  # of the line
    column: int

    def key(self) -> str:
        return f"{self.file}|{self.function}|{self.text}|{self.column}|{self.what}"


class _Faults(ast.NodeVisitor):
    def __init__(self, file: str, source: str):
        self.file, self.lines = file, source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.functions: list[ast.FunctionDef] = []
        self.found: list[Fault] = []

    def add(self, node: ast.AST, new: str | ast.AST, what: str) -> None:
        if "/modeling/" in self.file and not any(self._takes_cfg(function) for function in self.functions):
            return
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        name = self.functions[-1].name if self.functions else ""
        new = new if isinstance(new, str) else f"({ast.unparse(new)})"
        text = self.lines[node.lineno - 1].strip()
        self.found.append(Fault(self.file, node.lineno, name, start, end, new, what, text, node.col_offset))

    @staticmethod
    def _takes_cfg(function: ast.FunctionDef) -> bool:
        return any(argument.arg == "cfg" for argument in function.args.args)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self.functions.append(node)
        for statement in node.body:
            self.visit(statement)
        self.functions.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # text for people

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add(node, "pass", "raise left out")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        text = ast.unparse(node)
        if text.startswith(("logger.", "self.bar.", "bar.")):
            return
        if not text.startswith("super().__init__"):
            self.add(node, "pass", "statement left out")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if ast.unparse(node.targets[0]) == "__all__":
            return
        if isinstance(node.targets[0], ast.Attribute | ast.Subscript) and self.functions[-1:] != []:
            if self.functions[-1].name != "__init__":  # nothing works without an attribute
                self.add(node, "pass", "statement left out")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass", "statement left out")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.add(node.test, f"(not ({ast.unparse(node.test)}))", "if the other way round")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in _SWAPPED:
            other = copy.deepcopy(node)
            other.ops = [_SWAPPED[type(node.ops[0])]()]
            self.add(node, other, f"comparison {type(node.ops[0]).__name__}")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = copy.deepcopy(node)
        other.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.add(node, other, f"{type(node.op).__name__} the other")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.add(node, f"bool({ast.unparse(node.operand)})", "not left out")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, str(not node.value), f"{node.value} the other")
        elif isinstance(node.value, int | float):
            for step in (1, -1):
                self.add(node, f"({node.value + step!r})", f"{node.value} {step:+d}")

    def _key(self, node: ast.AST | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.add(node, repr(node.value + "_"), f"key {node.value!r}")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._key(node.slice)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key in node.keys:
            self._key(key)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name.startswith(("logger.", "print", "warnings.", "UserError", "ValueError", "super().__init__")):
            return
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop") and node.args:
            self._key(node.args[0])
        for number, keyword in enumerate(node.keywords):
            # False is what leaving these two out comes to.
            said = keyword.arg == "check" and ast.unparse(keyword.value) == "False"
            said = said or keyword.arg == "strict"  # of zip: what is paired is as long as it is in any case
            if keyword.arg and not said:
                other = copy.deepcopy(node)
                del other.keywords[number]
                self.add(node, ast.unparse(other), f"argument {keyword.arg} left out")
        obvious = name in ("isinstance", "issubclass", "getattr", "hasattr")  # stops at once
        starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
        if len(node.args) > 1 and not obvious and not starred:
            other = copy.deepcopy(node)
            other.args[:2] = other.args[1::-1]
            if ast.unparse(other) != ast.unparse(node):
                self.add(node, ast.unparse(other), f"arguments of {name} swapped")
        self.generic_visit(node)


def faults() -> list[Fault]:
    """Every fault that can be made."""
    found = []
    for pattern in WIRING:
        for path in sorted(ROOT.glob(pattern)):
            file = path.relative_to(ROOT).as_posix()
            visitor = _Faults(file, path.read_text())
            visitor.visit(ast.parse(path.read_text()))
            out = LEFT_OUT.get(file, ())
            found += [fault for fault in visitor.found if out is not None and fault.function not in out]
    return found


# ---- Running tests in forks -------------------------------------------------------------------------------------


def fork(tree: Path, work, seconds: float) -> int | None:
    """Run ``work()`` in a fork that lives in ``tree``; its exit status, None where it took longer than ``seconds``."""
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 99
        try:
            os.chdir(tree)
            sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
            os.environ.update(PYTHONPATH=str(tree), FPN_D2_CACHE=str(ROOT / ".pytest_cache" / "compiled"))
            log = os.open(KEPT / f"log{os.getppid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class _Failed:
    """A pytest plugin that writes down which test failed."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.file.write_text(report.nodeid)


def run_tests(names: list[str], failed: Path) -> int:
    sys.dont_write_bytecode = True
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-W", "ignore"]
    return pytest.main([*options, *names], plugins=[_Failed(failed)])


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of what git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            if (ROOT / file).is_file():
                (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, Path(folder) / file)
        yield Path(folder)


def tests_of(file: str) -> list[str]:
    """Test files for ``file``, its own first."""
    pattern, others = next((pattern, tests) for pattern, tests in WIRING.items() if ROOT / file in ROOT.glob(pattern))
    folder = Path("tests", *Path(pattern).parts[1:2]) if "*" in pattern else Path("tests", *Path(file).parts[1:-1])
    own = sorted((ROOT / folder).glob(f"**/test_{Path(file).stem}.py"))
    files = [*(path.relative_to(ROOT).as_posix() for path in own), *(f"tests/{name}" for name in others)]
    return list(dict.fromkeys(files))


def noticed_by(fault: Fault, tree: Path, seconds: float) -> str:
    """Which test fails under ``fault``, and passes without it; "" where none does.

    Tests that do not end within ``seconds``, or cannot be collected, notice it too.
    """
    path, failed = tree / fault.file, tree / "failed.txt"
    failed.unlink(missing_ok=True)
    right, files = path.read_bytes(), tests_of(fault.file)
    try:
        path.write_bytes(right[: fault.start] + fault.new.encode() + right[fault.end :])
        status = fork(tree, lambda: run_tests(files, failed), seconds)
    finally:
        path.write_bytes(right)
    if status == 0:
        return ""
    test = failed.read_text() if failed.exists() else ""
    if fork(tree, lambda: run_tests([test] if test else [*files, "--collect-only"], failed), seconds) != 0:
        sys.exit(f"{test or files} fails without any fault")
    return test or f"pytest ended with {status}"


def _read(name: str) -> dict:
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(name: str, content: dict) -> None:
    (KEPT / f"{name}.json").write_text(json.dumps(content, indent=1))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Are single small faults in the wiring noticed by a test?")
    parser.add_argument("--sample", type=int, default=100, help="number of faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these; the same command goes on")
    parser.add_argument("--only", default="", help="only faults in files whose path has this in it")
    parser.add_argument("--limit", type=float, default=900, help="seconds for the tests of one fault")
    parser.add_argument("--part", default="1/1", help="I/N: only each N-th of the sample, beginning with the I-th")
    parser.add_argument("--list", action="store_true", help="only print the sample")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    until = time.monotonic() + arguments.seconds
    every = [fault for fault in faults() if arguments.only in fault.file]
    # By a hash of what they are, so that a change elsewhere leaves the sample as it is.
    every.sort(key=lambda fault: hashlib.sha256(f"{arguments.seed} {fault.key()}".encode()).digest())
    sample = every[: arguments.sample]
    equivalent = [fault for fault in sample if (fault.file, fault.text, fault.what) in EQUIVALENT]
    sample = [fault for fault in sample if fault not in equivalent]
    if arguments.list:
        for fault in sample:
            print(f"{fault.file}:{fault.line}: {fault.what}: {fault.text}")
        return
    import detectron2.engine  # noqa: F401  (once, for all forks)
    import torchvision  # noqa: F401

    first, step = map(int, arguments.part.split("/"))
    own = sample[first - 1 :: step]
    KEPT.mkdir(parents=True, exist_ok=True)
    results = _read("noticed")
    with copied() as tree:
        for fault in sample:
            if fault not in own or results.get(fault.key()) or time.monotonic() > until:
                continue
            found = noticed_by(fault, tree, arguments.limit)
            results = {**_read("noticed"), fault.key(): found}
            _write("noticed", results)
            print(f"{fault.file}:{fault.line} {fault.what} | {fault.text} | {found or 'NOT NOTICED'}", flush=True)
    tried = [fault for fault in sample if fault.key() in results]
    survivors = [fault for fault in tried if not results[fault.key()]]
    print(f"\n{len(tried) - len(survivors)} of {len(tried)} faults noticed, of {len(every)} that can be made; "
          f"{len(equivalent)} more in the sample change nothing; {len(sample) - len(tried)} not tried yet")  # fmt: skip
    for fault in survivors:
        print(f"{fault.file}:{fault.line}: {fault.what}: {fault.text}")


if __name__ == "__main__":
    main()
