"""What train_net.py does in each process: train or evaluate, then show the results."""

import argparse
import errno
import logging
import os
import re
import signal
import sys
from typing import NoReturn

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from fpn_d2.checkpoint.checkpointer import ReportingCheckpointer
from fpn_d2.checkpoint.contents import contents
from fpn_d2.checkpoint.folder import has_checkpoint
from fpn_d2.data import check_others, register_from_config
from fpn_d2.data.findings import into_the_log
from fpn_d2.errors import UserError, one_line, user_mistakes_end_the_program
from fpn_d2.evaluation.pictures import draw_detections
from fpn_d2.evaluation.results import headline, results_table
from fpn_d2.files import writable_folder
from fpn_d2.modeling import without_timm_weights

from .checks import check_data_files, check_test_augmentation, check_weight_file
from .determinism import check_deterministic
from .device import on_this_machine
from .elastic import resumes
from .numbers import short_schedule
from .precision import amp_dtype
from .processes import say
from .progress import set_up_logging
from .signals import signals
from .trainer import Trainer

logger = logging.getLogger(__name__)

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def run(args: argparse.Namespace, cfg: CfgNode) -> dict:
    """Train, or evaluate with ``--eval-only``, and print the results and where the picture is.

    Args:
        args: Detectron2's command line; ``resume`` and ``eval_only`` are read.
        cfg: The configuration, as from `load_config`.

    Returns:
        The results of the last evaluation; empty in all processes but the first.
    """
    try:
        with signals.installed():
            return _run(args, cfg)
    except KeyboardInterrupt as stop:
        _stopped("", stop)


def _run(args: argparse.Namespace, cfg: CfgNode) -> dict:
    train = not args.eval_only
    with user_mistakes_end_the_program(say):
        register_from_config(cfg, train=train)  # a spawned process starts without the user's data sets
        check_data_files(cfg, train=train)
        check_others(cfg, train=train)
        if not args.resume:
            check_weight_file(cfg.MODEL.WEIGHTS)
        check_test_augmentation(cfg)
        amp_dtype(on_this_machine(cfg, warn=False))
        check_deterministic(cfg)
        if train:
            _check_batch(cfg)
        if "://" not in cfg.OUTPUT_DIR:
            writable_folder(cfg.OUTPUT_DIR)
        cfg.freeze()
        _set_up(args, cfg)
        if train and short_schedule(cfg):
            logger.warning(short_schedule(cfg))
        if args.eval_only:
            cfg = without_timm_weights(on_this_machine(cfg))
            model = Trainer.build_model(cfg)
            ReportingCheckpointer(
                model,
                save_dir=cfg.OUTPUT_DIR,
                partial_weights=cfg.MODEL.PARTIAL_WEIGHTS,
                whole=True,
                about=contents(cfg),
            ).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        else:
            resume = resumes(args.resume, cfg.OUTPUT_DIR)
            trainer = Trainer(cfg, from_checkpoint=resume and has_checkpoint(cfg.OUTPUT_DIR))
            trainer.resume_or_load(resume=resume)
            cfg, model = trainer.cfg, trainer.model
            if trainer.start_iter >= trainer.max_iter:
                logger.warning(
                    "Nothing is left to train: %s comes after all %d iterations of SOLVER.MAX_ITER, and is evaluated. "
                    "A larger SOLVER.MAX_ITER trains on",
                    trainer.checkpointer.latest, trainer.max_iter,
                )
    results = _evaluate(cfg, model) if args.eval_only else _train(trainer)
    if comm.is_main_process():
        _show(cfg, model, results)
    return results


def _set_up(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Detectron2's `default_setup`, which writes ``config.yaml``; an evaluation leaves the one of a training alone."""
    set_up_logging(cfg.OUTPUT_DIR, comm.get_rank())
    args.config_file = os.path.expanduser(getattr(args, "config_file", ""))  # default_setup prints the file
    written = cfg.clone()
    if args.eval_only and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "config.yaml")):
        written.defrost()
        written.OUTPUT_DIR = None
        logger.debug("Running with full config:\n%s", cfg.dump())
    default_setup(written, args)
    into_the_log()


def _check_batch(cfg: CfgNode) -> None:
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes and not cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes cannot share equally: "
            f"set it to a multiple of {processes}"
        )


def _evaluate(cfg: CfgNode, model: object) -> dict:
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(trainer: Trainer) -> dict:
    logging.getLogger("detectron2.engine.train_loop").addFilter(_no_traceback_of_user_errors)
    try:
        return trainer.train()
    except KeyboardInterrupt as stop:
        _stopped(_how_to_go_on(trainer) or "No checkpoint was saved.", stop)
    except FloatingPointError as error:  # Detectron2's
        numbers = re.search(r"loss_dict = (\{.*\})", str(error))
        shown = f" ({numbers[1]})" if numbers else ""
        why = (
            f"the loss is infinite or no number in iteration {trainer.iter}{shown}, and its step was not taken; most "
            f"often SOLVER.BASE_LR, {trainer.cfg.SOLVER.BASE_LR:g}, is too high: try a tenth of it, a longer "
            "SOLVER.WARMUP_ITERS, or SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        why = f"cannot write into {os.path.abspath(trainer.cfg.OUTPUT_DIR)}: {error.strerror}"
    except UserError as error:
        why = one_line(error)
    say(f"error: {why}. {_how_to_go_on(trainer)}".rstrip())
    sys.exit(2)


def _no_traceback_of_user_errors(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def _how_to_go_on(trainer: Trainer) -> str:
    last = trainer.checkpointer.latest  # not one that an older run left in the same folder
    return f"The last checkpoint is {last}; the same command with --resume goes on from it." if last else ""


def _stopped(what: str, stop: BaseException) -> NoReturn:
    """End the program after a signal, with one line from the first process, and the exit status that shells expect."""
    if comm.is_main_process():
        print(f"Stopped. {what}".strip(), file=sys.stderr, flush=True)
    sys.exit(128 + getattr(stop, "number", signal.SIGINT))


def _show(cfg: CfgNode, model: object, results: dict) -> None:
    if not cfg.DATASETS.TEST:
        return
    logger.info("Results in percent:\n%s", results_table(cfg, results))
    line = headline(cfg, results)
    if cfg.TEST.PICTURE_IMAGES > 0:
        path = os.path.join(cfg.OUTPUT_DIR, "detections.png")
        try:
            draw_detections(cfg, model, cfg.DATASETS.TEST[0], path)
            line += f"  picture: {path}"
        except Exception as error:  # whatever it is: the results of a long training matter more than the picture
            logger.warning("No picture of the detections: %s: %s", type(error).__name__, " ".join(str(error).split()))
    logging.getLogger("fpn_d2.summary").debug(line)
    print(line, flush=True)
