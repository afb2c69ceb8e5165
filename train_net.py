#!/usr/bin/env python3
"""Train or evaluate a detector: Detectron2's command line, on GPUs or CPUs.

    python train_net.py --config-file configs/quick_schedules/quickstart.yaml
    python train_net.py --config-file output/quickstart/config.yaml --eval-only \\
        MODEL.WEIGHTS output/quickstart/model_best.pth
"""

from detectron2.engine import default_argument_parser

from fpn_d2.engine import launch, load_config, run, user_mistakes_end_the_program


def main() -> None:
    args = default_argument_parser().parse_args()
    with user_mistakes_end_the_program():
        cfg = load_config(args.config_file, args.opts)
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
