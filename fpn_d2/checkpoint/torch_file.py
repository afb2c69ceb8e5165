"""What ``torch.save`` writes, read with `plain_pickle` in place of ``torch.load``.

``torch.load(weights_only=True)`` calls no function of the file's choice either, on a torch whose checks have no known
gap (those of 2.5 and before, and of some later versions, have). But it knows NumPy's numbers only from torch 2.4 on and
by other means in each version, lets a file of 200 bytes reserve any amount of memory, and does not notice flipped bits.

Two formats: a zip archive with a pickle and a member for each storage (torch 1.6 and later), and before that a sequence
of pickles with the storages behind them.
"""

import io
import sys
import zipfile
from typing import Any, BinaryIO

import torch

from .pickled_arrays import TENSOR_NAMES, Storage, StorageKind
from .plain_pickle import Refused, Source, check_parts, load_plain

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_CHUNK = 2**24


def read_zip(file: BinaryIO, size: int) -> Any:
    """Read the zip format from ``file``, which is ``size`` bytes long.

    Raises:
        Refused: It asks for more than tensors, numbers and plain containers, or for more memory than its own size.
        Exception: Any other kind, for a file that is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        main = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(main) != 1:
            raise ValueError("the zip archive is not torch.save's: it has no data.pkl")
        folder = main[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in members:
            raise Refused("it is a TorchScript program and not weights; save its state_dict() instead")
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members.values()):
            raise Refused("its zip archive is compressed or encrypted; torch.save writes neither")
        if len(members) < len(archive.infolist()) or sum(member.file_size for member in members.values()) > size:
            raise Refused("members of its zip archive overlap or have the same name")
        for member in members.values():
            member.CRC = member.CRC or None  # 0 where torch.serialization.set_crc32_options(False) left them out
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder").decode() != sys.byteorder:
            raise Refused(f"it is from a machine whose byte order is not {sys.byteorder}; save it anew on this one")
        storages: dict[str, Storage] = {}

        def stored(key: Any) -> Storage:
            kind, name, count = _storage_key(key)
            if name not in storages:
                member = members[f"{folder}data/{name}"]
                if count * kind.dtype.itemsize != member.file_size:
                    raise Refused(f"a block claims {count} numbers of {kind.dtype}, but has {member.file_size} bytes")
                with archive.open(member) as content:  # which compares the check sum at the end
                    storages[name] = Storage(_filled(content, member.file_size), kind.dtype)
            return Storage(storages[name].data, kind.dtype)

        with archive.open(members[main[0]]) as program:
            value = load_plain(Source(program, members[main[0]].file_size), TENSOR_NAMES, stored)
            program.read()
    check_parts(value)
    return value


def read_legacy(source: Source) -> Any:
    """Read the older format behind its first pickle, the magic number.

    Raises:
        Refused: It asks for more than tensors, numbers and plain containers, or for more memory than its own size.
        Exception: Any other kind, for a file that is damaged.
    """
    value = _read_legacy(source)
    check_parts(value)
    return value


def _read_legacy(source: Source) -> Any:
    if load_plain(source, {}) != _LEGACY_PROTOCOL:
        raise ValueError("a version of torch's older format that does not exist")
    load_plain(source, {})  # what machine it was; blocks are little-endian on each
    storages: dict[str, Storage] = {}

    def stored(key: Any) -> Storage:
        kind, name, count = _storage_key(key[:5])
        width = kind.dtype.itemsize
        if name not in storages:
            source.spend(count * width)  # nothing is behind it yet
            storages[name] = Storage(torch.zeros(count * width, dtype=torch.uint8), kind.dtype)
        whole = storages[name].data
        if len(key) < 6 or key[5] is None:
            return Storage(whole, kind.dtype)
        _, offset, count = key[5]  # a part of the block, counted in its elements
        if not all(type(n) is int and n >= 0 for n in (offset, count)) or (offset + count) * width > len(whole):
            raise Refused("a part of a block is larger than the block")
        return Storage(whole[offset * width : (offset + count) * width], kind.dtype)

    value = load_plain(source, TENSOR_NAMES, stored)
    for name in load_plain(source, {}):
        storage = storages[name]
        count = int.from_bytes(source.read(8), "little")
        if count * storage.dtype.itemsize != len(storage.data):
            raise ValueError("a block has another size than its tensors")
        _fill(storage.data, source)
    return value


def _storage_key(key: Any) -> tuple[StorageKind, str, int]:
    word, kind, name, _, count = key
    if word not in ("storage", b"storage") or not isinstance(kind, StorageKind) or not isinstance(name, str):
        raise Refused(f"it refers to {str(word)[:40]!r} outside its pickle")
    if type(count) is not int or not 0 <= count < 2**60:
        raise Refused("a block claims more numbers than any memory holds")
    return kind, name, count


def _filled(content: BinaryIO, size: int) -> torch.Tensor:
    data = torch.empty(size, dtype=torch.uint8)
    _fill(data, content)
    if content.read(1):
        raise ValueError("a block is longer than it says")
    return data


def _fill(data: torch.Tensor, content: Any) -> None:
    target = memoryview(data.numpy())
    for start in range(0, len(target), _CHUNK):
        part = content.read(min(_CHUNK, len(target) - start))
        target[start : start + len(part)] = part
        if len(part) < min(_CHUNK, len(target) - start):
            raise ValueError("the file ends within a block")


def _load_from_bytes(source: Source, content: bytes) -> Storage:
    """torch.storage._load_from_bytes: a block in a pickle that torch.save did not write."""
    if not isinstance(content, bytes):
        raise ValueError("a block of no bytes")
    source.spend(len(content))
    inner = Source(io.BytesIO(content), len(content))
    if load_plain(inner, {}) != LEGACY_MAGIC:
        raise ValueError("a block that torch did not write")
    block = _read_legacy(inner)
    if not isinstance(block, Storage):
        raise ValueError("a block that is none")
    return block


# In a pickle that torch.save did not write.
PICKLE_NAMES = {**TENSOR_NAMES, "torch.storage._load_from_bytes": _load_from_bytes}
