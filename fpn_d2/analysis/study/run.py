"""The study: every variant of the pyramid, trained on the same scenes with the same small budget, several seeds each.

    folder/
        scenes/seed_S/                 the scenes of seed S, the same for all variants
        maps/                          what a frozen bottom-up pathway makes of them, where it is frozen
        tuning/VARIANT/RATE/           one training run with that learning rate, on scenes of a seed that is no other's
        runs/VARIANT/seed_S/           one training run: result.json, console.txt, Detectron2's own files
        heads_on_NAME/VARIANT/seed_S/  the same on the proposals of NAME, which are in proposals/NAME/seed_S/
        times/VARIANT.json             training time as a ratio to that of the reference variant
        results.json, table.md, study.png
        records.json                   the results of all trainings, for another folder or machine to go on from

A run that has its result.json is not done again, so that a study that was killed goes on where it was.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from tqdm import tqdm

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.config_files import merge_config_file
from fpn_d2.data.scenes import make_scenes
from fpn_d2.errors import UserError
from fpn_d2.files import writable_folder

from ..measure.child import child_environment
from .records import take_over, write_records
from .report import write_report
from .settings import Setting

# Scenes that learning rates are chosen on.
TUNING_SEED = 0
SETS = {"study_train": "train", "study_val": "val"}
# Keys that say where things are, not what is done.
_PLACES = (
    *("OUTPUT_DIR", "DATASETS.COCO_FORMAT"),
    *("DATASETS.PROPOSAL_FILES_TRAIN", "DATASETS.PROPOSAL_FILES_TEST"),
)


def variants_in(configs: str | os.PathLike, order: Sequence[str] = ()) -> dict[str, Path]:
    """The variants of a study: the YAML files of a folder by their names, those in ``order`` first.

    Raises:
        UserError: the folder does not exist or holds none.
    """
    found = {path.stem: path for path in sorted(Path(configs).glob("*.yaml"))}
    if not found:
        raise UserError(f"no YAML files in {configs}; give a folder with some, with --configs")
    names = [name for name in order if name in found]
    return {name: found[name] for name in [*names, *(name for name in found if name not in names)]}


def run_study(
    folder: str | os.PathLike,
    *,
    setting: Setting,
    seeds: Sequence[int] = (1, 2, 3),
    variants: Sequence[str] | None = None,
    iterations: int | None = None,
    tuning_iterations: int | None = None,
    time_pairs: int = 20,
    jobs: int = 1,
    opts: Sequence[str] = (),
    known: str | os.PathLike | None = None,
    proposals_of: str | None = None,
) -> Path:
    """Train every variant with every seed, compare their training times, write table and figure.

    Where the setting names several learning rates, each variant is trained with each of them first, on scenes of a seed
    of their own, and gets the one with the highest AP. Seeds go on the outside: while a study is under way, all
    variants have been trained about equally often. A run that fails does not stop the others.

    Args:
        folder: where everything goes; made if needed. See the top of this module.
        setting: scenes, recipe, what is measured.
        seeds: each draws its own scenes, initial weights and order of training.
        variants: names of YAML files in ``setting.configs``; all if None.
        iterations: of each training; SOLVER.MAX_ITER of the configs if None.
        tuning_iterations: of each training that a learning rate is tried in; half of the others if None.
        time_pairs: pairs of training steps, variant and reference in turn, whose times are compared; 0: none.
        jobs: training runs at the same time. Times are always compared one at a time.
        opts: further keys and values for all variants, ``[KEY, value, ...]``.
        known: the ``records.json`` of another folder: what is in it with the same settings is not done again.
        proposals_of: a variant whose proposals, those of its trained model, all are trained and tested with, without an
            RPN of their own: what is compared is the heads alone, as in table 2 of the paper.

    Returns:
        The path of the table.

    Raises:
        UserError: a variant, seed or number makes no sense, the folder holds runs with other settings, or runs have
            failed; the others have finished and are in the table.
    """
    folder = Path(folder).expanduser()
    available = variants_in(setting.configs, setting.order)
    names = list(variants or available)
    unknown = [name for name in [*names, *([proposals_of] if proposals_of else [])] if name not in available]
    if unknown:
        raise UserError(f"no variant {', '.join(unknown)} in {setting.configs}; there are {', '.join(available)}")
    if not seeds or len(set(seeds)) < len(seeds) or len(set(names)) < len(names):
        raise UserError(f"seeds are {list(seeds)} and variants {names}; expected at least one, each once")
    if setting.rates and TUNING_SEED in seeds:
        raise UserError(f"seed {TUNING_SEED} is that of the scenes that learning rates are chosen on; take another")
    numbers = (("iterations", iterations, 1), ("jobs", jobs, 1), ("time_pairs", time_pairs, 0))
    for what, value, low in (*numbers, ("tuning_iterations", tuning_iterations, 1)):
        if value is not None and value < low:
            raise UserError(f"{what} is {value}; expected at least {low}")
    opts = [*map(str, opts), *(["SOLVER.MAX_ITER", str(iterations)] if iterations else [])]
    study = _Study(folder, setting, available, opts, known, seeds[0])
    for name in names:
        study.settings(name, [])  # finds mistakes in opts

    writable_folder(folder)
    failed, chosen = [], {name: [] for name in names}
    if setting.rates:
        tuned = [*names, *([proposals_of] if proposals_of and proposals_of not in names else [])]
        failed += study.do(study.tuning_runs(tuned, tuning_iterations), jobs, "Choosing learning rates")
        chosen = {name: study.best_rate(name) for name in names}
    if proposals_of:
        failed += study.fix_proposals(proposals_of, seeds, jobs)
    settings = {name: study.settings(name, chosen.get(name, [])) for name in available}
    runs = [study.run(name, seed, chosen[name]) for seed in seeds for name in names if chosen[name] is not None]
    failed += study.do(runs, jobs, "Training")
    if time_pairs and setting.reference in available and not proposals_of:
        failed += _do([study.times(name, seeds[0], time_pairs) for name in names], 1, "Comparing times")
    table = write_report(folder, names, seeds, setting.reference, settings, study.place)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed, see {', '.join(failed)}; start again to repeat them")
    return table


class _Study:
    """What each process is asked to do: the tasks of :mod:`.worker`."""

    def __init__(
        self,
        folder: Path,
        setting: Setting,
        available: dict[str, Path],
        opts: Sequence[str],
        known: str | os.PathLike | None,
        first_seed: int,
    ):
        self.folder = folder
        self.setting = setting
        self.available = available
        self.opts = list(opts)
        self.known = known
        self.first_seed = first_seed
        self.place = "runs"
        self.proposals: dict = {}  # files by seed, and what they depend on

    def do(self, tasks: list[dict], jobs: int, title: str) -> list[str]:
        """Do the trainings that have no result; see :func:`_do`."""
        if self.known:
            take_over(self.known, self.folder, tasks)
        failed = _do(tasks, jobs, title, after=lambda: write_records(self.folder))
        write_records(self.folder)
        return failed

    def settings(self, name: str, rate: Sequence[str] | None) -> dict[str, object]:
        """All that the result of a run depends on."""
        keys = changed_keys(self.available[name], [*self.opts, *(rate or [])]) | {"SCENES": dict(self.setting.scenes)}
        return keys | _circumstances(keys) | ({"PROPOSALS": self.proposals["settings"]} if self.proposals else {})

    def scenes(self, seed: int) -> Path:
        """The scenes of a seed, made if they are not there."""
        return make_scenes(
            self.folder / "scenes" / f"seed_{seed}", seed=seed, progress=sys.stderr.isatty(), **self.setting.scenes
        )

    def run(self, name: str, seed: int, more: Sequence[str], run: Path | None = None) -> dict:
        """The task of one training, with keys and values ``more``."""
        run = run or self.folder / self.place / name / f"seed_{seed}"
        made = self.scenes(seed)
        fixed = []
        if self.proposals:
            fixed = _with_proposals(changed_keys(self.available[name], self.opts), self.proposals[seed])
        return {
            "kind": "train",
            "config": str(self.available[name]),
            "opts": [*self.opts, *more, *fixed, *_places(made, run, seed)],
            "annotations": str(made / "annotations" / "instances_val.json"),
            "edges": self.setting.edges,
            "recall_at": [] if fixed else self.setting.recall_at,
            "image_pyramid": name in self.setting.image_pyramid and seed == self.first_seed and not fixed,
            "maps": str(self.folder / "maps") if self.setting.keep_maps else None,
            "settings": self.settings(name, more),
            "result": str(run / "result.json"),
            "console": str(run / "console.txt"),
        }

    def tuning_runs(self, names: Sequence[str], iterations: int | None) -> list[dict]:
        """The tasks of the trainings that choose learning rates."""
        tasks = []
        for name in names:
            keys = changed_keys(self.available[name], self.opts)
            length = iterations or max(1, int(keys["SOLVER.MAX_ITER"]) // 2)
            for rate in self.setting.rates:
                more = ["SOLVER.MAX_ITER", str(length), "SOLVER.BASE_LR", str(rate)]
                task = self.run(name, TUNING_SEED, more, self.folder / "tuning" / name / f"{rate:g}")
                tasks.append(task | {"recall_at": [], "image_pyramid": False})
        return tasks

    def fix_proposals(self, name: str, seeds: Sequence[int], jobs: int) -> list[str]:
        """Let all further runs have the proposals of a variant, made if they are not there; see :func:`_do`."""
        rate = self.best_rate(name) if self.setting.rates else []
        if rate is None:  # not their own proposals instead
            raise UserError(
                f"the learning rate of {name}, whose proposals all are to have, could not be chosen: trainings in "
                f"{self.folder / 'tuning' / name} have failed, see the console.txt of each"
            )
        tasks, proposals = [], {"settings": self.settings(name, rate)}
        for seed in seeds:
            folder = self.folder / "proposals" / name / f"seed_{seed}"
            task = self.run(name, seed, rate, folder) | {"kind": "propose"}
            proposals[seed] = {split: str(folder / f"{split}.pkl") for split in SETS}
            tasks.append(task | {"proposals": proposals[seed]})
        failed = _do(tasks, jobs, f"Proposals of {name}")  # files, of which records would not do
        self.place, self.proposals = f"heads_on_{name}", proposals
        return failed

    def best_rate(self, name: str) -> list[str] | None:
        """The learning rate with the highest AP of those tried, as key and value; None: not all have a result."""
        found = {}
        for rate in self.setting.rates:
            path = self.folder / "tuning" / name / f"{rate:g}" / "result.json"
            if not path.exists():
                return None
            found[rate] = json.loads(path.read_text())["AP"]
        return ["SOLVER.BASE_LR", str(max(found, key=found.get))]

    def times(self, name: str, seed: int, pairs: int) -> dict:
        """The task of comparing the times of training steps with those of the reference."""
        made, times, reference = self.scenes(seed), self.folder / "times", self.setting.reference
        return {
            "kind": "time",
            "config": str(self.available[name]),
            "opts": [*self.opts, *_places(made, times / name, seed)],
            "reference_config": str(self.available[reference]),
            "reference_opts": [*self.opts, *_places(made, times / f"{name}_{reference}", seed)],
            "pairs": pairs,
            "settings": {
                "variant": self.settings(name, []),
                "reference": self.settings(reference, []),
                "pairs": pairs,
            },
            "result": str(times / f"{name}.json"),
            "console": str(times / f"{name}.txt"),
        }


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


def _with_proposals(keys: Mapping[str, object], files: Mapping[str, str]) -> list[str]:
    """Keys and values that take as many proposals from files as the RPN of ``keys`` would make."""
    words = ["MODEL.LOAD_PROPOSALS", "True", "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    for file, when in zip(files.values(), ("TRAIN", "TEST"), strict=True):
        words += [f"DATASETS.PROPOSAL_FILES_{when}", repr((file,))]
        words += [f"DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{when}", str(keys[f"MODEL.RPN.POST_NMS_TOPK_{when}"])]
    return words


def _places(scenes: Path, output: Path, seed: int) -> list[str]:
    data = [
        [name, str(scenes / "annotations" / f"instances_{split}.json"), str(scenes / "images" / split)]
        for name, split in SETS.items()
    ]
    return ["DATASETS.COCO_FORMAT", repr(data), "OUTPUT_DIR", str(output), "SEED", str(seed)]


def _do(tasks: list[dict], jobs: int, title: str, after: Callable[[], None] = lambda: None) -> list[str]:
    """Do what has no result yet, each task in a process of its own; call ``after`` when one is done.

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
                after()
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
