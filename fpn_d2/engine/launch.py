"""Starting the processes of a training, on GPUs or on CPUs."""

import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2 import engine
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from fpn_d2.errors import UserError

# The environment variable of PyTorch's that puts large tensors into huge pages.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    device: str = "cuda",
) -> None:
    """Run ``main_func(*args)`` in every process: Detectron2's `launch`, and the same on machines without a GPU.

    Detectron2 v0.6 starts several processes on GPUs only. Where there is none, or where ``device`` is "cpu", this
    function starts as many CPU processes as GPUs were asked for, joined by gloo. Their threads share the cores.

    Args:
        main_func: What to run; importable by its name, since the processes are spawned.
        num_gpus_per_machine, num_machines, machine_rank, dist_url, args: As in Detectron2's `launch`.
        device: MODEL.DEVICE of the configuration.

    Raises:
        UserError: As `check_address`.
        SystemExit: A process has ended with an exit status of its own, which becomes that of the program.
    """
    check_address(num_machines, dist_url)
    ask_for_huge_pages()
    world_size = num_machines * num_gpus_per_machine
    on_gpus = torch.cuda.is_available() and torch.device(device).type == "cuda"
    try:
        if world_size <= 1 or on_gpus:
            engine.launch(main_func, num_gpus_per_machine, num_machines, machine_rank, dist_url, args)
            return
        if dist_url in (None, "auto"):
            dist_url = f"tcp://127.0.0.1:{_free_port()}"
        mp.start_processes(
            _cpu_worker,
            nprocs=num_gpus_per_machine,
            args=(main_func, world_size, num_gpus_per_machine, machine_rank, dist_url, args),
            start_method="spawn",
        )
    except KeyboardInterrupt:
        sys.exit(130)  # the processes got the signal too, and the first of them says how to go on
    except mp.ProcessExitedException as error:
        # The process has said on stderr what was wrong; its status is ours.
        sys.exit(error.exit_code if error.exit_code and error.exit_code > 0 else 1)


def check_address(num_machines: int, dist_url: str | None) -> None:
    """Check that several machines have been told where to meet.

    Raises:
        UserError: ``dist_url`` is None or "auto", which is an address on one machine.
    """
    if num_machines > 1 and dist_url in (None, "auto"):
        raise UserError("with several machines, give the same --dist-url tcp://HOST:PORT to each of them")


def ask_for_huge_pages() -> None:
    """Have PyTorch ask Linux for large tensors in pages of 2 MB, also in processes that this one starts.

    Memory that is new is handed out page by page when it is first written, and a model on a CPU writes hundreds of
    megabytes of it in each step. PyTorch looks at the environment variable ``THP_MEM_ALLOC_ENABLE`` with its first
    large tensor: who has set it is left alone, "0" switches it off.
    """
    os.environ.setdefault(HUGE_PAGES, "1")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _cpu_worker(
    local_rank: int,
    main_func: Callable,
    world_size: int,
    processes: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=world_size,
        rank=machine_rank * processes + local_rank,
        timeout=DEFAULT_TIMEOUT,
    )
    try:
        _create_local_group(world_size, processes, machine_rank)
        comm.synchronize()
        main_func(*args)
    finally:
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
