"""What a checkpoint of ours says about its model, beside the weights: enough to build it and to name what it finds.

    torch.load("model_final.pth")["fpn_d2"] == {
        "format": 1,                    # of this dictionary
        "version": "0.1.0",             # of fpn_d2
        "config": "MODEL:\\n  ...",     # the whole configuration: the model, INPUT, PIXEL_MEAN, ...
        "classes": {"thing_classes": ["ant", "zebra"], "thing_ids": [4, 20], ...},
    }

All of it is text, numbers and plain containers, which `torch.load` reads with ``weights_only``. Detectron2's own
checkpointer passes over it.
"""

import importlib.metadata

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from fpn_d2.errors import UserError

KEY = "fpn_d2"
FORMAT = 1
# Of Detectron2's metadata, what says which class or keypoint an index stands for.
_LISTS = ("thing_classes", "stuff_classes", "keypoint_names")
_IDS = {"thing_ids": "thing_dataset_id_to_contiguous_id", "stuff_ids": "stuff_dataset_id_to_contiguous_id"}


def contents(cfg: CfgNode) -> dict:
    """The dictionary above for a model that is trained with ``cfg``; its data sets are registered and known.

    "classes" has of these what the first data set with classes has: the lists "thing_classes", "stuff_classes" and
    "keypoint_names", in the order of the model's indices; "thing_ids" and "stuff_ids", the category ids of the data
    set in the same order; "keypoint_flip_map", pairs of names.
    """
    return {"format": FORMAT, "version": _version(), "config": cfg.dump(), "classes": classes_of_data(cfg)}


def classes_of_data(cfg: CfgNode) -> dict:
    """"classes" of `contents`: of the first set of DATASETS.TRAIN or DATASETS.TEST that has any; else empty."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        found = {key: [str(text) for text in metadata.get(key)] for key in _LISTS if metadata.get(key)}
        for key, source in _IDS.items():
            ids = metadata.get(source)
            if ids:
                found[key] = [_plain(i) for i in sorted(ids, key=ids.get)]
        if metadata.get("keypoint_flip_map"):
            found["keypoint_flip_map"] = [[str(a), str(b)] for a, b in metadata.get("keypoint_flip_map")]
        if found:
            return found
    return {}


def classes_in(checkpoint: dict) -> dict:
    """"classes" of the `contents` that a checkpoint holds; empty where it holds none, or something else."""
    held = checkpoint.get(KEY)
    classes = held.get("classes") if isinstance(held, dict) else None
    classes = classes if isinstance(classes, dict) else {}
    return {
        key: names
        for key, names in classes.items()
        if isinstance(names, list) and (key not in _LISTS or all(isinstance(name, str) for name in names))
    }


def check_classes(held: dict, wanted: dict, file: str) -> None:
    """Check that a model whose "classes" are ``held`` is used on data whose "classes" are ``wanted``.

    Only class names count, in their order: the same classes may have other ids in another data set.

    Raises:
        UserError: Prints both lists.
    """
    for key in ("thing_classes", "stuff_classes"):
        ours, theirs = held.get(key), wanted.get(key)
        if ours and theirs and ours != theirs:
            raise UserError(f"{file} was trained on the classes {_shown(ours)}, but the data has {_shown(theirs)}")


def _shown(names: list[str], most: int = 100, longest: int = 60) -> str:
    shown = [repr(name if len(name) <= longest else f"{name[:longest]}...") for name in names[:most]]
    return f"[{', '.join(shown)}{', ...' if len(names) > most else ''}] ({len(names)})"


def _plain(value: object) -> int | str:
    return value if isinstance(value, str) else int(value)


def _version() -> str:
    try:
        return importlib.metadata.version("fpn_d2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
