"""The study: every variant of the pyramid, trained on the same scenes with the same small budget, several seeds each.

    folder/
        scenes/seed_S/                 the scenes of seed S, the same for all variants
        runs/VARIANT/seed_S/           one training run: result.json, console.txt, Detectron2's own files
        times/VARIANT.json             training time as a ratio to that of the reference variant
        results.json, table.md, study.png

A run that has its result.json is not done again, so that a study that was killed goes on where it was.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from tqdm import tqdm

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.config_files import merge_config_file
from fpn_d2.config_names import own_folder
from fpn_d2.data.scenes import make_scenes
from fpn_d2.errors import UserError
from fpn_d2.files import writable_folder

from ..measure.child import child_environment
from .report import COMPARED_WITH, write_report

CONFIGS = own_folder() / "study"
# Those of the paper first, in the order of its tables; others follow by name.
ORDER = ("fpn", "no_top_down", "no_lateral", "only_p2", "c4", "c5", "image_pyramid")
# What training time is compared with.
REFERENCE = "c4"
# P2 to P4 get objects of one octave each and P5 half an octave, the edges being those of configs/study/fpn.yaml.
SCENES = {"image_size": 128, "min_size": 8.0, "max_size": 90.0, "max_objects": 8, "own_colour": 1.0}
SIZE_EDGES = (16, 32, 64)
# Keys that say where things are, not what is done.
_PLACES = ("OUTPUT_DIR", "DATASETS.COCO_FORMAT")


def variants_in(configs: str | os.PathLike) -> dict[str, Path]:
    """The variants of a study: the YAML files of a folder by their names.

    Raises:
        UserError: the folder does not exist or holds none.
    """
    found = {path.stem: path for path in sorted(Path(configs).glob("*.yaml"))}
    if not found:
        raise UserError(f"no YAML files in {configs}; give a folder with some, with --configs")
    names = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*names, *(name for name in found if name not in names)]}


def run_study(
    folder: str | os.PathLike,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    variants: Sequence[str] | None = None,
    configs: str | os.PathLike = CONFIGS,
    iterations: int | None = None,
    train_scenes: int = 1000,
    val_scenes: int = 200,
    time_pairs: int = 20,
    jobs: int = 1,
    opts: Sequence[str] = (),
) -> Path:
    """Train every variant with every seed, compare their training times, write table and figure.

    Seeds go on the outside: while a study is under way, all variants have been trained about equally often. A run
    that fails does not stop the others.

    Args:
        folder: where everything goes; made if needed. See the top of this module.
        seeds: each draws its own scenes, initial weights and order of training.
        variants: names of YAML files in ``configs``; all if None.
        configs: folder of the variants.
        iterations: of each training; SOLVER.MAX_ITER of the configs if None.
        train_scenes: number of scenes to train on.
        val_scenes: number of scenes to evaluate on.
        time_pairs: pairs of training steps, variant and reference in turn, whose times are compared; 0: none.
        jobs: training runs at the same time. Times are always compared one at a time.
        opts: further keys and values for all variants, ``[KEY, value, ...]``.

    Returns:
        The path of the table.

    Raises:
        UserError: a variant, seed or number makes no sense, the folder holds runs with other settings, or runs have
            failed; the others have finished and are in the table.
    """
    folder = Path(folder).expanduser()
    available = variants_in(configs)
    names = list(variants or available)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(f"no variant {', '.join(unknown)} in {configs}; there are {', '.join(available)}")
    if not seeds or len(set(seeds)) < len(seeds) or len(set(names)) < len(names):
        raise UserError(f"seeds are {list(seeds)} and variants {names}; expected at least one, each once")
    for what, value, low in (("iterations", iterations, 1), ("jobs", jobs, 1), ("time_pairs", time_pairs, 0)):
        if value is not None and value < low:
            raise UserError(f"{what} is {value}; expected at least {low}")
    opts = [*map(str, opts), *(["SOLVER.MAX_ITER", str(iterations)] if iterations else [])]
    scenes = SCENES | {"train": train_scenes, "val": val_scenes}
    settings = {
        name: changed_keys(path, opts) | {"SCENES": scenes}
        for name, path in available.items()
        if name in (*names, REFERENCE, COMPARED_WITH)
    }
    for keys in settings.values():
        keys |= _circumstances(keys)

    writable_folder(folder)
    tasks = []
    for seed in seeds:
        made = make_scenes(folder / "scenes" / f"seed_{seed}", seed=seed, progress=sys.stderr.isatty(), **scenes)
        for name in names:
            run = folder / "runs" / name / f"seed_{seed}"
            task = {
                "kind": "train",
                "config": str(available[name]),
                "opts": [*opts, *_places(made, run, seed)],
                "annotations": str(made / "annotations" / "instances_val.json"),
                "edges": SIZE_EDGES,
                "settings": settings[name],
                "result": str(run / "result.json"),
                "console": str(run / "console.txt"),
            }
            tasks.append(task)
    failed = _do(tasks, jobs, "Training")
    if time_pairs and REFERENCE in available:
        made = folder / "scenes" / f"seed_{seeds[0]}"
        times = folder / "times"
        tasks = [
            {
                "kind": "time",
                "config": str(available[name]),
                "opts": [*opts, *_places(made, times / name, seeds[0])],
                "reference_config": str(available[REFERENCE]),
                "reference_opts": [*opts, *_places(made, times / f"{name}_{REFERENCE}", seeds[0])],
                "pairs": time_pairs,
                "settings": {"variant": settings[name], "reference": settings[REFERENCE], "pairs": time_pairs},
                "result": str(times / f"{name}.json"),
                "console": str(times / f"{name}.txt"),
            }
            for name in names
        ]
        failed += _do(tasks, 1, "Comparing times")
    table = write_report(folder, names, seeds, REFERENCE, settings)
    if failed:
        raise UserError(
            f"{len(failed)} of the runs failed, see {', '.join(failed)}; start again to repeat them"
        )
    return table


def changed_keys(config: Path, opts: Sequence[str]) -> dict[str, object]:
    """What a config and options change of the defaults, in dotted form, but for where files are.

    Raises:
        UserError: a key does not exist, or a value has the wrong type.
    """
    if len(opts) % 2:
        raise UserError(f"options are pairs of key and value, but {opts[-1]!r} is left without a partner")
    cfg, defaults = _defaults(), _flat(_defaults())
    try:
        merge_config_file(cfg, str(config))
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError) as error:
        raise UserError(f"{config} with {' '.join(opts) or 'no options'}: {error}") from None
    # Through JSON, in which they are kept: tuples become lists.
    changed = {k: v for k, v in _flat(cfg).items() if v != defaults[k] and k not in _PLACES}
    return json.loads(json.dumps(changed))


def _circumstances(keys: dict[str, object]) -> dict[str, str]:
    """The device that a run with these keys gets, and versions: what else AP, time and memory depend on."""
    wanted = str(keys.get("MODEL.DEVICE", "cuda"))
    on_gpu = wanted.startswith("cuda") and torch.cuda.is_available()
    return {
        "MODEL.DEVICE": torch.cuda.get_device_name(wanted) if on_gpu else "cpu",
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    return cfg


def _flat(node: CfgNode, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value}
    return flat


def _places(scenes: Path, output: Path, seed: int) -> list[str]:
    data = [
        [name, str(scenes / "annotations" / f"instances_{split}.json"), str(scenes / "images" / split)]
        for name, split in (("study_train", "train"), ("study_val", "val"))
    ]
    return ["DATASETS.COCO_FORMAT", repr(data), "OUTPUT_DIR", str(output), "SEED", str(seed)]


def _do(tasks: list[dict], jobs: int, title: str) -> list[str]:
    """Do what has no result yet, each task in a process of its own.

    Returns:
        The console files of the tasks that failed.
    """
    missing = [task for task in tasks if not _is_done(task)]
    failed = []
    with (
        tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=title, unit="run", disable=None) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        running = {pool.submit(_do_one, task): task for task in missing}
        try:
            for done in as_completed(running):
                if not done.result():
                    failed.append(running[done]["console"])
                    tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(failed)


def _is_done(task: dict) -> bool:
    """Whether the result is there.

    Raises:
        UserError: it is there, but of a run with other settings.
    """
    path = Path(task["result"])
    if not path.exists():
        return False
    found = json.loads(path.read_text())["settings"]
    if found == task["settings"]:
        return True
    raise UserError(
        f"{path} is of a run with other settings ({_difference(found, task['settings'])}); choose another --output, "
        "or delete that file to have the run repeated"
    )


def _difference(found: dict, wanted: dict) -> str:
    keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]

    def value(settings: dict, key: str) -> str:
        return repr(settings[key]) if key in settings else "the default"

    return ", ".join(f"{key} {value(found, key)} there, {value(wanted, key)} here" for key in keys)


def _do_one(task: dict) -> bool:
    console = Path(task["console"])
    console.parent.mkdir(parents=True, exist_ok=True)
    with open(console, "w") as output:
        command = [sys.executable, "-m", "fpn_d2.analysis.study.worker", json.dumps(task)]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment(), check=False)
    if done.returncode == 0 and task["kind"] == "train":
        for checkpoint in console.parent.glob("*.pth"):
            checkpoint.unlink()  # hundreds of megabytes a run, which nothing reads again
    return done.returncode == 0
