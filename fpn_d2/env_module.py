"""Lets programs that know nothing of fpn_d2, as Detectron2's own ``tools/train_net.py``, use its components and keys.

Detectron2 imports the module named in an environment variable when it is itself imported:

    DETECTRON2_ENV_MODULE=fpn_d2.env_module python tools/train_net.py --config-file ...

The program then sees our registered components, and `detectron2.config.get_cfg` returns our keys beside Detectron2's.
Keys that only our own train_net.py reads (as DATASETS.COCO_FORMAT) are accepted, and do nothing there.
"""

import importlib


def setup_environment() -> None:
    """Register every component, and add our keys to the defaults of Detectron2.

    Detectron2 calls this at the start of its own import, so nothing of it is imported before it is needed here. The
    import of fpn_d2 may be under way too, if it was what imported Detectron2: then it ends by itself, later.
    """
    from detectron2.config import defaults

    from fpn_d2.config import add_fpn_d2_config

    add_fpn_d2_config(defaults._C)
    importlib.import_module("fpn_d2.modeling")
