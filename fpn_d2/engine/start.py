"""From a command line to the processes of a training."""

import argparse
import dataclasses
from collections.abc import Sequence

from fpn_d2.config_names import find_config
from fpn_d2.errors import UserError, user_mistakes_end_the_program

from .launch import check_address, launch
from .prepare import load_config, prepare_data
from .processes import say
from .run import run


@dataclasses.dataclass
class Command:
    """What Detectron2's command line says; see `fpn_d2.cli.train`."""

    config_file: str = ""
    opts: Sequence[str] = ()
    resume: bool = False
    eval_only: bool = False
    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str | None = None


def start(command: Command) -> None:
    """Train or evaluate, in as many processes as were asked for.

    Raises:
        SystemExit: after a mistake of the user, which was told in one line; or a process has failed.
    """
    with user_mistakes_end_the_program(say):
        if not command.config_file:
            raise UserError(
                "--config-file is missing, and Detectron2's defaults are no recipe: name a configuration, as "
                "quick_schedules/quickstart.yaml"
            )
        check_address(command.num_machines, command.dist_url, command.num_gpus)
        if "://" not in command.config_file:
            command.config_file = str(find_config(command.config_file))
        cfg = load_config(command.config_file, command.opts)
        check_address(command.num_machines, command.dist_url, command.num_gpus, cfg.MODEL.DEVICE)
        prepare_data(cfg, command.config_file, command.opts, train=not command.eval_only)
    launch(
        run,
        command.num_gpus,
        num_machines=command.num_machines,
        machine_rank=command.machine_rank,
        dist_url=command.dist_url,
        args=(argparse.Namespace(**dataclasses.asdict(command)), cfg),
        device=cfg.MODEL.DEVICE,
    )
