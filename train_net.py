#!/usr/bin/env python3
"""Train or evaluate a detector: Detectron2's command line, on GPUs or CPUs. It is also ``fpn-d2 train``.

    python train_net.py --config-file configs/quick_schedules/quickstart.yaml
    python train_net.py --config-file output/quickstart/config.yaml --eval-only \\
        MODEL.WEIGHTS output/quickstart/model_best.pth
"""

from fpn_d2.cli.train import main

if __name__ == "__main__":
    main()
