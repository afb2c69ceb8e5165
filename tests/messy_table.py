"""What stock Detectron2 and this package do with each of the sets in ``messy_data``: trained on, and evaluated.

    python -m tests.messy_table                the table in Markdown; takes some minutes
    python -m tests.messy_table "box with NaN"   of some of them

Each case runs in a process of its own, with a small detector on a CPU, from the same files.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from tests.engine.small import MODEL
from tests.messy_data import CASES, Messy, write_messy

_PATIENCE = 120  # seconds until a run counts as one that hangs
_ITERATIONS = 6
_NAME = "messy"


def settings(case: Messy, output: Path) -> dict:
    """The small detector of the tests, on the set alone."""
    changes = {
        "DATASETS": {"TRAIN": [_NAME], "TEST": [_NAME]},
        "SOLVER": {**MODEL["SOLVER"], "MAX_ITER": _ITERATIONS, "BASE_LR": 1e-4},
        "MODEL": {**MODEL["MODEL"], "MASK_ON": case.masks, "DEVICE": "cpu"},
        "OUTPUT_DIR": str(output),
    }
    return {**{key: value for key, value in MODEL.items() if key != "TEST"}, **changes}


def run_stock(case: Messy, json_file: str, images: str, note: dict) -> None:
    """Detectron2's own trainer, data, model and evaluation; ``note["phase"]`` says how far it is."""
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator

    class StockTrainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg: CfgNode, name: str) -> COCOEvaluator:
            note["phase"] = "evaluating"
            return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)

    register_coco_instances(_NAME, {}, json_file, images)
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(settings(case, Path(json_file).parent / "stock")))
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME = "build_resnet_fpn_backbone", "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    os.makedirs(cfg.OUTPUT_DIR)
    note["phase"] = "loading"
    trainer = StockTrainer(cfg)
    note["phase"] = "training"
    trainer.train()
    records = DatasetCatalog.get(_NAME)
    note["images"], note["objects"] = len(records), sum(len(record["annotations"]) for record in records)
    mapper = DatasetMapper(cfg, False)
    pixels = [mapper(record)["image"].float() for record in records]
    note["white"] = sum(bool((image >= 250).float().mean() > 0.9) for image in pixels)
    note["black"] = sum(bool((image <= 5).float().mean() > 0.9) for image in pixels)
    note["phase"] = "done"


def run_ours(case: Messy, json_file: str, images: str, note: dict) -> None:
    """What ``train_net.py`` does."""
    from fpn_d2.data.coco_annotations import CheckOptions
    from fpn_d2.data.coco_check import check_coco
    from fpn_d2.data.defects import KINDS, TELL
    from fpn_d2.engine import load_prepared, run, user_mistakes_end_the_program

    output = Path(json_file).parent / "ours"
    content = settings(case, output)
    content["DATASETS"] = {**content["DATASETS"], "COCO_FORMAT": [[_NAME, json_file, images]]}
    config = Path(json_file).parent / "ours.yaml"
    config.write_text(yaml.safe_dump(content))
    note["phase"] = "checking"
    with user_mistakes_end_the_program():
        cfg = load_prepared(str(config))
    note["phase"] = "training"
    run(argparse.Namespace(resume=False, eval_only=False, opts=[], config_file=str(config)), cfg)
    note["phase"] = "done"
    found = check_coco(Path(json_file), Path(images), CheckOptions(masks=case.masks))
    note["told"] = [KINDS[kind][1] for kind in found.report.kinds(TELL) if kind != "crowd"]
    with contextlib.suppress(FileNotFoundError):
        note["counts"] = json.loads((output / "data_sets" / f"{_NAME}.defects.json").read_text())["counts"]


def in_a_process(run: object, case: Messy) -> dict:
    """Run a case; how it ended, with what it said on stderr."""
    folder = Path(tempfile.mkdtemp(prefix="messy_"))
    try:
        files = write_messy(case, folder)
        context = multiprocessing.get_context("fork")
        with context.Manager() as manager:
            note = manager.dict(phase="starting")
            process = context.Process(target=_child, args=(run, case, files, note, folder))
            process.start()
            process.join(_PATIENCE)
            hangs = process.is_alive()
            if hangs:
                process.kill()
                process.join()
            return {**note, "hangs": hangs, "code": process.exitcode, "said": (folder / "said").read_text()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(run: object, case: Messy, files: tuple, note: dict, folder: Path) -> None:
    said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        run(case, *files, note)
    except Exception as error:
        note["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        sys.exit(1)


def stock_words(result: dict) -> str:
    if result["hangs"]:
        return f"hangs while {result['phase']}"
    if "error" in result:
        return f"traceback while {result['phase']}: {_short(result['error'], 90)}"
    if result["phase"] != "done":
        return f"dies while {result['phase']} (exit code {result['code']})"
    words = f"trains on {result['images']} images, {result['objects']} objects"
    for colour in ("white", "black"):
        words += f"; {result[colour]} of them {colour}" if result[colour] else ""
    said = re.search("but only .* match|Filtered out|not unique", result["said"])  # Detectron2's own warnings of data
    return words + ("" if said else "; says nothing")


def our_words(result: dict) -> str:
    from fpn_d2.data.defects import KINDS, MEND, SKIP

    if result["hangs"] or "error" in result:
        return stock_words(result)
    stopped = re.search(r"^error: .*?/set\.json: (.*)$", result["said"], re.MULTILINE)
    if stopped:
        return f"stops before training: {_short(stopped[1], 110)}"
    if result["phase"] != "done":
        return f"dies while {result['phase']} (exit code {result['code']}): {_short(result['said'][-200:], 90)}"
    fates = {SKIP: [], MEND: []}
    for kind, count in result.get("counts", {}).items():
        if KINDS[kind][0] in fates:
            fates[KINDS[kind][0]].append(f"{count} x {KINDS[kind][1]}")
    words = "; ".join(f"{fate}: {', '.join(found)}" for fate, found in fates.items() if found)
    words = "; ".join(filter(None, [words, f"names {', '.join(result['told'])}" if result["told"] else ""]))
    return f"trains and evaluates{'; ' + words if words else ''}"


def _short(text: str, most: int) -> str:
    text = re.sub(r"/\S*/messy_\w+/", "", " ".join(text.split())).replace("|", "/")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[:most] + "..."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SET", help="of tests.messy_data; without: all")
    parser.add_argument("--json", type=Path, help="write the rows into this file too")
    args = parser.parse_args(arguments)
    import fpn_d2.engine  # noqa: F401  before the processes are forked

    rows = []
    print("| set | stock Detectron2 | fpn_d2 |\n| --- | --- | --- |")
    for name in args.names or CASES:
        stock, ours = (in_a_process(run, CASES[name]) for run in (run_stock, run_ours))
        rows.append([name, stock_words(stock), our_words(ours)])
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
