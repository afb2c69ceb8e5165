"""Trains on data of one's own from a LazyConfig: plain arguments, no YAML, no checkout of Detectron2.

    python docs/lazy_own_data.py my/train.json my/images my/val.json my/images output/lazy train.max_iter=300

The model is that of configs/lazy/faster_rcnn_fpn_R_50.py; what follows the folder for outputs changes a value of the
configuration each. The loop and the hooks are Detectron2's own, as in its tools/lazyconfig_train_net.py.
"""

import argparse
import os
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import WarmupParamScheduler
from detectron2.utils.logger import setup_logger
from fvcore.common.param_scheduler import CosineParamScheduler

import fpn_d2
from fpn_d2.data import class_names
from fpn_d2.errors import user_mistakes_end_the_program

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "lazy" / "faster_rcnn_fpn_R_50.py"


def register(args: argparse.Namespace) -> list[str]:
    """Register the two sets as DATASETS.COCO_FORMAT does, which checks them first; returns the names of the classes."""
    keys = fpn_d2.get_cfg()
    keys.OUTPUT_DIR = args.output
    keys.DATASETS.COCO_FORMAT = [
        ["lazy_train", args.train_json, args.train_images],
        ["lazy_val", args.val_json, args.val_images],
    ]
    keys.DATASETS.TRAIN, keys.DATASETS.TEST = ("lazy_train",), ("lazy_val",)
    return class_names(keys)


def configuration(args: argparse.Namespace):
    """The LazyConfig for the data; batch and learning rate for one GPU or a CPU, a sixteenth of those of COCO."""
    cfg = LazyConfig.load(str(CONFIG))
    cfg.model.roi_heads.num_classes = len(register(args))
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = "lazy_train", "lazy_val"
    cfg.dataloader.train.total_batch_size, cfg.optimizer.lr = 2, 0.0025
    cfg.train.output_dir, cfg.train.max_iter, cfg.train.eval_period = args.output, 3000, 500
    cfg.train.device = "cuda" if torch.cuda.is_available() else "cpu"
    return LazyConfig.apply_overrides(cfg, args.overrides)


def train(cfg) -> None:
    """Train, and evaluate every train.eval_period iterations and at the end."""
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loop = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = loop(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    warmup = min(1000, cfg.train.max_iter // 10)
    rates = WarmupParamScheduler(CosineParamScheduler(1.0, 0.0), 0.001, warmup / cfg.train.max_iter)

    def evaluate() -> dict:
        evaluator = instantiate(cfg.dataloader.evaluator)
        results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
        print_csv_format(results)
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, rates),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period),
        ]
    )
    checkpointer.load(cfg.train.init_checkpoint)
    trainer.train(0, cfg.train.max_iter)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train on data of one's own from a LazyConfig.")
    for name in ("train_json", "train_images", "val_json", "val_images", "output"):
        parser.add_argument(name)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as train.max_iter=300")
    args = parser.parse_args(arguments)
    os.makedirs(args.output, exist_ok=True)
    setup_logger(args.output)
    with user_mistakes_end_the_program():
        cfg = configuration(args)
    LazyConfig.save(cfg, os.path.join(args.output, "config.yaml"))
    train(cfg)


if __name__ == "__main__":
    main()
