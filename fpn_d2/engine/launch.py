"""Starting the processes of a training, on GPUs or on CPUs."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from fpn_d2.errors import UserError
from fpn_d2.huge_pages import ask_for_huge_pages

from .meeting import store_of_torchrun, wait_for_the_others
from .processes import lost_connection, run_processes

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    device: str = "cuda",
) -> None:
    """Run ``main_func(*args)`` in every process, as Detectron2's `launch` does, on GPUs or on CPUs.

    Where there is no GPU, or where ``device`` is "cpu", as many CPU processes are started as GPUs were asked for,
    joined by gloo. Their threads share the cores. A program that torchrun has started is one of its processes, and
    starts none.

    Args:
        main_func: What to run; importable by its name, since the processes are spawned.
        num_gpus_per_machine, num_machines, machine_rank, dist_url, args: As in Detectron2's `launch`. On one machine
            the processes find each other without ``dist_url``.
        device: MODEL.DEVICE of the configuration.

    Raises:
        UserError: As `check_address`.
        SystemExit: A process has failed or was stopped, and has said so.
    """
    check_address(num_machines, dist_url, num_gpus_per_machine, device)
    ask_for_huge_pages()
    on_gpus = _on_gpus(device)
    if under_torchrun():
        environment = {name: int(os.environ[name]) for name in _TORCHRUN}
        job = Job(environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"], environment["GROUP_RANK"], on_gpus)
        _run_in_job(job, environment["LOCAL_RANK"], environment["RANK"], main_func, args)
        return
    if num_machines * num_gpus_per_machine <= 1:
        try:
            main_func(*args)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        return
    job = Job(num_machines * num_gpus_per_machine, num_gpus_per_machine, machine_rank, on_gpus, dist_url)
    store = None
    if num_machines == 1:
        # This process is where the others meet: a port of the system's choice, which is never free and then taken.
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        job.address = f"127.0.0.1:{store.port}"
    ranks = [machine_rank * num_gpus_per_machine + i for i in range(num_gpus_per_machine)]
    run_processes(
        _run_in_job,
        [(job, local_rank, rank, main_func, args) for local_rank, rank in enumerate(ranks)],
        [f"process {rank}" for rank in ranks],
    )
    del store  # not before the processes have ended


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or what sets the same variables, has started."""
    return all(name in os.environ for name in (*_TORCHRUN, "MASTER_ADDR", "MASTER_PORT"))


def check_address(num_machines: int, dist_url: str | None, num_processes: int = 1, device: str = "cpu") -> None:
    """Check that several machines have been told where to meet, and that one way of starting processes was chosen.

    Args:
        num_machines, dist_url, device: As in `launch`.
        num_processes: Of each machine.

    Raises:
        UserError: ``dist_url`` is None, "auto" or the default of Detectron2's parser, which are addresses on one
            machine; more than one process was asked for under torchrun; or there are fewer GPUs than processes.
    """
    if under_torchrun():
        if num_machines > 1 or num_processes > 1:
            raise UserError("torchrun starts the processes: leave out --num-gpus and --num-machines")
    elif num_machines > 1 and dist_url in (None, "auto", engine.default_argument_parser().get_default("dist_url")):
        raise UserError("with several machines, give the same --dist-url tcp://HOST:PORT to each of them")
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else num_processes
    if local > 1 and _on_gpus(device) and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes were asked for on a machine with {torch.cuda.device_count()} GPUs: start at most one "
            "for each"
        )


def _on_gpus(device: str) -> bool:
    return torch.cuda.is_available() and torch.device(device).type == "cuda"


@dataclasses.dataclass
class Job:
    """How the processes of a training are spread over machines, and where they meet.

    Attributes:
        processes: Of all machines together.
        local_processes: Of each machine.
        machine: Number of this one.
        on_gpus: Whether each process has a GPU; else all compute on CPUs.
        url: Where they meet, as for `torch.distributed.init_process_group`.
        address: On one machine instead: host and port of a store that is there already.
    """

    processes: int
    local_processes: int
    machine: int
    on_gpus: bool
    url: str | None = None
    address: str = ""

    def join(self, local_rank: int, rank: int) -> None:
        """Join this process with the others."""
        if self.on_gpus:
            torch.cuda.set_device(local_rank)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.local_processes))
        where = self.url or self.address or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        wait_for_the_others(lambda: self._connect(local_rank, rank), where)

    def _connect(self, local_rank: int, rank: int) -> None:
        if self.on_gpus:
            torch.cuda.set_device(local_rank)  # of this thread
        where: dict = {"init_method": self.url or "env://"}
        store = None if self.url or self.address else store_of_torchrun(rank, self.processes, DEFAULT_TIMEOUT)
        if self.address:
            host, port = self.address.split(":")
            store = dist.TCPStore(host, int(port), None, False)
        if store is not None:
            where = {"store": store}
        dist.init_process_group(
            "nccl" if self.on_gpus else "gloo", **where, world_size=self.processes, rank=rank, timeout=DEFAULT_TIMEOUT
        )
        _create_local_group(self.processes, self.local_processes, self.machine)
        comm.synchronize()


def _run_in_job(job: Job, local_rank: int, rank: int, main_func: Callable, args: tuple) -> None:
    try:
        job.join(local_rank, rank)
        main_func(*args)
    except RuntimeError as error:
        if not under_torchrun() or not lost_connection(error):
            raise
        sys.exit(f"error: process {rank} lost the connection to another process, which has ended")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _create_local_group(world_size: int, processes: int, machine_rank: int) -> None:
    """Tell Detectron2 which processes share this machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes)
        return
    # v0.6 has no function for it: its own launch sets this variable.
    for machine in range(world_size // processes):
        group = dist.new_group(list(range(machine * processes, (machine + 1) * processes)))
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group
