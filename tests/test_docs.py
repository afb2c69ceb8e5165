"""The documents: their code runs, their commands parse, their links lead somewhere, their tables are up to date."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone import BACKBONE_REGISTRY

from fpn_d2 import add_fpn_d2_config
from fpn_d2.cli import build_parser
from fpn_d2.config_names import find_config
from fpn_d2.engine import LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY
from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY
from fpn_d2.modeling.bottom_up.names import known_bottom_ups
from tests.compatibility import parser as compatibility_parser
from tests.mutation import build_parser as mutation_parser
from tests.recipes import build_parser as recipes_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Each line of each bash block, with the document it stands in."""
    return [(name, line) for name in NAMES for block in blocks(name, "bash") for line in block.splitlines() if line]


@pytest.fixture
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clean_registries():
    """Take away what a test has registered, so that it can run again in the same process."""
    registries = (
        *(NECK_REGISTRY, ROI_RULE_REGISTRY, LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY),
        *(BACKBONE_REGISTRY, ROI_HEADS_REGISTRY),
    )
    before = [{name for name, _ in registry} for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in [name for name, _ in registry if name not in names]:
            del registry._obj_map[name]


def default_cfg() -> CfgNode:
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    return cfg


def test_generated_parts_are_up_to_date(generate):
    for path, text in generate.generate().items():
        assert path.read_text() == text, f"{path.name} is stale: run python docs/generate.py"


@pytest.mark.slow
def test_table_of_models_is_up_to_date(generate):
    path = ROOT / "docs" / "models.md"
    text = path.read_text()
    fresh = generate.replace_part(text, "models", generate.model_table())

    def lines(text):  # Detectron2's main branch has pathways that 0.6 lacks
        return [line for line in text.splitlines() if "build_d2_" not in line and line]

    assert lines(text) == lines(fresh), "models.md is stale: run python docs/generate.py --models"


def test_everything_registered_is_in_the_table_of_models():
    text = (ROOT / "docs" / "models.md").read_text()
    registries = (NECK_REGISTRY, ROI_RULE_REGISTRY)
    names = [*known_bottom_ups(), *(name for registry in registries for name, _ in registry)]
    assert len(names) > 15
    for name in set(names) - {"build_tiny_backbone"}:  # of tests/tiny.py
        assert re.search(rf"^(\| {name} \||Not built: {name}\.)", text, re.MULTILINE), (
            f"{name} is not in models.md: run python docs/generate.py --models"
        )


def test_every_key_is_in_the_table(generate):
    added = CfgNode()
    add_fpn_d2_config(added)
    text = (ROOT / "docs" / "configuration.md").read_text()
    keys = generate.flatten(added)
    assert len(keys) > 10
    for key in keys:
        assert re.search(rf"^\| `{re.escape(key)}` \| `.+` \| .{{20,}} \|$", text, re.MULTILINE), key


def test_a_key_without_comment_is_refused(generate):
    source = "    # ---- Section ----\n    # What it means.\n    new.A = 1\n    new.B = 2\n"
    with pytest.raises(ValueError, match="B has no comment"):
        generate.key_table(source, {"A": 1, "B": 2})
    with pytest.raises(ValueError, match="names A, which"):
        generate.key_table(source, {"B": 2})
    assert "| `A` | `1` | What it means. |" in generate.key_table(source.replace("    new.B = 2\n", ""), {"A": 1})


def test_a_document_without_the_marks_is_refused(generate):
    marked = "a\n<!-- keys: begin, by a script -->\nold\n<!-- keys: end -->\nb\n"
    assert "new" in generate.replace_part(marked, "keys", "new")
    assert "old" not in generate.replace_part(marked, "keys", "new")
    with pytest.raises(ValueError, match="configs: begin"):
        generate.replace_part(marked, "configs", "new")


@pytest.mark.parametrize("name", NAMES)
def test_keys_named_in_the_text_exist(name):
    """Everything in the text that looks like a key of the configuration is one, or a section with * for its keys."""
    cfg = default_cfg()
    roots = "|".join(key for key, value in cfg.items() if isinstance(value, CfgNode))
    named = set(re.findall(rf"\b((?:{roots})(?:\.[A-Z0-9_]+)+)", (ROOT / name).read_text()))
    for key in named:
        node = cfg
        for part in key.split("."):
            assert isinstance(node, CfgNode) and part in node, f"{name} names {key}, which does not exist"
            node = node[part]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in filter(None, links):
        assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_blocks_run(name, clean_registries, monkeypatch, capsys):
    """The blocks of a document run one after the other; a comment after a print is what it prints."""
    monkeypatch.chdir(ROOT)
    namespace = {"cfg": get_cfg(), "__name__": "document"}
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), namespace)
        for expected in re.findall(r"^print\(.*\)\n# (.+)$", block, re.MULTILINE):
            assert expected in capsys.readouterr().out.splitlines()


def test_readme_swaps_into_a_config_of_detectron2(monkeypatch):
    """What the README calls two words are two pairs that make stock configurations build ours."""
    cfg = default_cfg()
    words = next(block for block in blocks("README.md", "text") if "MODEL.BACKBONE.NAME" in block).split()
    cfg.merge_from_list(words)
    assert cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY and cfg.MODEL.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert cfg.MODEL.BACKBONE.NAME == "build_fpn_backbone" and cfg.MODEL.ROI_HEADS.NAME == "FPNROIHeads"


@pytest.mark.parametrize(("name", "line"), commands())
def test_commands_parse(name, line):
    """Every command is one that the Makefile, train_net.py or fpn-d2 would take, with keys that exist."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in words[1:] if "=" not in word)
    elif words[:3] == ["python3", "-m", "venv"] or words[0] == "source":
        assert words[-1] in ("env", "env/bin/activate", ".venv/bin/activate")
    elif words[:2] == ["pip", "install"]:
        assert words[2:] == ["."]
    elif words[:2] == ["fpn-d2", "train"]:
        check_training_command(words[2:])
    elif words[0] == "fpn-d2":
        build_parser().parse_args(words[1:])
    elif words[0] == "python" and words[1].startswith("docs/"):
        assert (ROOT / words[1]).exists()
    elif words[:3] == ["python", "-m", "tests.compatibility"]:
        compatibility_parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "tests.recipes"]:
        recipes_parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "tests.mutation"]:
        mutation_parser().parse_args(words[3:])
    else:
        assert words[0] == "python" and words[1] in ("train_net.py", "tools/train_net.py"), line
        check_training_command(words[2:])


def check_training_command(words: list[str]) -> None:
    args = build_parser().parse_args(["train", *words])
    cfg = default_cfg()
    cfg.merge_from_file(str(find_config(args.config_file)))
    cfg.merge_from_list(args.opts)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        own = [entry[0] for entry in (*cfg.DATASETS.COCO_FORMAT, *cfg.DATASETS.VOC_FORMAT)]
        assert name.startswith(("coco_", "keypoints_coco_")) or name in own, name


def test_parts_of_the_user_register_through_detectron2(tmp_path):
    """extending.md: a file named in DETECTRON2_ENV_MODULE registers its classes as Detectron2 is imported."""
    parts = [block for block in blocks("docs/extending.md", "python") if "_REGISTRY.register" in block]
    parts += [block for block in blocks("docs/extending.md", "python") if "def setup_environment" in block]
    (tmp_path / "my_parts.py").write_text("\n".join(parts))
    code = (
        "import detectron2\n"
        "from fpn_d2.modeling import NECK_REGISTRY, ROI_RULE_REGISTRY\n"
        "from fpn_d2.engine import LR_SCHEDULER_REGISTRY\n"
        "print(*(name in registry for name, registry in (('LongerSide', ROI_RULE_REGISTRY), "
        "('BottomUpPyramid', NECK_REGISTRY), ('OneCycle', LR_SCHEDULER_REGISTRY))))\n"
    )
    env = dict(os.environ, DETECTRON2_ENV_MODULE=str(tmp_path / "my_parts.py"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True True True"
