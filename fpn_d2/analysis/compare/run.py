"""Two detectors side by side: the same weights, how far apart their outputs are, what each costs, what each is worth.

Everything is measured here and now or left out with the reason; published figures stand beside it under their source.
"""

import math
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from tqdm import tqdm

from fpn_d2.engine import UserError
from fpn_d2.files import writable_folder

from .. import parity
from ..engines.run import check_names
from ..measure.memory import MODES
from ..measure.parts import macs_by_part, parameters_by_part
from ..published.zoo import mmdet_baselines, mmdet_rows, zoo_baselines, zoo_row
from ..subjects import Model, build_pair, optimized, random_batch, read_config
from .accuracy import measure_ap, missing_data, real_images
from .engines import Engines
from .measure import (
    TORCHVISION,
    Size,
    keep_size,
    peak_memory,
    time_inference,
    time_training,
    torchvision_detector,
    torchvision_images,
)
from .report import write_report

SCHEMA = 1  # of compare.json; another number, other keys
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZE = ("none", "a", "b", "both")
# What images go through before a model sees them in inference.
_INPUT_KEYS = ("INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")


@dataclass(frozen=True)
class Plan:
    """What a comparison does; the defaults of the command line.

    Attributes:
        weights: a checkpoint for both; empty: random weights, the same in both.
        sizes: (height, width) of the images, in pixels.
        batches: numbers of images in a batch.
        rounds: measured rounds of A B A B.
        warmup: rounds before them.
        threads: of PyTorch on the CPU; 0: as they are.
        device: "cpu", "cuda"; empty: as the configurations say.
        train: time training steps as well.
        memory: measure the peak of memory, on CPUs in a process for each figure.
        data: use DATASETS.TEST: parity on real images, and AP.
        torchvision: add torchvision's fasterrcnn_resnet50_fpn as a third column.
        engines: run A, exported, in these as well, names of `engines.run.ENGINES`; then every column has a process of
            its own.
        optimize: whose inference goes through `optimize_for_inference`: one of ``OPTIMIZE``.
        dtype: the data type of that, one of ``DTYPES``.
        opts, opts_a, opts_b: KEY value pairs on top of both configurations, and of one.
        output: folder for compare.json and compare.html.
    """

    weights: str = ""
    sizes: Sequence[Size] = ((480, 640), (800, 1067))
    batches: Sequence[int] = (1,)
    rounds: int = 10
    warmup: int = 2
    threads: int = 0
    device: str = ""
    train: bool = False
    memory: bool = True
    data: bool = False
    torchvision: bool = False
    engines: Sequence[str] = ()
    optimize: str = "none"
    dtype: str = "float32"
    opts: Sequence[str] = ()
    opts_a: Sequence[str] = ()
    opts_b: Sequence[str] = ()
    output: str = "output/compare"

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: a number is not positive, or a choice is none of those there are.
        """
        for name, least in (("rounds", 1), ("warmup", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not self.sizes or not self.batches or min((*self.batches, *(min(size) for size in self.sizes))) < 1:
            raise UserError(f"sizes {list(self.sizes)}, batches {list(self.batches)}: expected positive numbers")
        for name, choices in (("optimize", OPTIMIZE), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        check_names(self.engines)
        if self.engines and (self.torchvision or self.device.startswith("cuda")):
            raise UserError("engines are compared on a CPU, without torchvision's detector: leave that out")
        if self.dtype != "float32" and self.optimize == "none":
            raise UserError(f"dtype {self.dtype} is for optimised models: say which with optimize (a, b or both)")


def run_compare(a: str, b: str, plan: Plan = Plan(), command: str = "", progress: bool | None = None) -> dict:  # noqa: B008
    """Compare the models of two configurations and write compare.json and compare.html.

    Args:
        a: a YAML file, or a name of Detectron2's model zoo.
        b: the same, of what it is compared with.
        plan: what to measure.
        command: the command line, to be kept with the result.
        progress: show a progress bar; None: where stderr is a terminal.

    Returns:
        The result, as it is in compare.json.

    Raises:
        UserError: in the plan or a configuration is something that cannot be.
    """
    plan.check()
    opts = {"A": [*plan.opts, *plan.opts_a], "B": [*plan.opts, *plan.opts_b]}
    configs = [
        (name, *read_config(name, opts[label], plan.device, data=plan.data, weights=plan.weights))
        for label, name in (("A", a), ("B", b))
    ]
    devices = {label: cfg.MODEL.DEVICE for label, (_, _, cfg) in zip("AB", configs, strict=True)}
    if len(set(devices.values())) > 1:
        raise UserError(f"MODEL.DEVICE of A is {devices['A']}, that of B {devices['B']}: name one with --device")
    if plan.threads:
        torch.set_num_threads(plan.threads)
    output = writable_folder(plan.output)
    with tqdm(total=_steps(plan), unit="step", disable=None if progress is None else not progress) as bar:
        bar.set_description("building")
        pair = build_pair(tuple(configs), plan.weights)
        for model in pair:
            if plan.optimize in (model.label.lower(), "both"):
                model.runner = optimized(model.network, plan.dtype)
        with tempfile.TemporaryDirectory() as scratch:
            result = _Comparison(pair, plan, opts, output, Path(scratch), bar).run()
    result = {"schema": SCHEMA, "command": command, **result}
    result = plain(result)
    write_report(result, output)
    return result


def _steps(plan: Plan) -> int:
    runs = len(plan.sizes) * len(plan.batches)
    calls = plan.rounds + plan.warmup
    memory = runs * 2 * (1 + plan.train) if plan.memory else 0
    ap = 2 if plan.data else 0
    columns = 2 + plan.torchvision + len(plan.engines)
    return 4 + runs * calls * (columns + 2 * plan.train) + memory + ap


class _Comparison:
    """The steps of one comparison; each adds to what could not be measured."""

    def __init__(
        self,
        pair: tuple[Model, Model],
        plan: Plan,
        opts: dict[str, list[str]],
        output: Path,
        scratch: Path,
        bar: tqdm,
    ):
        self.pair, self.plan, self.opts, self.output, self.bar = pair, plan, opts, output, bar
        self.scratch = scratch
        self.device = torch.device(pair[0].cfg.MODEL.DEVICE)
        self.others = {TORCHVISION: torchvision_detector(self.device)} if plan.torchvision else {}
        self.not_measured: list[str] = []

    def run(self) -> dict:
        models = [self._describe(model) for model in self.pair]
        result = {
            "environment": environment(self.device),
            "settings": self._settings(),
            "models": models + [self._describe_torchvision(name) for name in self.others],
            "weights": self._weights(),
            "parity": self._parity(),
            "engines": self._engines(),
            "inference": list(self._each_size(self._inference)),
            "training": list(self._each_size(self._training)) if self.plan.train else [],
            "memory": self._memory(),
            "ap": self._ap(),
            "published": self._published(),
        }
        if not self.plan.train:
            self.not_measured.append("Training steps: not asked for (--train).")
        if not self.plan.torchvision:
            self.not_measured.append("torchvision's detector: not asked for (--torchvision).")
        elif self.plan.train or self.plan.memory:
            self.not_measured.append("Training steps and peak of memory of torchvision's detector: inference alone is.")
        return result | {"not_measured": self.not_measured}

    def _settings(self) -> dict:
        plan = self.plan
        return {"rounds": plan.rounds, "warmup": plan.warmup, "optimize": plan.optimize, "dtype": plan.dtype}

    def _describe(self, model: Model) -> dict:
        self.bar.set_description(f"counting {model.label}")
        size = self.plan.sizes[0]
        macs = macs_by_part(model.network, random_batch(model.cfg, 1, size))
        self.bar.update()
        return {
            "label": model.label,
            "config": model.config,
            "architecture": model.cfg.MODEL.META_ARCHITECTURE,
            "opts": self.opts[model.label],
            "optimized": model.runner is not model.network,
            "parameters": parameters_by_part(model.network),
            "macs": {"size": list(size), **macs},
        }

    def _describe_torchvision(self, name: str) -> dict:
        network, size = self.others[name], self.plan.sizes[0]
        keep_size(network, size)
        macs = macs_by_part(network, torchvision_images(random_batch(self.pair[0].cfg, 1, size), self.device))
        return {
            "label": name,
            "config": "Faster R-CNN, ResNet-50, FPN, random weights, 91 labels",
            "architecture": "FasterRCNN",
            "opts": [],
            "optimized": False,
            "parameters": parameters_by_part(network),
            "macs": {"size": list(size), **macs},
        }

    def _weights(self) -> dict:
        unmatched = {model.label: {"not_loaded": model.not_loaded, "not_used": model.not_used} for model in self.pair}
        if not self.plan.weights:
            self.not_measured.append(
                "Times with trained weights: the weights are random, drawn for A and copied to B. Random weights give "
                "other numbers of detections than trained ones, and heads and NMS other work."
            )
        return {"source": self.plan.weights or "random, drawn for A and copied to B", "unmatched": unmatched}

    def _parity(self) -> dict:
        self.bar.set_description("parity")
        a, b = self.pair
        why_not = missing_data(a.cfg) if self.plan.data else "not asked for (--data)"
        number, size = self.plan.batches[0], self.plan.sizes[0]
        if why_not:
            self.not_measured.append(f"Parity on real images: {why_not}.")
            images, batches = f"{number} of noise, {size[0]} x {size[1]}", [random_batch(a.cfg, number, size)] * 2
        else:
            images = f"the first {number} of {a.cfg.DATASETS.TEST[0]}"
            theirs = b.cfg.clone()  # the same images, read as B reads them
            theirs.defrost()
            theirs.DATASETS = a.cfg.DATASETS
            batches = [real_images(a.cfg, number), real_images(theirs, number)]
        stages = []
        for model, batch in zip(self.pair, batches, strict=True):
            with parity.every_score_counts(model.runner):
                stages.append(parity.capture(model.runner, batch))
            self.bar.update()
        settings = {key: [_value(model.cfg, key) for model in self.pair] for key in _INPUT_KEYS}
        return {
            "images": images,
            "same_model": _same_parameters(*self.pair),
            "input_settings": {key: [a, b] for key, (a, b) in settings.items() if a != b},
            "tolerance": vars(parity.Tolerance()),
            **parity.summarise(parity.compare(*stages)),
        }

    def _engines(self) -> dict:
        plan = self.plan
        if plan.engines:
            self.bar.set_description("exporting A")
        self.engines = Engines(self.pair, plan.engines, plan.sizes[0], plan.batches[0], plan.data, self.scratch)
        self.not_measured += self.engines.not_measured
        return self.engines.outputs

    def _each_size(self, measure: Callable[[Size, int], dict]):
        for size in self.plan.sizes:
            for number in self.plan.batches:
                self.bar.set_description(f"{measure.__name__.strip('_')} {size[0]}x{size[1]}, batch {number}")
                yield measure(size, number)

    def _inference(self, size: Size, number: int) -> dict:
        for network in self.others.values():
            keep_size(network, size)
        plan = self.plan
        if plan.engines:
            turn = (plan.rounds, plan.warmup, self.bar.update)
            return self.engines.time(self.opts, plan.dtype, size, number, *turn)
        return time_inference(self.pair, self.others, size, number, plan.rounds, plan.warmup, self.bar.update)

    def _training(self, size: Size, number: int) -> dict:
        return time_training(self.pair, size, number, self.plan.rounds, self.plan.warmup, self.bar.update)

    def _memory(self) -> list[dict]:
        if not self.plan.memory:
            self.not_measured.append("Peak of memory: not asked for (--no-memory).")
            return []

        def measure(size: Size, number: int) -> dict:
            row: dict = {"size": list(size), "batch": number}
            for mode in MODES[: 1 + self.plan.train]:
                row[mode] = {}
                for model in self.pair:
                    optimize = self.plan.dtype if model.runner is not model.network else ""
                    opts, weights = self.opts[model.label], self.plan.weights
                    peak = peak_memory(model, mode, size, number, opts, weights, optimize)
                    if "missing" in peak:
                        self.not_measured.append(
                            f"Peak of memory, {mode}, {model.label}, {size[0]}x{size[1]}: {peak['missing']}."
                        )
                    row[mode][model.label] = peak.get("mb")
                    self.bar.update()
            return row

        measure.__name__ = "memory"
        return list(self._each_size(measure))

    def _ap(self) -> dict:
        found: dict = {}
        for model in self.pair:
            self.bar.set_description(f"AP of {model.label}")
            why_not = "not asked for (--data)"
            if self.plan.data:
                why_not = missing_data(model.cfg)
                if not why_not and not self.plan.weights:
                    why_not = "there are no weights to evaluate (--weights)"
                # Counters of batches have no part in what a model computes.
                empty = [name for name in model.not_loaded if not name.endswith("num_batches_tracked")]
                if not why_not and empty:
                    why_not = f"{self.plan.weights} has no weights for {len(empty)} of its tensors, {empty[0]} first"
            if not why_not:
                try:
                    found[model.label] = measure_ap(model, self.output)
                except Exception as error:  # what was measured so far is not to be lost
                    why_not = f"it ended with {type(error).__name__}: {' '.join(str(error).split())}"
            if why_not:
                self.not_measured.append(f"AP of {model.label}: {why_not.rstrip('.')}.")
            self.bar.update(self.plan.data)
        return found

    def _published(self) -> dict:
        zoo, mmdet = zoo_baselines(), mmdet_baselines()
        rows, names = {}, set()
        for model in self.pair:
            changed = _changed_model(self.opts[model.label])
            rows[model.label] = None if changed else zoo_row(model.path)
            names |= set() if changed else {model.path}
            if rows[model.label] is None:
                why_not = (
                    f"{changed[0]} makes it another model" if changed else "the model zoo's tables have no such config"
                )
                self.not_measured.append(f"Published figures of {model.label}: {why_not}.")
        return {
            "zoo": {"source": zoo["source"], "measured_on": zoo["measured_on"], "rows": rows},
            "mmdetection": {
                "source": mmdet["source"],
                "measured_on": mmdet["measured_on"],
                "rows": {row["config"]: row for name in sorted(names) for row in mmdet_rows(name)},
            },
        }


def _same_parameters(a: Model, b: Model) -> bool:
    """Whether the two have the same tensors: names and shapes. Counters of batches have no part in it."""
    named = [
        {k: v.shape for k, v in model.network.state_dict().items() if not k.endswith("num_batches_tracked")}
        for model in (a, b)
    ]
    return named[0] == named[1]


def _value(cfg: CfgNode, key: str) -> object:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _changed_model(opts: Sequence[str]) -> list[str]:
    """The keys among KEY value pairs that make another model of a published one."""
    elsewhere = ("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.NUMERICS")
    return [key for key in opts[::2] if key.startswith("MODEL.") and key not in elsewhere]


def environment(device: torch.device) -> dict:
    """Versions and machine, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def plain(value: object) -> object:
    """The same as JSON keeps it: no tuples, and None for what is no finite number."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
