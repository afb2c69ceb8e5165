"""Configuration files as data: what Detectron2's configs need is read, what would run something or never end is not."""

import os
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg

from fpn_d2.arithmetic import arithmetic
from fpn_d2.config_files import merge_config_file, parse_config, read_config
from fpn_d2.errors import UserError

ZOO = Path(model_zoo.__file__).parent / "configs"


def _file(folder, text, name="c.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_each_config_of_the_zoo_becomes_what_detectron2_makes_of_it():
    paths = sorted(ZOO.rglob("*.yaml"))
    assert len(paths) > 50
    for path in paths:
        assert read_config(str(path)) == get_cfg().load_yaml_with_base(str(path), allow_unsafe=True), path
    expected, cfg = get_cfg(), get_cfg()
    retinanet = str(ZOO / "COCO-Detection" / "retinanet_R_50_FPN_1x.yaml")
    expected.merge_from_file(retinanet)
    merge_config_file(cfg, retinanet)
    assert cfg == expected


@pytest.mark.parametrize("version", ["", "VERSION: 1\n", "VERSION:\n"])
def test_a_config_of_the_first_version_is_brought_up_to_date(tmp_path, version):
    path = _file(tmp_path, f"{version}MODEL: {{WEIGHT: w.pkl}}\nTEST: {{AUG_ON: True}}")
    cfg = get_cfg()
    merge_config_file(cfg, path)
    if version != "VERSION:\n":  # which Detectron2 does not read
        expected = get_cfg()
        expected.merge_from_file(path)
        assert cfg == expected
    assert (cfg.MODEL.WEIGHTS, cfg.TEST.AUG.ENABLED) == ("w.pkl", True)


BASES = ["base.yaml", "{folder}/base.yaml", "~/base.yaml", "../{name}/base.yaml", "[more.yaml, base.yaml]"]


@pytest.mark.parametrize("base", BASES)
def test_a_base_is_found_beside_its_file_absolute_and_at_home(tmp_path, monkeypatch, base):
    monkeypatch.setenv("HOME", str(tmp_path))
    _file(tmp_path, "A:\n  B: 1\n  C: (60000, 80000)\nD: [1]", "base.yaml")
    _file(tmp_path, "A: {B: 7}\nE: 5", "more.yaml")
    path = _file(tmp_path, f"_BASE_: {base.format(folder=tmp_path, name=tmp_path.name)}\nA: {{B: 2}}")
    more = {"E": 5} if "more" in base else {}
    assert read_config(path) == {"A": {"B": 2, "C": "(60000, 80000)"}, "D": [1], **more}
    assert read_config("~/c.yaml") == read_config(path)


def test_a_base_of_two_files_is_no_circle(tmp_path):
    _file(tmp_path, "A: 1", "base.yaml")
    for name in ("left.yaml", "right.yaml"):
        _file(tmp_path, f"_BASE_: base.yaml\n{name[0]}: 2", name)
    assert read_config(_file(tmp_path, "_BASE_: [left.yaml, right.yaml]")) == {"A": 1, "l": 2, "r": 2}


def test_bases_in_a_circle_are_named(tmp_path):
    (tmp_path / "link.yaml").symlink_to(tmp_path / "c.yaml")
    _file(tmp_path, "_BASE_: link.yaml", "d.yaml")
    with pytest.raises(UserError, match=r"circle, .*/c\.yaml -> .*/d\.yaml -> .*/c\.yaml"):
        read_config(_file(tmp_path, "_BASE_: d.yaml"))


def test_bases_without_end_are_refused(tmp_path):
    for number in range(60):
        _file(tmp_path, f"_BASE_: {number + 1}.yaml", f"{number}.yaml")
    with pytest.raises(UserError, match="more than 50 files"):
        read_config(str(tmp_path / "0.yaml"))
    # Each file twice: 2^40 readings, were each not read once.
    for number in range(40):
        _file(tmp_path, f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]", f"{number}.yaml")
    _file(tmp_path, "A: 1", "40.yaml")
    assert read_config(str(tmp_path / "0.yaml")) == {"A": 1}


def test_tuples_sums_and_aliases_are_read():
    text = "A: !!python/tuple [1, 2]\nB: !!python/object/apply:eval ['[x * 2 for x in range(2)]']\n"
    assert parse_config(text, "c.yaml") == {"A": (1, 2), "B": [0, 2]}
    text = "C: &c {D: 1}\nE: *c\nF: {<<: *c, G: 2}"
    assert parse_config(text, "c.yaml") == {"C": {"D": 1}, "E": {"D": 1}, "F": {"D": 1, "G": 2}}


@pytest.mark.parametrize(
    "text",
    [
        "A: !!python/object/apply:os.mkdir ['{made}']",
        "A: !!python/object/new:os.mkdir ['{made}']",
        "A: !!python/object/apply:eval ['__import__(\"os\").mkdir(\"{made}\")']",
        "A: !!python/object/apply:eval ['[c for c in ().__class__.__base__.__subclasses__()]']",
        "A: !!python/name:os.system",
        "A: !!python/module:os",
        "A: !!python/object:collections.OrderedDict {{}}",
        "_BASE_: !!python/object/apply:os.mkdir ['{made}']",
        "? !!python/object/apply:os.mkdir ['{made}']\n: 1",
    ],
)
def test_a_file_that_would_run_something_runs_nothing(tmp_path, text):
    path = _file(tmp_path, text.format(made=tmp_path / "made"))
    with pytest.raises(UserError, match=f"^{path}: .*(asks for Python's|is not worked out|is no sum)"):
        read_config(path)
    assert not (tmp_path / "made").exists()
    if "apply:os" in text and text.startswith("A"):  # or this shows nothing
        get_cfg().load_yaml_with_base(path, allow_unsafe=True)
        assert (tmp_path / "made").exists()


LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
MERGES = "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60))
DEEPER = "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 5000))
BOMBS = {
    "billion laughs": (f"a0: &a0 [x]\n{LAUGHS}", "unfold into more than"),
    "merged over and over": (f"a0: &a0 {{x: 1}}\n{MERGES}", "unfold into more than"),
    "deep by aliases": (f"a0: &a0 [x]\n{DEEPER}", "nested more than"),
    "an alias of itself": ("A: &a [*a]", "part of"),
    "a merge of itself": ("A: &a {<<: *a}", "part of"),
    "deep lists": ("A: " + "[" * 200_000, "nested more than"),
    "deep mappings": ("A: " + "{a: " * 200_000, "nested more than"),
    "deep block lists": ("- " * 200_000, "nested more than"),
    "deep text": ("A: '" + "(" * 10_000 + "'", "nested too deep|^"),
    "a long sum as text": ("A: '" + "1+" * 9_000 + "1'", "nested too deep|^"),
    "long text": ("A: " + "x" * 30_000, "too long"),
    "minus signs": ("A: '" + "-" * 15_000 + "1'", "nested too deep|^"),
    "an unhashable text": ("A: '{[]: 1}'", "no value of Python's"),
    "a long key": (f"? {'k' * 5000}\n: 1", "no name"),
    "a key with control characters": ('"A\\e[2J": 1', "no name"),
    "a number as key": ("1: 2", "no text"),
    "a list as key": ("? [1]\n: 2", "not valid YAML"),
    "a date": ("A: 2001-01-01", "put quotes round it"),
    "a date that does not exist": ("A: 2001-99-99", "a value that is none"),
    "a number of many digits": ("A: " + "9" * 5000, "a value that is none|^"),
    "an empty number": ("A: !!int ''", "a value that is none"),
    "bytes": ("A: !!binary aGk=", "is a bytes"),
    "a set": ("A: !!set {a}", "is a set"),
    "a large power": ("A: !!python/object/apply:eval ['9**9**9']", "power beyond"),
    "a long range": ("A: !!python/object/apply:eval ['range(10**15)']", "too many steps"),
    "a long loop": ("A: !!python/object/apply:eval ['[0 for x in range(10**9)]']", "too many steps"),
    "a long rounding": ("A: !!python/object/apply:eval ['round(5, -10**15)']", "takes one number"),
    "no text": (b"A: \xff\xfe", "not valid YAML"),
    "control characters": ("A: \x07", "not valid YAML"),
    "two documents": ("A: 1\n---\nB: 2", "not valid YAML"),
    "a large file": (b"#" * (2**20 + 1), "larger than"),
    "a base that is none": ("_BASE_: 3", "_BASE_ is 3"),
    "a base with NUL": ('_BASE_: "a\\0b"', "does not exist: looked for"),
    "nothing": ("", "no KEY: value pairs"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_would_exhaust_the_machine_is_refused_in_one_line(tmp_path, bomb):
    text, words = BOMBS[bomb]
    path = _file(tmp_path, text)
    if words.endswith("|^"):  # newer versions of Python read it
        try:
            read_config(path)
        except UserError as error:
            assert path in str(error)
        return
    with pytest.raises(UserError, match=f"(?s)c.yaml.*({words})") as error:
        read_config(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name in ("pipe.yaml", "loop.yaml", "none.yaml", "a\0b", "n" * 5000, ""):
        with pytest.raises(UserError, match="no configuration file"):
            read_config(str(tmp_path / name))


def test_a_version_that_does_not_exist_is_named(tmp_path):
    for version in ("3", "0", "x", "[1]", "True"):
        with pytest.raises(UserError, match="VERSION is"):
            merge_config_file(get_cfg(), _file(tmp_path, f"VERSION: {version}"))
    with pytest.raises(KeyError, match="WEIGHT"):
        merge_config_file(get_cfg(), _file(tmp_path, "WEIGHT: 1\nVERSION: 2"))


@pytest.mark.parametrize(
    "text",
    [
        "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",
        "[int(x * 0.1 * 640) for x in range(5, 16)]",
        "int(60000 * 1.5)", "(1, -2, +3)", "7 // 2 % 2", "list(range(3))",
        "tuple([1.5, round(2.6), abs(-1), float(2)])",
    ],
)  # fmt: skip
def test_sums_are_worked_out_as_python_does(text):
    value = eval(text)
    assert arithmetic(text) == value and type(arithmetic(text)) is type(value)
