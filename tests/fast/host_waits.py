"""Counts where a forward would make the host wait for a GPU, on a machine that has none.

Tensors are put on a device that does not exist: each is a :class:`DeviceTensor` round a CPU tensor, says that it is on
``DEVICE``, and every operation on it runs on the CPU tensor inside. So code that asks for the device type takes its GPU
branch, results are real numbers, and each passage between the two sides is seen. Two things are counted:

- *waits*: the host needs a number that the device has yet to compute. ``item``, ``bool``, ``int``, ``tolist`` and
  copies to the host; operations whose result has a size that depends on values: ``nonzero`` and one-argument ``where``,
  a boolean mask as an index (one per mask), ``masked_select``, ``unique``, ``repeat_interleave`` without
  ``output_size``, ``bincount``, ``nms``; and comparisons that answer with a Python bool (``equal``). Assigning one
  number through a mask waits for nothing: PyTorch turns it into ``masked_fill``.
- *uploads*: copies of ordinary memory to the device, also those inside ``torch.as_tensor(a_list, device=...)``. PyTorch
  lets the host wait for these too, but no computation has to end on another's behalf, and pinned memory avoids it.

Both are what ``torch.cuda.set_sync_debug_mode`` warns of. Operations that are a single launch on a GPU but several here
(Triton's pooling) are run by :func:`as_one_launch`.
"""

import collections
import contextlib
import functools
import traceback

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")  # a type that needs no driver; what is made on it here does have numbers

_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "nms", "is_nonzero"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}


class DeviceTensor(torch.Tensor):
    """A tensor on ``DEVICE`` whose numbers are those of the CPU tensor ``inner``."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor):
        self.inner = inner.detach()

    def tolist(self) -> list:
        """A copy to the host; PyTorch has it for its own class only."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a DeviceTensor outside of Host()")


class Host(TorchDispatchMode):
    """Within it, ``DEVICE`` exists, and ``waits`` and ``uploads`` count by the place in the code that caused them."""

    def __init__(self):
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[-1].rstrip("_")
        given = [x for x in _flat((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(isinstance(x, DeviceTensor) for x in given)
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        to_device = on_device if target is None else torch.device(target) == DEVICE
        self._count(name, args, kwargs, on_device, to_device)
        plain_args, plain_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
        result = func(*plain_args, **plain_kwargs)
        if torch.Tag.inplace_view in func.tags:  # as unsqueeze_: the outside has to take the new shape as well
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        if not to_device:
            # A copy from the device is no view of it.
            return result.clone() if on_device and isinstance(result, torch.Tensor) else result
        known = {id(_inner(x)): x for x in given}  # what is changed in place stays the same object

        def outside(x):
            return (known[id(x)] if id(x) in known else DeviceTensor(x)) if isinstance(x, torch.Tensor) else x

        return tree_map(outside, result)

    def _count(self, name, args, kwargs, on_device, to_device) -> None:
        waits = uploads = 0
        if name in ("copy", "_to_copy"):
            source = args[1] if name == "copy" else args[0]
            target = isinstance(args[0], DeviceTensor) if name == "copy" else to_device
            if source.numel():
                waits = int(isinstance(source, DeviceTensor) and not target)
                uploads = int(not isinstance(source, DeviceTensor) and target)
        elif not on_device:
            return
        elif name in _WAITS:
            waits = 1
        elif name == "repeat_interleave":
            waits = int(kwargs.get("output_size") is None)
        elif name in ("index", "index_put", "_index_put_impl"):
            indices = [x for x in args[1] if x is not None]
            masks = sum(x.dtype in (torch.bool, torch.uint8) for x in indices)
            fills = name != "index" and masks == 1 and args[2].numel() == 1
            waits = 0 if fills else masks
            uploads = sum(not isinstance(x, DeviceTensor) for x in indices)
        if waits or uploads:
            place = _place(name)
            self.waits[place] += waits
            self.uploads[place] += uploads


class _Lists(TorchFunctionMode):
    """Shows ``torch.tensor(a_list, device=DEVICE)`` as what it is on a GPU: a tensor made here, and its copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            made = func(*args, **kwargs)
            return made.to(DEVICE)
        return func(*args, **kwargs)


def _place(name: str) -> str:
    """Return the operation with the innermost line outside of PyTorch's and torchvision's own files."""
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in ("/torch/", "/torchvision/", "host_waits.py", "<")):
            path = "/".join(frame.filename.split("/")[-2:])
            return f"{path}:{frame.lineno} {frame.name}: {name}"
    return name


def _flat(value):
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _inner(x):
    return x.inner if isinstance(x, DeviceTensor) else x


def put_on_device(module: nn.Module) -> nn.Module:
    """Move, in place, parameters and buffers of ``module`` to ``DEVICE``."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = DeviceTensor(parameter.detach())
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = DeviceTensor(buffer)
    return module


def back(value):
    """Return the CPU tensors inside of tensors, ``Boxes`` and ``Instances``, and of lists and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        return _inner(value)
    if isinstance(value, dict):
        return {key: back(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [back(item) for item in value]
    if hasattr(value, "get_fields"):
        return back(value.get_fields())
    return back(value.tensor) if hasattr(value, "tensor") else value


def as_one_launch(function):
    """Make ``function`` run on the CPU tensors inside of its arguments, unseen, and return a result on ``DEVICE``."""

    @functools.wraps(function)
    def launch(*args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        return DeviceTensor(result)

    return launch


@contextlib.contextmanager
def counting():
    """Yield a :class:`Host` that is counting; nothing in it needs gradients."""
    with torch.no_grad(), _Lists(), Host() as host:
        yield host
