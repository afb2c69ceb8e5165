"""Trainings with several processes: the same weights as with one, a process that is killed, two machines.

    python -m tests.jobs                 1, 2 and 4 processes; one of two is killed and the job is started again
    python -m tests.jobs --namespaces    two machines as well, which are network namespaces with addresses of their own
                                         (as root, with `ip`): one is killed in the middle, and both are started again

The model has losses that mean the same for a part of a batch as for all of it: no anchor and no proposal is left out,
and all images have the same size. The images and their augmentation are the same however many processes share them.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fpn_d2.engine import launch as launch_function
from fpn_d2.engine import load_prepared, run

from .kills import make_data, write_config

launch_module = sys.modules[launch_function.__module__]
# Every anchor and every proposal counts.
EVERYTHING = (
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000",
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False", "MODEL.RPN.NMS_THRESH", "1.0",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100000", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "100000",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0", "SOLVER.IMS_PER_BATCH", "4", "TEST.VAL_LOSS_PERIOD", "0",
    "MODEL.NUMERICS", "exact", "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()",
    "INPUT.MIN_SIZE_TRAIN", "(64,)",
)
ITERATIONS = 8


def train(config: str, resume: bool) -> None:
    """What train_net.py does in one of the processes."""
    args = argparse.Namespace(resume=resume, eval_only=False, config_file="", opts=[])
    opts = ("SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.CHECKPOINT_PERIOD", "3")
    run(args, load_prepared(config, [*EVERYTHING, *opts]))


def start(config: Path, processes: int, resume: bool, machines: int = 1, machine: int = 0, url: str | None = None):
    """Start what `launch` starts, by forks since starting Python takes longer than the training."""
    process = multiprocessing.get_context("fork").Process(
        target=_launch, args=(config, processes, resume, machines, machine, url)
    )
    process.start()
    return process


def _launch(config: Path, processes: int, resume: bool, machines: int, machine: int, url: str | None) -> None:
    os.setsid()
    with open(config.parent / f"said{machine}.txt", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    by_spawn = launch_module.run_processes
    launch_module.run_processes = lambda *given: by_spawn(*given, method="fork")
    if url:  # in the namespace of a machine of its own
        _enter(machine)
    launch_function(train, processes, machines, machine, url, (str(config), resume), "cpu")


def _enter(machine: int) -> None:
    handle = os.open(f"/run/netns/{_namespace(machine)}", os.O_RDONLY)
    os.setns(handle, 0)
    os.environ["GLOO_SOCKET_IFNAME"] = f"fd2v{machine}"


def _namespace(machine: int) -> str:
    return f"fpn_d2_{os.getppid() if multiprocessing.parent_process() else os.getpid()}_{machine}"


@contextlib.contextmanager
def two_machines():
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a virtual cable."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    names = [_namespace(0), _namespace(1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "fd2v0", "netns", names[0], "type", "veth", "peer", "name", "fd2v1", "netns", names[1])
        for k, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", f"fd2v{k}")
            for device in ("lo", f"fd2v{k}"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def weights(config: Path) -> dict[str, torch.Tensor]:
    return torch.load(config.parent / "model_final.pth", weights_only=True)["model"]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def wait_for(file: Path, *processes: multiprocessing.Process) -> None:
    """Wait until there is ``file``, or a process has ended."""
    while not file.exists() and all(process.is_alive() for process in processes):
        time.sleep(0.01)


def children(process: multiprocessing.Process) -> list[int]:
    """The processes that a program has started itself."""
    return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _ends(*processes: multiprocessing.Process) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps what the trainings write")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    good = []
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_data(folder / "data", images=12, sizes=(64, 65))

        def job(name: str) -> Path:
            return write_config(folder / name, folder / "data", IMS_PER_BATCH=4)

        def show(what: str, well: bool) -> None:
            good.append(well)
            print(f"{'ok  ' if well else 'FAIL'} {what}", flush=True)

        one = job("one")
        assert _ends(start(one, 1, False)) == [0], f"see {folder}"
        for count in (2, 4):
            config = job(f"processes{count}")
            status = _ends(start(config, count, False))
            away = difference(weights(one), weights(config)) if status == [0] else float("nan")
            show(f"{count} processes: the weights of one process within {away:.1e}", away < 1e-5)

        config = job("killed")
        launcher = start(config, 2, False)
        wait_for(config.parent / "model_0000002.pth", launcher)
        os.kill(children(launcher)[1], signal.SIGKILL)
        begun = time.monotonic()
        status = _ends(launcher)
        seconds = time.monotonic() - begun
        said = (config.parent / "said0.txt").read_text()
        told = said.count("error: process 1 was ended by SIGKILL") == 1 and "Traceback" not in said
        show(f"process 1 of 2 killed: the job ends after {seconds:.1f} s with one line", status == [1] and told)
        status = _ends(start(config, 2, True))
        same = status == [0] and difference(weights(folder / "processes2" / "x"), weights(config)) == 0
        show("started again with --resume: the weights of a job that was never killed, bit for bit", same)

        config = job("stopped")
        launcher = start(config, 2, False)
        wait_for(config.parent / "model_0000002.pth", launcher)
        os.killpg(launcher.pid, signal.SIGINT)
        status = _ends(launcher)
        said = (config.parent / "said0.txt").read_text()
        told = said.count("Stopped. The last checkpoint is") == 1 and "Traceback" not in said
        show("Ctrl-C with 2 processes: a checkpoint and one line", status == [130] and told)
        status = _ends(start(config, 2, True))
        same = status == [0] and difference(weights(folder / "processes2" / "x"), weights(config)) == 0
        show("and with --resume the same weights", same)

        if args.namespaces:
            stack.enter_context(two_machines())
            config = job("machines")
            there = {"machines": 2, "url": "tcp://10.77.0.1:29500"}
            both = [start(config, 1, False, machine=k, **there) for k in (0, 1)]
            wait_for(config.parent / "model_0000002.pth", *both)
            os.killpg(both[1].pid, signal.SIGKILL)
            begun = time.monotonic()
            status = _ends(*both)
            seconds = time.monotonic() - begun
            show(f"machine 1 of 2 killed: the other one ends after {seconds:.1f} s", status[0] == 1)
            status = _ends(*[start(config, 1, True, machine=k, **there) for k in (0, 1)])
            same = status == [0, 0] and difference(weights(folder / "processes2" / "x"), weights(config)) == 0
            show("both started again: the weights of two processes on one machine, bit for bit", same)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
