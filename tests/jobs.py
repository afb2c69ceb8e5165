"""Trainings with several processes: the same weights as with one, a process that is killed, two machines.

    python -m tests.jobs                 1, 2 and 4 processes; one of two is killed and the job is started again
    python -m tests.jobs --namespaces    two machines as well, which are network namespaces with addresses of their own
                                         (as root, with `ip`): one is killed in the middle, and both are started again

The model has losses that mean the same for a part of a batch as for all of it: no anchor and no proposal is left out,
and all images have the same size. The images and their augmentation are the same however many processes share them. So
several processes differ from one in nothing but the order in which float numbers are added, and how far that may go
follows from the length of the sums: see `tolerance`. Each is done in float32 and in float64, in which the same bound is
5e8 times as narrow.
"""

import argparse
import contextlib
import ctypes
import json
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
from detectron2.modeling.proposal_generator import proposal_utils

import train_net
from fpn_d2.engine import Trainer, load_prepared, run
from fpn_d2.engine import launch as launch_function
from fpn_d2.engine.launch import under_torchrun

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
_PAUSE = 0.2  # seconds before each iteration: they are over sooner than a busy machine comes to the kill
# As many terms as no sum of a step has: the cells of p2 of four images of 64 x 64 pixels, times 64 channels.
TERMS = 4 * 16 * 16 * 64


def train(config: str, resume: bool, double: bool = False) -> None:
    """What train_net.py does in one of the processes; with ``double`` in float64."""
    if double:
        torch.set_default_dtype(torch.float64)
        # Detectron2 suppresses boxes in float32 alone; here none is suppressed, so that this is but an order.
        suppress = proposal_utils.batched_nms
        proposal_utils.batched_nms = lambda boxes, scores, *rest: suppress(boxes, scores.float(), *rest)
    _pause_before_steps()
    args = argparse.Namespace(resume=resume, eval_only=False, config_file="", opts=[])
    opts = ("SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.CHECKPOINT_PERIOD", "1")
    run(args, load_prepared(config, [*EVERYTHING, *opts]))


def _pause_before_steps() -> None:
    """Give time to be killed in."""
    before_step = Trainer.before_step
    Trainer.before_step = lambda trainer: (time.sleep(_PAUSE), before_step(trainer))


def start(config: Path, processes: int, resume: bool = False, machine: int = 0, url: str | None = None, double=False):
    """Start what `launch` starts, by forks since starting Python takes longer than the training.

    Args:
        config: Of `write_config`.
        processes: Of each machine.
        resume: Whether with --resume.
        machine: Number of the machine, of two if ``url`` says where they meet.
        url: Where two machines meet.
        double: Whether in float64.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_launch, args=(config, processes, resume, machine, url, double)
    )
    process.start()
    return process


def _launch(config: Path, processes: int, resume: bool, machine: int, url: str | None, double: bool) -> None:
    os.setsid()
    with open(config.parent / f"said{machine}.txt", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    by_spawn = launch_module.run_processes
    launch_module.run_processes = lambda *given: by_spawn(*given, method="fork")
    if url:  # in the namespace of a machine of its own
        _enter(machine)
    launch_function(train, processes, 2 if url else 1, machine, url, (str(config), resume, double), "cpu")


def _enter(machine: int) -> None:
    handle = os.open(f"/run/netns/{_namespace(machine)}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, 0):  # Python has it from 3.12 on
        raise OSError(ctypes.get_errno(), "setns")
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


def weights(config: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(config.parent / name, weights_only=True)["model"]


def tolerance(config: Path, double: bool) -> float:
    """How far weights may be from those of another order of addition.

    A sum of n terms is off by at most n u of the largest partial sum, u the unit roundoff (Higham, Accuracy and
    Stability of Numerical Algorithms, 4.2). So is a gradient, relative to itself; a weight moves by the sum of the
    gradients, times the rate, over all iterations: the bound is n u times the farthest that any weight moves. Each
    iteration starts from weights that are off already, for which it counts once more.
    """
    unit = torch.finfo(torch.float64 if double else torch.float32).eps / 2
    return ITERATIONS * TERMS * unit * difference(weights(config), weights(config, "model_0000000.pth"))


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def wait_for(file: Path, *processes: multiprocessing.Process) -> None:
    """Wait until there is ``file``, or a process has ended."""
    while not file.exists() and all(process.is_alive() for process in processes):
        time.sleep(0.01)


def children(process: multiprocessing.Process) -> list[int]:
    """The processes that a program has started itself."""
    return _children(process.pid)


def _ends(*processes: multiprocessing.Process) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


class Jobs:
    """The trials, one after another; `lines` says of each what it was, and whether all was well."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.lines: list[tuple[str, bool]] = []
        make_data(folder / "data", images=12, sizes=(64, 65))

    def _job(self, name: str) -> Path:
        return write_config(self._folder / name, self._folder / "data", IMS_PER_BATCH=4)

    def _show(self, what: str, well: bool) -> None:
        self.lines.append((what, bool(well)))
        print(f"{'ok  ' if well else 'FAIL'} {what}", flush=True)

    def _same_as_two(self, config: Path, status: list[int]) -> bool:
        """Whether all ended well, with the weights of two processes that nothing befell, bit for bit."""
        two = self._folder / "2 processes" / "x"
        return not any(status) and difference(weights(two), weights(config)) == 0

    def two_alone(self) -> None:
        """What the later ones are compared with."""
        if _ends(start(self._job("2 processes"), 2)) != [0]:
            raise SystemExit(f"2 processes: see {self._folder}")

    def equal(self, counts: tuple[int, ...] = (2, 4), precisions: tuple[bool, ...] = (False, True)) -> None:
        """Several processes, and one on the whole batch; in float64 where ``precisions`` are true."""
        for double in precisions:
            kind = "float64" if double else "float32"
            one = self._job(f"one {kind}")
            if _ends(start(one, 1, double=double)) != [0]:
                raise SystemExit(f"one process in {kind}: see {self._folder}")
            allowed = tolerance(one, double)
            for count in counts:
                config = self._job(f"{count} processes {kind}")
                status = _ends(start(config, count, double=double))
                away = difference(weights(one), weights(config)) if status == [0] else float("nan")
                self._show(
                    f"{count} processes in {kind}: weights within {away:.1e} of one process; rounding may make "
                    f"{allowed:.1e}", away <= allowed,
                )

    def killed(self) -> None:
        """One of two processes is killed."""
        config = self._job("killed")
        launcher = start(config, 2)
        wait_for(config.parent / "model_0000002.pth", launcher)
        os.kill(children(launcher)[1], signal.SIGKILL)
        begun = time.monotonic()
        status = _ends(launcher)
        seconds = time.monotonic() - begun
        said = (config.parent / "said0.txt").read_text()
        told = said.count("error: process 1 was ended by SIGKILL") == 1 and "Traceback" not in said
        self._show(f"process 1 of 2 killed: the job ends after {seconds:.1f} s with one line", status == [1] and told)
        same = self._same_as_two(config, _ends(start(config, 2, True)))
        self._show("started again with --resume: the weights of a job that was never killed, bit for bit", same)

    def stopped(self) -> None:
        """Ctrl-C to two processes."""
        config = self._job("stopped")
        launcher = start(config, 2)
        wait_for(config.parent / "model_0000002.pth", launcher)
        os.killpg(launcher.pid, signal.SIGINT)
        status = _ends(launcher)
        said = (config.parent / "said0.txt").read_text()
        told = said.count("Stopped. The last checkpoint is") == 1 and "Traceback" not in said
        self._show("Ctrl-C with 2 processes: a checkpoint and one line", status == [130] and told)
        same = self._same_as_two(config, _ends(start(config, 2, True)))
        self._show("after Ctrl-C, started again with --resume: the same weights, bit for bit", same)

    def other_number(self) -> None:
        """Stopped with two processes, ended with one."""
        config = self._job("fewer")
        launcher = start(config, 2)
        wait_for(config.parent / "model_0000002.pth", launcher)
        os.killpg(launcher.pid, signal.SIGTERM)
        status = _ends(launcher)
        status += _ends(start(config, 1, True))
        said = "had 2 processes and has 1" in (config.parent / "log.txt").read_text()
        two = self._folder / "2 processes" / "x"
        allowed = tolerance(two, False)
        away = difference(weights(two), weights(config)) if status == [143, 0] else float("nan")
        self._show(
            f"SIGTERM with 2 processes, resumed with 1: a warning, and weights within {away:.1e}; rounding may make "
            f"{allowed:.1e}", said and away <= allowed,
        )

    def torchrun(self) -> None:
        """torchrun itself, its second process killed, and started again by it."""
        config = self._job("torchrun")
        opts = ["SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.CHECKPOINT_PERIOD", "1", *EVERYTHING]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", "--module", "tests.jobs", "--config-file", str(config), *opts]
        with open(config.parent / "said.txt", "w") as said:
            agent = subprocess.Popen(command, stdout=said, stderr=said, cwd=Path(__file__).resolve().parents[1])
            while not (config.parent / "model_0000002.pth").exists() and agent.poll() is None:
                time.sleep(0.01)
            workers = [n for n in _children(agent.pid) if _environment(n).get("RANK") == "1"]
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            status = agent.wait()
        same = len(workers) == 1 and self._same_as_two(config, [status])
        self._show("torchrun, process 1 of 2 killed: it starts both again, and they end with the same weights", same)

    def machines(self) -> None:
        """Two network namespaces; all of one is killed, then both are started again."""
        with two_machines():
            config = self._job("machines")
            url = "tcp://10.77.0.1:29500"
            both = [start(config, 1, machine=k, url=url) for k in (0, 1)]
            wait_for(config.parent / "model_0000002.pth", *both)
            os.killpg(both[1].pid, signal.SIGKILL)
            killed = time.monotonic()
            status = _ends(*both)
            seconds = time.monotonic() - killed
            begun = (config.parent / "model_0000002.pth").exists()
            self._show(
                f"machine 1 of 2 killed: the other one ends after {seconds:.1f} s with status {status[0]}",
                begun and status == [1, -9],
            )
            same = self._same_as_two(config, _ends(*[start(config, 1, True, machine=k, url=url) for k in (0, 1)]))
            self._show("both started again: the weights of two processes on one machine, bit for bit", same)


def _children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def main(arguments: list[str] | None = None) -> int:
    if under_torchrun():  # one of those that `Jobs.torchrun` has started
        _pause_before_steps()
        train_net.main(arguments)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--short", action="store_true", help="2 processes in float64, and one of two killed: no more")
    parser.add_argument("--folder", type=Path, help="keeps what the trainings write")
    parser.add_argument("--json", type=Path, help="write what came of it into this file too")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        jobs = Jobs(folder)
        jobs.two_alone()
        if args.short:
            jobs.equal((2,), (True,))
        else:
            jobs.equal()
        jobs.killed()
        if not args.short:
            jobs.stopped()
            jobs.other_number()
            jobs.torchrun()
        if args.namespaces:
            jobs.machines()
    if args.json:
        args.json.write_text(json.dumps(jobs.lines))
    return 0 if all(well for _, well in jobs.lines) else 1


if __name__ == "__main__":
    sys.exit(main())
