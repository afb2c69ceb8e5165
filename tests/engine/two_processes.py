"""What each of two processes runs in the tests of the launcher; importable, since processes are spawned."""

import multiprocessing
import os
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm

from fpn_d2.data import register_from_config
from fpn_d2.engine import Trainer, UserError, user_mistakes_end_the_program
from fpn_d2.engine.hooks import validation_losses


def train(cfg, folder):
    """Train, then save the weights, the gradients of the last step, and the images seen, one file per rank."""
    register_from_config(cfg)
    torch.manual_seed(comm.get_rank())  # different weights at the start: joining the processes must make them equal
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    seen = []
    trainer._trainer.model.register_forward_pre_hook(lambda m, inputs: seen.extend(i["file_name"] for i in inputs[0]))
    results = trainer.train()
    model = trainer.model.module
    torch.save(
        {
            "backend": dist.get_backend(),
            "local": (comm.get_local_rank(), comm.get_local_size()),
            "weights": model.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "seen": seen,
            "results": results,
            "val": validation_losses(cfg, trainer.model),
            "threads": torch.get_num_threads(),
            "workers start by": multiprocessing.get_start_method(),
        },
        os.path.join(folder, f"rank{comm.get_rank()}.pth"),
    )


def mistake():
    with user_mistakes_end_the_program():
        raise UserError("something the user did")


def huge_pages() -> None:
    """Print how many kB of this process lie in huge pages once it has a large tensor."""
    kept = torch.ones(1 << 25)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
    del kept
