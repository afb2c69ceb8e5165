"""The names that weight files need in their pickles, and what stands for each: arrays, tensors, containers.

Nothing here is the function of that name. Each makes what the function would make of honest arguments, checks the
arguments against the bytes that are there, and takes no others. The argument lists are those of
``numpy/_core/src/multiarray``'s ``__reduce__``, ``torch/_utils.py`` and Python's ``copyreg``.
"""

import math
import re
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plain_pickle import Draft, Inner, Refused, Source

# Numbers and text of fixed width; no Python objects ("O"), no records.
_DTYPE = r"[<>=|]?([?bB]|b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,9})"
# An expanded tensor of more elements than lie behind it is a small one, such as one number for each channel.
_MOST_EXPANDED = 2**16


@dataclass
class StorageKind(Inner):
    """What torch calls a storage's class: the type of its elements."""

    dtype: torch.dtype


@dataclass
class Storage(Inner):
    """A block of a torch file from which tensors are cut.

    Args:
        data: Its bytes, (n,) of uint8.
        dtype: Of its elements.
    """

    data: Tensor
    dtype: torch.dtype


def _dtype(source: Source, spec: str, align: Any = False, copy: Any = False) -> Draft:
    spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
    if not isinstance(spec, str) or not re.fullmatch(_DTYPE, spec):
        raise Refused(f"it holds an array of NumPy's type {spec!r:.100}, and weights are numbers")

    def complete(state: tuple) -> np.dtype:
        order, shape, names, fields = state[1], *state[2:5]
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|") or shape or names or fields:
            raise Refused("it holds an array of records, and weights are numbers")
        return np.dtype(spec).newbyteorder(order)

    return Draft(complete)


def _reconstruct(source: Source, kind: Any, shape: Any, code: Any) -> Draft:
    if kind is not _ndarray:
        raise ValueError("an array of another class than ndarray")

    def complete(state: tuple) -> np.ndarray:
        shape, dtype, fortran, content = state[-4:]
        return _array(source, content, dtype, shape, "F" if fortran else "C")

    return Draft(complete)


def _ndarray(source: Source, *arguments: Any) -> None:
    raise Refused("it makes an array without content")


def _frombuffer(source: Source, content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    array = _array(source, content, dtype, shape, "F" if order == "F" else "C")
    return array if axes is None else array.transpose(axes)


def _scalar(source: Source, dtype: Any, content: Any) -> np.generic:
    return _array(source, content, dtype, (), "C")[()]


def _array(source: Source, content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if isinstance(content, str):  # written by Python 2
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, np.dtype):
        raise ValueError("an array without bytes or type")
    shape = _sizes(shape)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise Refused(f"an array claims the shape {str(shape)[:100]} of {dtype}, but has {len(content)} bytes")
    source.spend(len(content))
    array = np.frombuffer(content, dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="))


def _sizes(value: Any) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else value
    if not isinstance(value, tuple | list) or len(value) > 32 or not all(map(_is_size, value)):
        raise ValueError(f"{value!r:.100} is no shape")
    return tuple(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(source: Source, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2, whose further arguments are of no use to weights."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without storage")
    return _cut(storage.data.view(storage.dtype), offset, size, stride)


def _tensor_v3(source: Source, storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
               metadata: Any = None) -> Tensor:  # fmt: skip
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without storage or type")
    return _cut(storage.data.view(dtype), offset, size, stride)


def _cut(flat: Tensor, offset: int, size: Any, stride: Any) -> Tensor:
    size, stride = _sizes(size), _sizes(stride)
    if len(size) != len(stride) or not _is_size(offset):
        raise ValueError("a tensor of no shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (count and last >= len(flat)) or count > max(len(flat), _MOST_EXPANDED):
        raise Refused(f"a tensor claims the shape {str(size)[:100]}, but {len(flat)} numbers lie behind it")
    return torch.as_strided(flat, size, stride, offset) if count else flat.new_empty(size)


def _parameter(source: Source, data: Tensor, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without tensor")
    return data


def _from_type(source: Source, function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """torch._tensor._rebuild_from_type_v2: tensors with attributes, which are left out."""
    if function not in (_tensor, _tensor_v3, _parameter) or not isinstance(arguments, tuple):
        raise Refused("it holds a tensor of a class of its own")
    return function(source, *arguments)


def _device(source: Source, kind: str, index: int | None = None) -> torch.device:
    if not isinstance(kind, str) or len(kind) > 20:
        raise ValueError("a device without name")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _size(source: Source, sizes: Any = ()) -> torch.Size:
    return torch.Size(_sizes(sizes))


def _ordered_dict(source: Source, pairs: Any = ()) -> OrderedDict:
    return OrderedDict(_pairs(source, pairs))


def _counter(source: Source, counts: Any = ()) -> Counter:
    return Counter(dict(_pairs(source, counts)))


def _default_dict(source: Source, factory: Any = None, pairs: Any = ()) -> defaultdict:
    made_by = {_dict: dict, _list: list, None: None}
    return defaultdict(made_by[factory], _pairs(source, pairs))


def _dict(source: Source, pairs: Any = ()) -> dict:
    return dict(_pairs(source, pairs))


def _pairs(source: Source, pairs: Any) -> list:
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list | tuple):
        raise ValueError("a dictionary of what are no pairs")
    source.spend(len(pairs))
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and _is_key(pair[0]) for pair in pairs):
        raise ValueError("a dictionary of what are no pairs")
    return [tuple(pair) for pair in pairs]


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**60)


def _list(source: Source, items: Any = ()) -> list:
    source.spend(len(items))
    return list(items)


def _set(source: Source, items: Any = ()) -> set:
    source.spend(len(items))
    if not all(map(_is_key, items)):
        raise ValueError("a set of what is no key")
    return set(items)


def _frozen_set(source: Source, items: Any = ()) -> frozenset:
    return frozenset(_set(source, items))


def _complex(source: Source, real: float, imaginary: float) -> complex:
    if not (isinstance(real, float) and isinstance(imaginary, float)):
        raise ValueError("a complex number of what are no numbers")
    return complex(real, imaginary)


def _encode(source: Source, text: str, encoding: str = "latin1") -> bytes:
    """_codecs.encode: how Python 3 writes bytes in the old protocols."""
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise ValueError("text in an encoding of its own")
    source.spend(len(text))
    return text.encode("latin1")


def _bytes(source: Source) -> bytes:
    """How Python 3 writes empty bytes in the old protocols."""
    return b""


def _namespace(source: Source) -> Draft:
    """argparse.Namespace, in which torchvision's and others' training scripts keep their command line: a dictionary."""

    def complete(state: Any) -> dict:
        if not isinstance(state, dict):
            raise ValueError("a command line without options")
        return state

    return Draft(complete)


ARRAY_NAMES = {
    "builtins.bytes": _bytes,
    "builtins.complex": _complex,
    "builtins.dict": _dict,
    "builtins.frozenset": _frozen_set,
    "builtins.list": _list,
    "builtins.set": _set,
    "collections.Counter": _counter,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encode,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _ndarray,
}

_STORAGES = {
    "BFloat16": "bfloat16", "Bool": "bool", "Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Double": "float64", "Float": "float32", "Half": "float16", "Int": "int32",
    "Long": "int64", "Short": "int16",
}  # fmt: skip
_DTYPES = [
    *_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz",
]  # fmt: skip

TENSOR_NAMES = {
    **ARRAY_NAMES,
    **{f"torch.{kind}Storage": StorageKind(getattr(torch, dtype)) for kind, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageKind(torch.uint8),
    "torch.UntypedStorage": StorageKind(torch.uint8),
    **{f"torch.{dtype}": getattr(torch, dtype) for dtype in _DTYPES if hasattr(torch, dtype)},
    "torch.Size": _size,
    "torch.device": _device,
    "torch.Tensor": StorageKind(torch.uint8),  # a name to go by, as is the next
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "argparse.Namespace": _namespace,
}
