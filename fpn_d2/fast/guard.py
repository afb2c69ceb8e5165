"""When a fast class may compute in place of the plain one: every such question is asked here.

People do things to models: they hang hooks on modules, replace or wrap them, override and patch methods, prune, trace,
script, export, count FLOPs, differentiate twice. A fast class that cannot be sure that nobody does runs the plain code,
which is Detectron2's or PyTorch's own.
"""

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


class Fast:
    """Mixed in before a plain class, see apply.py; ``REPLACES`` names the methods that are replaced.

    The plain methods are ``super()``'s. Copies, pickles and replicas are fast again; what is scripted is plain.
    """

    REPLACES: tuple[str, ...] = ()
    plain: type  # the class without this mixin

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class was made at run time: it is named by what it was made of.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # before Python 3.11
        return remake, type(self).__bases__, state

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: the plain class, with the same parameters."""
        return scriptable(as_plain(self))


@functools.cache
def mixed(mixin: type[Fast], plain: type) -> type:
    """The class ``plain`` with ``mixin`` before it."""
    return type(plain.__name__, (mixin, plain), {"plain": plain, "__module__": __name__})


def remake(mixin: type[Fast], plain: type) -> nn.Module:
    """An empty module of their class: what a copy or a pickle starts from."""
    kind = mixed(mixin, plain)
    return kind.__new__(kind)


def as_plain(module: nn.Module) -> nn.Module:
    """The same module as its plain class: another object that shares all parameters, buffers and children."""
    return of_class(module, type(module).plain if isinstance(module, Fast) else type(module))


def of_class(module: nn.Module, kind: type, *without: str) -> nn.Module:
    """What scripts ``module`` as class ``kind``: another object with its state, less the attributes ``without``."""
    # Detectron2's export says by annotations of the class which attributes are constants.
    said = {**getattr(kind, "__annotations__", {}), **vars(type(module)).get("__annotations__", {})}
    other = type(kind.__name__, (kind,), {"__annotations__": said, "__module__": kind.__module__})
    other = other.__new__(other)
    other.__dict__ = {name: value for name, value in vars(module).items() if name not in without}
    other._modules = copy.copy(module._modules)
    return other


def scriptable(module: nn.Module) -> nn.Module:
    """``module``, or what its class wants to be scripted in its place."""
    prepare = getattr(module, "__prepare_scriptable__", None)
    return module if prepare is None else prepare()


def is_itself(module: nn.Module) -> bool:
    """Whether ``module`` is of a fast class, not of one made from it, and nobody patched what that replaces."""
    kind = type(module)
    return "plain" in vars(kind) and inherits(module, kind, *kind.REPLACES) and is_original(kind.plain, *kind.REPLACES)


def need_not_be_called(module: nn.Module, kind: type | None = None) -> bool:
    """Whether nobody would notice if the result of ``module`` came without a call of it.

    Args:
        module: what would be passed over.
        kind: the plain class that it has to be of, exactly; None: it is to be a :class:`Fast` one.
    """
    known = is_itself(module) if kind is None else type(module) is kind and is_original(kind, "forward")
    return (
        known
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not getattr(module, "_backward_pre_hooks", None)
        and not _any_global_hook()
    )


def _any_global_hook() -> bool:
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return any(getattr(nn_module, name, None) for name in (*names, "_global_backward_pre_hooks"))


def is_original(kind: type, *names: str) -> bool:
    """Whether these methods of ``kind`` are those that its own module (or that of a base class) defines."""
    for name in names:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if getattr(vars(owner)[name], "__module__", None) != owner.__module__:
            return False
    return True


def inherits(thing: object, kind: type, *names: str) -> bool:
    """Whether ``thing`` has these methods from ``kind`` as they are there: neither overridden nor patched."""
    own = vars(thing)
    return all(name not in own and getattr(type(thing), name) is getattr(kind, name) for name in names)


def is_watched() -> bool:
    """Whether someone follows the operations and has to see the plain ones: a trace, an export, a count of FLOPs."""
    compiler = getattr(torch, "compiler", None)  # before torch 2.1 there is none
    if torch.jit.is_tracing() or (hasattr(compiler, "is_compiling") and compiler.is_compiling()):
        return True
    functorch = getattr(torch._C, "_functorch", None)
    return (
        getattr(torch._C, "_len_torch_dispatch_stack", int)() > 0
        or _has_function_mode()
        or getattr(functorch, "maybe_current_level", lambda: None)() is not None
        or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0
    )


def _has_function_mode() -> bool:
    if getattr(torch._C, "_len_torch_function_stack", int)() == 0:
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not torch.utils._device.DeviceContext for mode in modes)  # that one says where, not what


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors on the CPU (or None), and nobody watches."""
    return not is_watched() and all(
        tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu") for tensor in tensors
    )


def need_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know what is computed from these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast asks of convolutions on this kind of device; None where it is off."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except RuntimeError:  # a kind of device without autocast
        return None
    except (AttributeError, TypeError):  # before torch 2.4
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
