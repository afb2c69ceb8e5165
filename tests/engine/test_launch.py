"""Processes: one, two on a CPU, and what they say when something is wrong."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from fpn_d2.engine import Trainer, UserError, launch
from fpn_d2.engine.hooks import validation_losses

from . import two_processes
from .small import small_config

# The package has a function of that name.
launch_module = sys.modules[launch.__module__]
ROOT = Path(__file__).resolve().parents[2]


def test_one_process_is_this_one():
    called = []
    launch(called.append, 1, args=(3,), device="cpu")
    assert called == [3]


@pytest.mark.parametrize("set_before", [None, "0"])
def test_large_tensors_lie_in_huge_pages(monkeypatch, set_before):
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists() or "[madvise]" not in kernel.read_text():
        pytest.skip("this system gives no huge pages on request: that they are asked for is NOT tested")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if set_before is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", set_before)
    code = "from fpn_d2.engine import launch; from tests.engine.two_processes import huge_pages; "
    code += "launch(huge_pages, 1, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 0) == (set_before is None)


def test_two_processes_with_averaged_weights_and_a_bottom_up_pathway_that_starts_later(tmp_path, scenes):
    keys = ["SOLVER.EMA_DECAY", 0.5, "SOLVER.BOTTOM_UP_FROZEN_ITERS", 2, "SOLVER.MAX_ITER", 3, "MODEL.DEVICE", "cpu"]
    cfg = small_config(tmp_path, scenes, *keys, "DATASETS.TEST", "()", "TEST.BEST_METRIC", "", "SEED", 5)
    launch(two_processes.train, 2, args=(cfg, str(tmp_path)), dist_url="auto", device="cpu")
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=False) for rank in (0, 1))
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    below = [g for name, g in first["gradients"].items() if ".bottom_up." in name]
    assert len(below) > 50 and all(g is not None for g in below)  # of the third step
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert all(torch.equal(value, saved["model"][name]) for name, value in first["weights"].items())
    trained = saved["trainer"]["hooks"]["WeightAveraging"]["trained"]
    assert not torch.equal(trained["backbone.fpn_output2.weight"], saved["model"]["backbone.fpn_output2.weight"])


def test_two_processes_on_a_cpu_train_one_model(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, "SOLVER.MAX_ITER", 2, "MODEL.DEVICE", "cpu", "TEST.VAL_LOSS_PERIOD", 2,
                       "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SEED", 5)
    launch(two_processes.train, 2, args=(cfg, str(tmp_path)), dist_url="auto", device="cpu")
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=False) for rank in (0, 1))
    assert first["backend"] == second["backend"] == "gloo"
    assert first["workers start by"] == multiprocessing.get_start_method()  # not by spawning, as the two themselves
    assert (first["local"], second["local"]) == ((0, 2), (1, 2))
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    gradients = {name: g for name, g in first["gradients"].items() if g is not None}
    assert len(gradients) > 50
    assert all(torch.equal(g, second["gradients"][name]) for name, g in gradients.items())
    # Each batch of two is shared, so the processes see different images.
    trained_on = [[f for f in rank["seen"] if "/train/" in f] for rank in (first, second)]
    assert len(trained_on[0]) == len(trained_on[1]) == 2
    assert trained_on[0] != trained_on[1]
    # The images of the evaluation are shared too.
    assert sorted(f for rank in (first, second) for f in rank["seen"] if "/val/" in f) == sorted(
        str(f) for f in (scenes / "images" / "val").iterdir()
    )
    # All results are with the first process; the evaluation saw the images of both.
    assert first["results"]["bbox"].keys() >= {"AP", "AP50"}
    assert second["results"] == {}
    # The losses over all images are those of one process, and they are with the first process too.
    model = Trainer.build_model(cfg)
    model.load_state_dict(first["weights"])
    alone = validation_losses(cfg, model)
    assert first["val"] == pytest.approx(alone, rel=1e-3)
    assert second["val"] == {}


@pytest.mark.slow
def test_a_mistake_of_the_user_in_a_process_ends_the_program_with_its_status():
    with pytest.raises(SystemExit) as end:
        launch(two_processes.mistake, 2, device="cpu")
    assert end.value.code == 2


def test_ctrl_c_ends_the_program_as_a_shell_expects():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        launch(interrupted, 1, device="cpu")
    assert end.value.code == 130


@pytest.mark.parametrize("main_branch", [False, True])
def test_the_second_of_two_machines_has_the_ranks_behind_the_first(monkeypatch, main_branch):
    """Two machines with two processes each; what joins processes is replaced, since there is one machine here."""
    joined, groups, ran, threads = [], [], [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.append((backend, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "new_group", lambda ranks: groups.append(ranks) or ranks)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    if main_branch:
        monkeypatch.setattr(comm, "create_local_process_group", groups.append, raising=False)
    else:
        monkeypatch.delattr(comm, "create_local_process_group", raising=False)

    def in_turn(worker, arguments, names):
        assert names == ["process 2", "process 3"]
        for given in arguments:
            worker(*given)

    monkeypatch.setattr(launch_module, "run_processes", in_turn)
    url = "tcp://10.0.0.1:1234"
    launch(ran.append, 2, num_machines=2, machine_rank=1, dist_url=url, args=("x",), device="cpu")
    assert ran == ["x", "x"] and threads == [4, 4]
    assert [backend for backend, _ in joined] == ["gloo"] * 2
    assert [(o["rank"], o["world_size"], o["init_method"]) for _, o in joined] == [(2, 4, url), (3, 4, url)]
    if main_branch:
        assert groups == [2, 2]
    else:
        assert groups == [[0, 1], [2, 3]] * 2 and comm._LOCAL_PROCESS_GROUP == [2, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dist_url", [None, "auto", default_argument_parser().get_default("dist_url")])
def test_several_machines_need_an_address(device, dist_url):
    with pytest.raises(UserError, match="--dist-url"):
        launch(print, 2, num_machines=2, dist_url=dist_url, device=device)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were asked for on a machine with 1 GPUs"):
        launch(print, 2, device="cuda")


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}


def test_a_process_of_torchrun_starts_none_and_joins_the_others(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**TORCHRUN, **address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    seen = []
    launch(lambda: seen.append((dist.get_backend(), comm.get_local_rank(), dist.get_world_size())), 1, device="cpu")
    assert seen == [("gloo", 0, 1)]
    assert not dist.is_initialized()
    for arguments in ({"num_gpus_per_machine": 2}, {"num_gpus_per_machine": 1, "num_machines": 2}):
        with pytest.raises(UserError, match="torchrun starts the processes"):
            launch(print, **arguments, device="cpu")
