"""Weight files of every kind come back as they were written."""

import argparse
import io
import os
import pickle
import random
import struct
import sys
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from fpn_d2.checkpoint.reading import read_checkpoint, read_weights, write_checkpoint
from fpn_d2.errors import UserError

ZIPPED = {"zip": True, "legacy": False}


def _save(value, path, form="zip"):
    torch.save(value, path, _use_new_zipfile_serialization=ZIPPED[form])
    return str(path)


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and a.tolist() == b.tolist()
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _everything(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(0.1))
    model[2](model[:2](torch.rand(2, 3, 5, 5)).mean((2, 3))).sum().backward()
    optimizer.step()
    base = torch.arange(24.0)
    dtypes = ("float16", "bfloat16", "float64", "int8", "uint8", "int64", "bool", "complex64")
    dtypes += ("uint16", "float8_e5m2") if form == "zip" else ()  # torch cannot read its older format of them
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"milestones": Counter([3, 5, 5]), "last_epoch": 7, "more": defaultdict(list, {"a": [1]})},
        "dtypes": {name: torch.ones(3).to(getattr(torch, name)) for name in dtypes if hasattr(torch, name)},
        "views": [base.view(4, 6).t(), base[5:9], base[0], torch.zeros(0, 3), torch.ones(1).expand(7)],
        "parameter": nn.Parameter(torch.ones(2)).detach(),
        "random": (np.random.RandomState(1).get_state(), random.Random(1).getstate(), torch.get_rng_state()),
        "arrays": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 2)), np.array(3), np.ones(3, ">i4")],
        "numbers": [np.float32(0.1), np.int64(-3), np.bool_(True), 2**70, -1.5, 1 + 2j, True, None],
        "text": ["ä", b"\x00\xff", b"", {"a", "b"}, frozenset({1})],
        "torch": [torch.Size([2]), torch.float16, torch.device("cpu")],
        "names": OrderedDict([("a", 1)]),
    }  # fmt: skip


@pytest.mark.parametrize("form", ZIPPED)
def test_what_torch_saves_comes_back_as_torch_loads_it(tmp_path, form):
    path = _save(_everything(form), tmp_path / "w.pth", form)
    expected = torch.load(path, weights_only=False)
    expected["arrays"][3] = expected["arrays"][3].astype("=i4")
    loaded = read_checkpoint(path)
    for key, value in expected.items():
        assert _same(value, loaded[key]), key
    assert loaded["model"]._metadata == expected["model"]._metadata
    # Views of the same memory still are.
    loaded["views"][1][0] = -1
    assert loaded["views"][0].t().flatten()[5] == -1


def _torch_stores_without_check_sums():
    return hasattr(torch.serialization, "set_crc32_options")


@pytest.mark.skipif(not _torch_stores_without_check_sums(), reason="since torch 2.6")
def test_a_file_without_check_sums_is_read_too(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = _save({"a": torch.arange(5.0)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_checkpoint(path)["model"]["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_file_of_the_model_zoo_comes_back(tmp_path, protocol, numpy_1):
    arrays = {"a.weight": np.random.rand(2, 3).astype("f4"), "b": np.zeros(0), "c": np.asfortranarray(np.eye(3))[:, :2]}
    content = pickle.dumps({"model": arrays, "__author__": "somebody", "iteration": np.int64(3)}, protocol)
    if numpy_1 and protocol < 4:  # later protocols write the length before the name
        content = content.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "w.pkl").write_bytes(content)
    loaded = read_checkpoint(str(tmp_path / "w.pkl"))
    assert {k: v.tolist() for k, v in loaded["model"].items()} == {k: v.tolist() for k, v in arrays.items()}
    assert (loaded["__author__"], loaded["iteration"], "matching_heuristics" in loaded) == ("somebody", 3, False)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickled_dictionary_of_tensors_comes_back(tmp_path, protocol):
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": nn.Parameter(torch.ones(2))}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "me"}, protocol))
    loaded = read_checkpoint(str(tmp_path / "w.pkl"))["model"]
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_a_file_of_detectron_written_by_python_2_comes_back(tmp_path):
    """Text is bytes in Python 2, and the array's content is text."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    content = np.array([1.5, -2.0], "<f4").tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R(K\x03" + text(b"<") + b"NNNM\xff\xffM\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR(K\x01K\x02\x85"
    array += dtype + b"\x89" + text(content) + b"tb"
    blobs = b"}(" + text(b"conv1_w") + array + text(b"conv1_w_momentum") + b"Nu"
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}(" + text(b"blobs") + blobs + text(b"cfg") + text(b"A: \xe4") + b"u.")
    loaded = read_checkpoint(str(tmp_path / "w.pkl"))
    assert (loaded["__author__"], loaded["matching_heuristics"]) == ("Caffe2", True)
    assert {name: value.tolist() for name, value in loaded["model"].items()} == {"conv1_w": [1.5, -2.0]}
    # And its keys as bytes, as Python 3 may have written them since.
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({b"conv1_w": np.ones(1), b"fc_momentum": None}))
    assert list(read_checkpoint(str(tmp_path / "b.pkl"))["model"]) == ["conv1_w"]


def test_a_file_of_pycls_comes_back(tmp_path):
    state = {"stem.weight": torch.ones(1), "stem.num_batches_tracked": torch.tensor(3)}
    loaded = read_checkpoint(_save({"model_state": state}, tmp_path / "w.pyth"))
    assert (list(loaded["model"]), loaded["__author__"]) == (["stem.weight"], "pycls")
    with pytest.raises(UserError, match="model_state"):
        read_checkpoint(_save({"a": torch.ones(1)}, tmp_path / "v.pyth"))


def test_the_command_line_beside_torchvisions_weights_becomes_a_dictionary(tmp_path):
    path = _save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert read_weights(path)["args"] == {"lr": 0.1}


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_are_written_and_read_again(tmp_path, ending):
    pytest.importorskip("safetensors")
    base = torch.arange(6.0)
    weights = {"a": base.view(2, 3).t(), "b": base[:2], "c": torch.tensor(1, dtype=torch.int64), "d": torch.zeros(0)}
    path = str(tmp_path / f"w{ending}")
    for more in ({}, {"__author__": "Caffe2", "matching_heuristics": True}):
        write_checkpoint({"model": weights, "optimizer": {}, **more}, path)
        loaded = read_checkpoint(path)
        assert all(torch.equal(loaded["model"][name], value) for name, value in weights.items())
        del loaded["model"]
        assert loaded == more
    assert os.listdir(tmp_path) == [f"w{ending}"]
    with pytest.raises(UserError, match="ends in .pth.* or .safetensors"):
        write_checkpoint({"model": weights}, str(tmp_path / "w.txt"))


def test_a_file_is_told_by_its_content(tmp_path):
    pytest.importorskip("safetensors")
    write_checkpoint({"model": {"a": torch.ones(1)}}, str(tmp_path / "w.safetensors"))
    os.rename(tmp_path / "w.safetensors", tmp_path / "w.pth")
    assert read_checkpoint(str(tmp_path / "w.pth"))["model"]["a"] == 1
    content = io.BytesIO()
    torch.save({"a": torch.ones(1)}, content)
    (tmp_path / "w.pkl").write_bytes(content.getvalue())
    assert read_checkpoint(str(tmp_path / "w.pkl"))["model"]["a"] == 1


HEADERS = [b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"{", b'{"a":1}', b"[]"]


@pytest.mark.parametrize("header", HEADERS)
def test_a_damaged_safetensors_file_is_named(tmp_path, header):
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="w.safetensors .*cannot be read as weights"):
        read_checkpoint(str(tmp_path / "w.safetensors"))


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        write_checkpoint({"model": {"a": torch.ones(1)}}, str(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").write_bytes(bytes(20))
    with pytest.raises(UserError, match="pip install safetensors"):
        read_checkpoint(str(tmp_path / "w.safetensors"))
