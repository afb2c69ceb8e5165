"""Weight files made to run something or to exhaust the machine: nothing happens, and the refusal says why."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fpn_d2.checkpoint.reading import read_checkpoint
from fpn_d2.errors import UserError

ZIPPED = {"zip": True, "legacy": False}


def _save(value, path, form="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=ZIPPED[form])
    return str(path)


class _Runs:
    """Unpickled, it calls ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


class _Instance:
    pass


def _in_each_form(tmp_path, value):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a": value}, "__author__": "x"}))
    yield str(tmp_path / "w.pkl")
    for form in ZIPPED:
        for name in ("w.pth", "w.pt", "w.pyth", "w.bin"):
            yield _save({"model": {"a": value}}, tmp_path / name, form)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: _Runs(os.mkdir, path), f"{os.mkdir.__module__}.mkdir"),
        (lambda path: _Runs(eval, f"__import__('os').mkdir({path!r})"), "builtins.eval"),
        (lambda path: _Runs(torch.load, path), "torch.serialization.load"),
        (lambda path: _Runs(np.load, path, None, True), "numpy.load"),
        (lambda path: _Runs(getattr, "a", "upper"), "builtins.getattr"),
        (lambda path: _Instance(), "test_hostile_weights._Instance"),
        (lambda path: np.array([None], object), "'O8'"),
        (lambda path: np.zeros(2, [("a", "f4")]), "'V4'"),
    ],
)
def test_a_file_that_would_run_something_runs_nothing_and_says_what(tmp_path, make, name):
    target = tmp_path / "made"
    for path in _in_each_form(tmp_path, make(str(target))):
        with pytest.raises(UserError, match=f"(?s){os.path.basename(path)}.*{name}.*If you trust"):
            read_checkpoint(path)
        assert not target.exists()
    # The same file does run where it is unpickled, or this shows nothing.
    if name == f"{os.mkdir.__module__}.mkdir":
        torch.load(path, weights_only=False)
        assert target.exists()


def _pickle(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _number(value):
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


_DOUBLED = b"".join(b"]" + b"h" + bytes([i]) + b"a" + b"h" + bytes([i]) + b"aq" + bytes([i + 1]) for i in range(60))
_BIG = b"X" + struct.pack("<i", 100_000) + b"a" * 100_000
BOMBS = {
    "a call that reserves memory": _pickle(_global("__builtin__", "bytearray"), _number(10**13), b"\x85R"),
    "a tensor class that reserves memory": _pickle(_global("torch", "FloatTensor"), _number(10**13), b"\x85R"),
    "a place of the memo far away": _pickle(b"]r\xff\xff\xff\x7f"),
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "a number that is not there": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
    "lists in lists": _pickle(b"]" * 100_000, b"a" * 99_999),
    "a list in itself": _pickle(b"]q\x00h\x00a"),
    "a dictionary in itself": _pickle(b"}q\x00U\x01ah\x00s"),
    "lists that double": _pickle(b"]q\x00", _DOUBLED),
    "a copy of a copy": _pickle(_BIG, b"q\x000", (_global("_codecs", "encode") + b"h\x00\x85R0") * 100, b"]"),
    "copies of a dictionary": _pickle(
        b"](", b"](U\x01aNe" * 3000, b"eq\x000", (_global("collections", "OrderedDict") + b"h\x00\x85R0") * 3000, b"]"
    ),
    "keys of the same hash": _pickle(b"}", b"".join(_number(i * (2**61 - 1)) + b"Ns" for i in range(1, 200))),
    "a state for a container": _pickle(b"]}U\x08__dict__Nsb"),
    "a method of an object": _pickle(b"(K\x01lb"),
    "an extension": _pickle(b"\x82\x01"),
    "an object of Python 2": _pickle(b"(ios\nsystem\n"),
    "a name with control characters": _pickle(_global("\x1b[31mos", "\x07" * 2000)),
    "steps without end": b"\x80\x02" + b"N0" * 2_600_000 + b".",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_exhaust_the_machine_is_refused(tmp_path, bomb, bounded_memory):
    path = tmp_path / "w.pkl"
    path.write_bytes(BOMBS[bomb])
    with pytest.raises(UserError, match=f"^{path}") as error:
        read_checkpoint(str(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.fixture
def bounded_memory():
    """Within a test, 2 GiB more than there is now cannot be had."""
    resource = pytest.importorskip("resource")
    pages = int(open("/proc/self/statm").read().split()[0]) if os.path.exists("/proc/self/statm") else None
    if pages is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _changed(path, change):
    """Write a torch file anew with ``change`` applied to the dictionary of its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"size": (2**60,), "stride": (0,)}, "claims the shape"),
        ({"size": (2**31, 2**31), "stride": (0, 0)}, "claims the shape"),
        ({"size": (5,), "stride": (1,)}, "claims the shape"),
        ({"size": (2,), "stride": (4,)}, "claims the shape"),
        ({"size": (1,), "stride": (1,), "offset": 4}, "claims the shape"),
        ({"size": (4,), "stride": (1,), "count": 2**59}, "a block claims"),
        ({"size": (4,), "stride": (1,), "count": 3}, "a block claims"),
        ({"size": (-4,), "stride": (-1,)}, "no shape"),
        ({"size": (2**63,), "stride": (1,)}, "no shape"),
    ],
)
@pytest.mark.parametrize("form", ZIPPED)
def test_a_tensor_larger_than_its_memory_is_refused(tmp_path, sizes, words, form, bounded_memory):
    path = _save({"a": torch.arange(4.0)}, tmp_path / "w.pth", form)
    size, stride = sizes["size"], sizes["stride"]
    rest = b"\x89ccollections\nOrderedDict\n)R"
    key = [b"(U\x07storage", _global("torch", "FloatStorage"), b"U\x010U\x03cpu", _number(sizes.get("count", 4))]
    program = _pickle(
        b"}U\x01a", _global("torch._utils", "_rebuild_tensor_v2"), b"(", *key, b"N" if form == "legacy" else b"", b"tQ",
        _number(sizes.get("offset", 0)), *(b"(" + b"".join(map(_number, part)) + b"t" for part in (size, stride)), rest,
        b"tRs",
    )  # fmt: skip
    if form == "zip":
        _changed(path, lambda members: members.update({"w/data.pkl": program}))
    else:
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        block = struct.pack("<Q4f", sizes.get("count", 4), 0, 1, 2, 3)
        (tmp_path / "w.pth").write_bytes(head + program + pickle.dumps(["0"], 2) + block)
        words = f"{words}|unfolds into|numbers lie behind"
    with pytest.raises(UserError, match=words):
        read_checkpoint(path)


def test_an_array_larger_than_its_bytes_is_refused(tmp_path):
    content = pickle.dumps({"a": np.arange(300, dtype="u1")}, 2)
    shape = pickle.dumps((300,), 2)[2:-1].split(b"q")[0]
    assert shape in content
    for count in (2**60, 299, 301):
        (tmp_path / "w.pkl").write_bytes(content.replace(shape, _number(count) + b"\x85"))
        with pytest.raises(UserError, match="claims the shape"):
            read_checkpoint(str(tmp_path / "w.pkl"))


def test_a_compressed_archive_is_refused_before_it_inflates(tmp_path, bounded_memory):
    path = str(tmp_path / "w.pth")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("w/data.pkl", "w", force_zip64=True) as member:
            for _ in range(256):
                member.write(bytes(2**20))
    assert os.path.getsize(path) < 2**20
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(path)


def test_an_archive_whose_members_overlap_or_repeat_is_refused(tmp_path):
    path = _save({"a": torch.zeros(10_000)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    start = content.rfind(b"PK\x05\x06")
    entries, size, offset = struct.unpack("<HII", content[start + 10 : start + 20])
    directory = content[offset : offset + size]
    # The same members twice, and the same bytes as others.
    for other in (directory, directory.replace(b"w/data/", b"w/dato/")):
        counts = (2 * entries, 2 * entries, 2 * size, offset, 0)
        end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *counts)
        (tmp_path / "w.pth").write_bytes(content[:offset] + directory + other + end)
        with pytest.raises(UserError, match="overlap"):
            read_checkpoint(path)


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path = _save({"a": torch.arange(1000.0)}, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.index(struct.pack("<f", 500.0))] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    assert torch.load(path, weights_only=True)["a"].shape == (1000,)  # torch does not
    with pytest.raises(UserError, match="w.pth .*cannot be read as weights; it may be truncated or damaged.*CRC"):
        read_checkpoint(path)


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), tmp_path / "w.pt")
    with pytest.raises(UserError, match="TorchScript program.*state_dict"):
        read_checkpoint(str(tmp_path / "w.pt"))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", tmp_path):
        with pytest.raises(UserError, match="no file with content"):
            read_checkpoint(str(path))
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    for name in ("loop.pth", "none.pth", "a\0b.pth", "n" * 5000):
        with pytest.raises(UserError, match="cannot be read"):
            read_checkpoint(str(tmp_path / name))


def test_a_file_larger_than_the_memory_is_refused(tmp_path, bounded_memory):
    with open(tmp_path / "w.pth", "wb") as file:
        file.truncate(2**43)  # without content, and so without a place on the disk
    with pytest.raises(UserError, match="8192.0 GiB are more than the memory"):
        read_checkpoint(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"a\x1b[2J": torch.ones(1)}, "control characters"),
        ({"a" * 20_000: torch.ones(1)}, "too long"),
        ({"a": 3}, "a is a int and no tensor"),
        ({"a": np.array(["text"])}, "a is an array of <U4"),
        ({"a": {"b": torch.ones(1)}}, "a is a dict"),
        ([torch.ones(1)], "holds no weights"),
        ({}, "holds no weights"),
    ],
)
def test_what_are_no_weights_is_named(tmp_path, model, words):
    with pytest.raises(UserError, match=f"w.pth.*{words}") as error:
        read_checkpoint(_save({"model": model}, tmp_path / "w.pth"))
    assert str(error.value).isprintable()
    with pytest.raises(UserError, match="holds a list and no dictionary"):
        read_checkpoint(_save([torch.ones(1)], tmp_path / "w.pth"))


def test_versions_of_modules_are_numbers_or_nothing(tmp_path):
    state = nn.BatchNorm2d(2).state_dict()
    state._metadata["other"] = {"version": "2", "more": 1}
    state._metadata["another"] = "x"
    assert dict(read_checkpoint(_save(state, tmp_path / "w.pth"))["model"]._metadata) == {"": {"version": 2}}
