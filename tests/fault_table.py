"""What stock Detectron2 and this package do when a training is killed, stopped, or given files that are damaged.

    python -m tests.fault_table              the table in Markdown; takes some minutes
    python -m tests.fault_table "Ctrl-C"     of some of them

The same small detector on the same images, with two workers and a SEED, in processes of their own.
"""

import argparse
import json
import logging
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import detectron2.engine
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils.env import seed_all_rng

from fpn_d2.engine import launch as our_launch
from fpn_d2.engine import load_prepared, run, user_mistakes_end_the_program

from .engine.small import MODEL
from .kills import make_data

ITERATIONS, HIT = 10, 6  # iterations in all, and the one in which something happens
_PAUSE = 0.1  # seconds of each iteration, to be hit in
_PATIENCE = 240  # seconds until a training counts as one that hangs
_NAME = "faults"


def settings(folder: Path) -> dict:
    """The small detector of the tests."""
    return {
        **{key: value for key, value in MODEL.items() if key != "TEST"},
        "DATASETS": {"TRAIN": [_NAME], "TEST": []},
        "DATALOADER": {"NUM_WORKERS": 2},
        "SOLVER": {**MODEL["SOLVER"], "MAX_ITER": ITERATIONS, "CHECKPOINT_PERIOD": 2},
        "MODEL": {**MODEL["MODEL"], "DEVICE": "cpu"},
        "OUTPUT_DIR": str(folder),
    }


def stock(folder: Path, data: Path, resume: bool, opts: list) -> None:
    """What Detectron2's own tools/train_net.py does."""
    register_coco_instances(_NAME, {}, str(data / "set.json"), str(data))
    cfg = get_cfg()
    content = settings(folder)
    content["MODEL"]["BACKBONE"] = {**content["MODEL"]["BACKBONE"], "NAME": "build_resnet_fpn_backbone"}
    content["MODEL"]["ROI_HEADS"] = {**content["MODEL"]["ROI_HEADS"], "NAME": "StandardROIHeads", "NUM_CLASSES": 2}
    cfg.merge_from_other_cfg(CfgNode(content))
    if opts[:1] == ["--config-file"]:
        cfg.merge_from_file(opts[1])
        opts = opts[2:]
    cfg.merge_from_list(opts)
    os.makedirs(folder, exist_ok=True)
    seed_all_rng(cfg.SEED)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()


def ours(folder: Path, data: Path, resume: bool, opts: list) -> None:
    """What train_net.py does."""
    content = settings(folder)
    content["DATASETS"]["COCO_FORMAT"] = [[_NAME, str(data / "set.json"), str(data)]]
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(content))
    if opts[:1] == ["--config-file"]:
        Path(opts[1]).write_text(f"_BASE_: {config}\n" + Path(opts[1]).read_text())
        config, opts = Path(opts[1]), opts[2:]
    with user_mistakes_end_the_program():
        cfg = load_prepared(str(config), opts)
    run(argparse.Namespace(resume=resume, eval_only=False, config_file="", opts=[]), cfg)


class Side:
    """Trainings of one of the two."""

    def __init__(self, train: Callable, folder: Path, data: Path):
        self.train, self.folder, self.data = train, folder, data
        self.said = ""
        self.status: int | None = 0

    def go(self, name: str, *opts: object, resume: bool = False, number: int = 0, most: int = 0) -> Path:
        """Train into the folder ``name``, with the signal ``number`` in iteration HIT, and files of ``most`` bytes."""
        folder = self.folder / name
        context = multiprocessing.get_context("fork")
        begun = context.Value("i", -1)
        process = context.Process(target=self._child, args=(folder, resume, list(map(str, opts)), begun, most))
        process.start()
        deadline = time.monotonic() + _PATIENCE
        while number and process.is_alive() and begun.value < HIT and time.monotonic() < deadline:
            time.sleep(0.01)
        if number and process.is_alive():
            os.kill(process.pid, number)
        process.join(max(1.0, deadline - time.monotonic()))
        hangs = process.is_alive()
        process.kill()
        process.join()
        self.status = None if hangs else process.exitcode
        self.said = Path(f"{folder}.said").read_text()
        return folder

    def _child(self, folder: Path, resume: bool, opts: list, begun: object, most: int) -> None:
        handle = os.open(f"{folder}.said", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before_step = TrainerBase.before_step

        def note(trainer: TrainerBase) -> None:
            begun.value = trainer.iter
            time.sleep(_PAUSE)
            before_step(trainer)

        TrainerBase.before_step = note
        if most:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        self.train(folder, self.data, resume, opts)

    def end(self) -> str:
        """How the last training ended."""
        if self.status is None:
            return "hangs"
        if "Traceback" in self.said:
            raised = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Interrupt|Exit))\b", self.said, re.MULTILINE)
            return f"traceback: {raised[-1] if raised else 'of its own'}"
        lines = re.findall(r"^(?:error: |Stopped\.).*$", self.said, re.MULTILINE)
        if lines:
            return f"one line, status {self.status}" if len(lines) == 1 else f"{len(lines)} lines"
        return "trains to the end" if self.status == 0 else f"ends with status {self.status}"

    def checkpoint(self, folder: Path) -> str:
        """Which iterations the newest checkpoint knows."""
        try:
            name = (folder / "last_checkpoint").read_text()
            done = torch.load(folder / name, weights_only=True)["iteration"] + 1
        except Exception as error:
            return f"no checkpoint can be read ({type(error).__name__})"
        return f"the last checkpoint is of iteration {done}"

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def _killed(side: Side) -> str:
    whole = side.weights(side.go("whole"))
    side.go("killed", number=signal.SIGKILL)
    folder = side.go("killed", resume=True)
    if side.status != 0:
        return side.end()
    away = max(float((whole[k].double() - v.double()).abs().max()) for k, v in side.weights(folder).items())
    return "the same weights, bit for bit" if away == 0 else f"other weights, by up to {away:.1g}"


def _stopped(number: int) -> Callable[[Side], str]:
    def case(side: Side) -> str:
        folder = side.go(f"stopped{number}", number=number)
        return f"{side.end()}; {side.checkpoint(folder)}"

    return case


def _spoilt(spoil: Callable[[Path], None]) -> Callable[[Side], str]:
    """Spoils the newest of the checkpoints of a training, which then goes on."""

    def case(side: Side) -> str:
        folder = side.folder / spoil.__name__
        side.go(spoil.__name__, number=signal.SIGKILL)
        newest = folder / (folder / "last_checkpoint").read_text()
        spoil(newest)
        side.go(spoil.__name__, resume=True)
        begun = re.search(r"Starting training from iteration (\d+)", side.said)
        saved = int(re.search(r"\d+", newest.name)[0]) + 1
        told = ", and says so" if "going on from" in side.said else ", says nothing"
        if side.status != 0 or not begun:
            return side.end()
        return f"goes on from {'the spoilt file' if int(begun[1]) == saved else f'iteration {begun[1]}'}{told}"

    return case


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(byte ^ 0xFF for byte in data[middle : middle + 20])
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def gone(path: Path) -> None:
    path.unlink()


def _full(side: Side) -> str:
    folder = side.go("full", most=1 << 20)
    broken = [path.name for path in folder.glob("*.pth")]
    return f"{side.end()}; {f'leaves a broken {broken[0]}' if broken else 'leaves nothing behind'}"


def _in_the_way(side: Side) -> str:
    (side.folder / "file").touch()
    side.go("file")
    return side.end()


def _rate(side: Side) -> str:
    folder = side.go("rate", "SOLVER.BASE_LR", 1e6, "SOLVER.MAX_ITER", 3 * ITERATIONS)
    finals = list(folder.glob("model_final.pth"))
    bad = finals and not all(torch.isfinite(v).all() for v in side.weights(folder).values() if v.is_floating_point())
    written = len(list((folder / "bad_steps").glob("*.pth")))
    told = f"; {written} steps not taken, and written down for replay" if written else ""
    return side.end() + told + ("; saves weights that are no numbers" if bad else "")


class _Evil:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def _pickle(side: Side) -> str:
    mark, file = side.folder / "mark-of-weights", side.folder / "evil.pkl"
    file.write_bytes(pickle.dumps({"model": _Evil(mark)}))
    side.go("pickle", "MODEL.WEIGHTS", file)
    return f"{'RUNS ITS CODE' if mark.exists() else 'runs nothing of it'}; {side.end()}"


def _yaml(side: Side) -> str:
    mark, file = side.folder / "mark-of-config", side.folder / "evil.yaml"
    file.write_text(f"VERSION: 2\nOUTPUT_DIR: !!python/object/apply:os.mkdir ['{mark}']\n")
    side.go("yaml", "--config-file", file)
    return f"{'RUNS ITS CODE' if mark.exists() else 'runs nothing of it'}; {side.end()}"


def nothing() -> None:
    """What two processes do."""


def _two(side: Side) -> str:
    launch = detectron2.engine.launch if side.train is stock else our_launch
    more = {} if side.train is stock else {"device": "cpu"}
    try:
        launch(nothing, 2, dist_url="auto", **more)
    except Exception as error:
        last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        return f"traceback: {last[:90]}"
    return "run, joined by gloo"


CASES: dict[str, Callable[[Side], str]] = {
    f"SIGKILL in iteration {HIT} of {ITERATIONS}, then --resume": _killed,
    "SIGTERM": _stopped(signal.SIGTERM),
    "Ctrl-C": _stopped(signal.SIGINT),
    "20 flipped bytes in the newest checkpoint, then --resume": _spoilt(flipped),
    "newest checkpoint cut short, then --resume": _spoilt(cut),
    "newest checkpoint gone, then --resume": _spoilt(gone),
    "no room for a checkpoint": _full,
    "a file where OUTPUT_DIR is to be": _in_the_way,
    "SOLVER.BASE_LR 1e6": _rate,
    ".pkl file of weights that calls a function": _pickle,
    "YAML file that calls a function": _yaml,
    "two processes on a machine without GPU": _two,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FAULT", help="of the table; without: all")
    parser.add_argument("--json", type=Path, help="write the rows into this file too")
    args = parser.parse_args(arguments)
    logging.disable(logging.NOTSET)
    torch.set_num_threads(1)
    rows = []
    print("| fault | stock Detectron2 | fpn_d2 |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder, "data"))
        sides = []
        for train in (stock, ours):
            Path(folder, train.__name__).mkdir()
            sides.append(Side(train, Path(folder, train.__name__), Path(folder, "data")))
        for name in args.names or CASES:
            rows.append([name, *(CASES[name](side) for side in sides)])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
