#!/usr/bin/env python3
"""Train or evaluate a detector: Detectron2's command line, on GPUs or CPUs.

    python train_net.py --config-file configs/quick_schedules/quickstart.yaml
    python train_net.py --config-file output/quickstart/config.yaml --eval-only \\
        MODEL.WEIGHTS output/quickstart/model_best.pth
"""

import multiprocessing
import os
import signal
import sys
import warnings


def _stop_before_the_start(number: int, frame: object) -> None:
    """Ctrl-C and SIGTERM while libraries are imported, which takes seconds; `run` handles them afterwards."""
    if multiprocessing.current_process().name in ("MainProcess", "process 0") and os.environ.get("RANK", "0") == "0":
        print("Stopped. No checkpoint was saved.", file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ in ("__main__", "__mp_main__"):
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _stop_before_the_start)

# Of Detectron2's own code, at import; nothing that a user could change.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")

try:
    import fpn_d2  # noqa: F401  first: it says in one sentence what is missing
except ImportError as error:
    sys.exit(f"error: {error}")

from detectron2.engine import default_argument_parser  # noqa: E402

from fpn_d2.engine import check_address, launch, load_config, run, user_mistakes_end_the_program  # noqa: E402


def main() -> None:
    args = default_argument_parser().parse_args()
    with user_mistakes_end_the_program():
        check_address(args.num_machines, args.dist_url, args.num_gpus)
        cfg = load_config(args.config_file, args.opts)
        check_address(args.num_machines, args.dist_url, args.num_gpus, cfg.MODEL.DEVICE)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args, cfg),
        device=cfg.MODEL.DEVICE,
    )


if __name__ == "__main__":
    main()
