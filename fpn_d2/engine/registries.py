"""Schedules and samplers of a user's own, by the names that a configuration gives them.

Detectron2 chooses among its own by name and has no registry for others. One that is registered here is found by
SOLVER.LR_SCHEDULER_NAME or DATALOADER.SAMPLER_TRAIN:

    @LR_SCHEDULER_REGISTRY.register()
    def OneCycle(cfg, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER)

train_net.py sees it where the environment variable DETECTRON2_ENV_MODULE names the module that it stands in, which
Detectron2 then imports and whose ``setup_environment()`` it calls.
"""

from fvcore.common.registry import Registry

# Called with the configuration and the optimizer; returns a torch.optim.lr_scheduler.LRScheduler, which takes a step an
# iteration.
LR_SCHEDULER_REGISTRY = Registry("LR_SCHEDULER")
# Called with the configuration and the list of Detectron2's records; returns a sampler that gives indices of them
# without an end, the same ones in the same order in each process. Of a subclass of Detectron2's TrainingSampler, what
# _infinite_indices() gives.
TRAIN_SAMPLER_REGISTRY = Registry("TRAIN_SAMPLER")
