"""A detector whose convolutions and matrix products are done in 8-bit integers, by OpenVINO and NNCF.

NNCF watches the model on images and puts the range of each map beside it. Only what leads from pixels to maps, and from
pooled maps to the predictors, is quantised: boxes are worked out in float32, and so are the last layers, whose output
is a score or a shift of a box itself.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpn_d2.errors import UserError

from .openvino_file import read_for_openvino

# Layers with weights, and what a walk from one layer to the next does not pass: there maps become boxes.
WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
_BORDER = ("Gather", "GatherElements", "NonMaxSuppression", "NonZero", "ROIAlign", "ShapeOf", "TopK")
Inputs = dict[str, np.ndarray]
# Gives a figure, more is better, of a compiled model on some of the items.
Validate = Callable[[Any, Sequence], float]


def quantized(model, items: Sequence, inputs_of: Callable[[Any], Inputs], kept: Sequence[str]):
    """A copy of a model in 8-bit integers.

    Args:
        model: out of :func:`read_to_quantise`.
        items: images to calibrate with, a few hundred of those that it will see.
        inputs_of: an item -> the arrays that the model is called with.
        kept: names of operations that stay in float32.

    Raises:
        UserError: NNCF is not installed.
    """
    nncf = _nncf()
    with _quiet():
        return nncf.quantize(model, nncf.Dataset(items, inputs_of), **_options(nncf, items, kept))


def quantized_within(
    model,
    items: Sequence,
    inputs_of: Callable[[Any], Inputs],
    kept: Sequence[str],
    check_items: Sequence,
    validate: Validate,
    max_drop: float,
):
    """The same, with layers given back their float32, those that cost most first, until its figure is good enough.

    Args:
        model, items, inputs_of, kept: see :func:`quantized`.
        check_items: images to validate with.
        validate: called with a compiled model and some of ``check_items``.
        max_drop: how far its figure may be below that of ``model``.
    """
    nncf = _nncf()
    with _quiet():
        return nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(items, inputs_of),
            nncf.Dataset(check_items, inputs_of),
            lambda compiled, some: (validate(compiled, list(some)), None),
            max_drop=max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            **_options(nncf, items, kept),
        )


def _nncf():
    try:
        import nncf
    except ImportError:
        raise UserError("nncf is not installed: pip install 'fpn_d2[int8]'") from None
    return nncf


def _options(nncf, items: Sequence, kept: Sequence[str]) -> dict:
    scope = nncf.IgnoredScope(names=list(kept), validate=False)
    return {"subset_size": len(items), "preset": nncf.QuantizationPreset.MIXED, "ignored_scope": scope}


def layers_in_float32(model) -> tuple[int, int]:
    """How many layers with weights a quantised model does in float32, and how many it has."""
    layers = [op for op in model.get_ordered_ops() if op.get_type_name() in WEIGHTED]
    # Weights in int8 come out of what multiplies them by their scale.
    as_they_are = [op for op in layers if op.input_value(1).get_node().get_type_name() == "Constant"]
    return len(as_they_are), len(layers)


def read_to_quantise(onnx: Path):
    """The model of an ONNX file as OpenVINO has it, with max-pooling of single cells, as makes p6 of p5, as slices.

    Quantised, such a pooling of OpenVINO 2026.4's gives its map on a wrong scale.

    Raises:
        UserError: OpenVINO is not installed.
    """
    model = read_for_openvino(onnx)
    from openvino import opset13 as op

    for pool in model.get_ordered_ops():
        if pool.get_type_name() != "MaxPool":
            continue
        about = pool.get_attributes()
        if set(about["kernel"]) == {1} and not any([*about["pads_begin"], *about["pads_end"]]):
            steps = np.array(about["strides"], np.int64)
            nothing = np.zeros_like(steps)
            axes = np.arange(2, 2 + len(steps))
            end = np.full_like(steps, np.iinfo(np.int64).max)
            slices = op.slice(pool.input_value(0), nothing, end, steps, axes)
            names = pool.output(0).get_names()
            for target in pool.output(0).get_target_inputs():
                target.replace_source_output(slices.output(0))
            slices.output(0).set_names(names)
    model.validate_nodes_and_infer_types()
    return model


def kept_in_float32(model) -> list[str]:
    """Names of the operations that are not quantised: the last layers, and all that lies outside of the network."""
    ops = model.get_ordered_ops()
    weighted = [op for op in ops if op.get_type_name() in WEIGHTED]
    inside = {op.get_friendly_name() for op in weighted if _leads_to_another(op)}
    waiting = [op for op in weighted if op.get_friendly_name() in inside]
    while waiting:  # backwards from layers through what makes their maps
        for value in waiting.pop().input_values():
            source = value.get_node()
            if source.get_type_name() not in (*_BORDER, "Constant") and source.get_friendly_name() not in inside:
                inside.add(source.get_friendly_name())
                waiting.append(source)
    skipped = ("Constant", "Parameter", "Result")
    return [
        op.get_friendly_name()
        for op in ops
        if op.get_friendly_name() not in inside and op.get_type_name() not in skipped
    ]


def _leads_to_another(layer) -> bool:
    """Whether the map of a layer goes into another layer; of a predictor it does not."""
    seen, waiting = set(), [layer]
    while waiting:
        for output in waiting.pop().outputs():
            for target in output.get_target_inputs():
                op = target.get_node()
                kind, name = op.get_type_name(), op.get_friendly_name()
                if kind in WEIGHTED or kind == "ROIAlign" and target.get_index() == 0:
                    return True
                if kind not in _BORDER and name not in seen:
                    seen.add(name)
                    waiting.append(op)
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line of NNCF's for each layer that is left out."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
