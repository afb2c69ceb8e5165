"""Pickles read without being run: nothing that a file names is imported, looked up or called.

A pickle is a program for a stack machine, whose "call this function with that" lets a file do anything. The machine
here knows the part of the language that makes plain containers, numbers and text. A name in the file is an entry of the
table that the caller gives (see `pickled_arrays`), or the file is refused with that name.

It does not run Python's own unpickler with another ``find_class``: that one sets the state of any object it holds, and
a file of ten bytes can make it reserve gigabytes. Here work and memory are bounded by the size of the file.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from types import FunctionType
from typing import Any, BinaryIO

from fpn_d2.errors import UserError

_MOST_STEPS = 5_000_000  # a checkpoint of a thousand layers with its optimizer takes some 300 thousand
_MOST_PARTS = 2_000_000
_MOST_DEPTH = 64
# Larger whole numbers can be chosen such that all have the same hash, and a dictionary of them takes for ever.
_LARGEST_KEY = 2**60

# Opcodes that push their argument, and what others push; the names are those of `pickletools`.
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(UserError):
    """The file asks for something that no weight file needs."""


class Source:
    """A part of a binary file to read from; what lies behind ``size`` bytes does not exist."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self.left = size
        self._spare = 2 * size + 2**20

    def read(self, count: int = -1) -> bytes:
        # More than there is must not even be asked for: a file object reserves the memory first.
        data = self._file.read(self.left if count < 0 else min(count, self.left))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(self.left)
        self.left -= len(data)
        return data

    def spend(self, count: int) -> None:
        """Account for ``count`` bytes or items that are made of something read once.

        Raises:
            Refused: More is made than an honest file of this size holds: the same part is copied again and again.
        """
        self._spare -= count
        if self._spare < 0:
            raise Refused("it unfolds into far more than its own size")


class Inner:
    """Marks what serves to read a pickle and cannot stand in what was read."""


class Draft(Inner):
    """What a call has begun and the setting of its state completes, such as an array that has no content yet."""

    def __init__(self, complete: Callable[[Any], Any]):
        self.complete = complete
        self.memo_keys: list[int] = []


def load_plain(source: Source, names: Mapping[str, Any], stored: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle. What comes back has still to pass `check_parts`.

    Args:
        source: From where; it is left behind the pickle's end.
        names: What may be named, as "module.name": functions that may be called, and plain values.
        stored: Gives the object for a persistent id; None where there must not be any.

    Raises:
        Refused: The pickle names something else, or unfolds into more than it may.
        Exception: Any other kind, for a pickle that is damaged.
    """
    return _Machine(source, names, stored).run()


class _Machine:
    def __init__(self, source: Source, names: Mapping[str, Any], stored: Callable[[Any], Any] | None):
        self._source, self._names, self._stored = source, names, stored
        self._stack: list = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(self._source)):
            if steps > _MOST_STEPS:
                raise Refused(f"it takes more than {_MOST_STEPS} steps to unpickle")
            name = opcode.name
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                self._stack.append(tuple(self._pop_many(_TUPLES[name])))
            else:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise Refused(f"its pickle uses {name}, which no weight file needs")
                step(argument)
        return self._pop()

    def _pop(self) -> Any:
        # Not below the last mark: damaged files would otherwise mix up what is whose.
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("the pickle takes from an empty stack")
        return self._stack.pop()

    def _pop_many(self, count: int) -> list:
        return [self._pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list:
        if not self._marks:
            raise ValueError("the pickle has no mark")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self, kind: type | tuple[type, ...]) -> Any:
        value = self._pop()
        self._stack.append(value)
        if not isinstance(value, kind):
            raise ValueError("the pickle adds to something that is no container")
        return value

    # What does nothing here, or moves things about.

    def _proto(self, version: int) -> None:
        pass

    def _frame(self, size: int) -> None:
        pass

    def _stop(self, _: None) -> None:
        pass

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _pop_mark(self, _: None) -> None:
        self._pop_to_mark()

    def _dup(self, _: None) -> None:
        self._stack.append(self._top(object))

    def _put(self, key: int) -> None:
        value = self._top(object)
        self._memo[key] = value
        if isinstance(value, Draft):
            value.memo_keys.append(key)

    def _memoize(self, _: None) -> None:
        self._put(len(self._memo))

    def _get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    # Containers.

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _list(self, _: None) -> None:
        self._stack.append(self._pop_to_mark())

    def _dict(self, _: None) -> None:
        self._stack.append(_filled({}, self._pop_to_mark()))

    def _frozenset(self, _: None) -> None:
        self._stack.append(frozenset(_key(item) for item in self._pop_to_mark()))

    def _append(self, _: None) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _appends(self, _: None) -> None:
        items = self._pop_to_mark()
        self._top(list).extend(items)

    def _setitem(self, _: None) -> None:
        pair = self._pop_many(2)
        _filled(self._top(dict), pair)

    def _setitems(self, _: None) -> None:
        pairs = self._pop_to_mark()
        _filled(self._top(dict), pairs)

    def _additems(self, _: None) -> None:
        items = self._pop_to_mark()
        self._top(set).update(_key(item) for item in items)

    # Names, and what is done with them.

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._named(module, name)

    def _stack_global(self, _: None) -> None:
        module, name = self._pop_many(2)
        self._named(module, name)

    def _inst(self, argument: str) -> None:
        self._global(argument)
        raise Refused("its pickle makes objects of classes of Python 2")

    def _named(self, module: str, name: str) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("the pickle names something by what is no text")
        for old, new in _RENAMED:
            if module == old or module.startswith(f"{old}."):
                module = new + module[len(old) :]
        full = f"{module}.{name}"
        if full not in self._names:
            raise Refused(f"it asks for {full!r:.200}, which no weight file needs; nothing was called")
        self._stack.append(self._names[full])

    def _reduce(self, _: None) -> None:
        function, arguments = self._pop_many(2)
        # Functions come from the table alone: nothing else on the stack can be called.
        if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls something that is no function")
        self._stack.append(function(self._source, *arguments))

    _newobj = _reduce  # a class and the arguments of its __new__

    def _build(self, state: None) -> None:
        value, state = self._pop_many(2)
        if isinstance(value, Draft):
            value, draft = value.complete(state), value
            self._memo.update(dict.fromkeys(draft.memo_keys, value))
        elif isinstance(value, OrderedDict) and isinstance(state, dict):
            if isinstance(state.get("_metadata"), dict):  # versions of the modules, as torch keeps them
                value._metadata = state["_metadata"]
        else:
            raise Refused(f"it sets the state of a {type(value).__name__}")
        self._stack.append(value)

    def _binpersid(self, _: None) -> None:
        if self._stored is None:
            raise ValueError("the pickle refers to something outside")
        self._stack.append(self._stored(self._pop()))


# Names of Python 2 and of NumPy from version 2 on.
_RENAMED = (("__builtin__", "builtins"), ("copy_reg", "copyreg"), ("numpy._core", "numpy.core"))


def _key(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes) or (isinstance(value, int) and abs(value) < _LARGEST_KEY):
        return value
    raise ValueError(f"a {type(value).__name__} stands where a key is expected")


def _filled(target: dict, pairs: list) -> dict:
    if len(pairs) % 2:
        raise ValueError("a key of the pickle has no value")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        target[_key(key)] = value
    return target


def check_parts(value: Any) -> None:
    """Make sure that whoever walks through ``value`` meets finished parts only and comes to an end.

    The same list may stand in a pickle's result many times, or in itself.

    Raises:
        Refused: It does not end within bounds.
        ValueError: A part is not finished.
    """
    level, count = [value], 0
    for _ in range(_MOST_DEPTH):
        containers = [parts for parts in map(_parts, level) if parts]
        count += sum(map(len, containers))
        if count > _MOST_PARTS:
            break
        level = [part for parts in containers for part in parts]
        if not level:
            return
    raise Refused("its containers hold each other without end, or far too often")


def _parts(value: Any) -> Collection:
    if isinstance(value, Inner | FunctionType):
        raise ValueError("the pickle leaves something unfinished")
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple | set | frozenset) else ()
