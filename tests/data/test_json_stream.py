import itertools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_d2.data import json_stream
from fpn_d2.data.json_stream import JsonError, read_records, records_of, write_records

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "a.json"


@pytest.fixture(params=[1, 7, 1 << 20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", request.param)


def assembled(records):
    content = {}
    for key, index, value in records:
        if index is None:
            content[key] = value
        else:
            assert index == len(content[key])
            content[key] = [*content[key], value]
    return content


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.text(max_size=8), _values, max_size=4), indent=st.sampled_from([None, 1]))
def test_the_same_as_json_load_whatever_the_chunks(path, size, content, indent):
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    try:
        expected = json.loads(path.read_bytes())
    except UnicodeDecodeError:  # half of a surrogate pair
        with pytest.raises(JsonError, match="not text in utf-8"):
            list(read_records(path))
        return
    before, json_stream._CHUNK = json_stream._CHUNK, size
    try:
        assert repr(assembled(read_records(path))) == repr(expected)
    finally:
        json_stream._CHUNK = before
    write_records(records_of(expected), path)
    assert repr(json.loads(path.read_text())) == repr(expected)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_encodings(path, encoding):
    path.write_text('{"a": ["ä", 1]}', encoding=encoding)
    assert assembled(read_records(path)) == {"a": ["ä", 1]}
    assert json_stream.has_byte_order_mark(path) == (encoding in ("utf-8-sig", "utf-16", "utf-32"))


SOUND = '{"a": [1, {"b": "c"}, -Infinity, "\\u00e4"], "d": 12.5, "e": true}'


def test_cut_anywhere(path, chunk):
    for length in range(len(SOUND)):
        path.write_text(SOUND[:length])
        with pytest.raises(JsonError) as caught:
            list(read_records(path))
        assert caught.value.kind == ("json_invalid" if length else "json_empty")


def test_one_wrong_character_is_wrong_for_both(path, chunk):
    for place, character in itertools.product(range(len(SOUND)), '"]},\\'):
        text = SOUND[:place] + character + SOUND[place + 1 :]
        path.write_text(text)
        try:
            expected = json.loads(text)
        except json.JSONDecodeError:
            expected = None
        try:
            found = assembled(read_records(path))
        except JsonError:
            found = None
        assert found == expected, text


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("  \n", "json_empty", "nothing but blanks"),
        ("[1]", "not_coco", "expected an object"),
        ('{"a": 1} 2', "json_invalid", r"more after the end \(character 9\)"),
        ('{"a": 1, "a": 2}', "json_invalid", "key 'a' stands in it twice"),
        ('{"a": ' + "[" * 100_000, "json_too_deep", "nested deeper"),
        ('{"a": [' + '{"b":' * 100_000, "json_too_deep", "nested deeper"),
        ("{'images'", "json_invalid", r"expecting value \(character 1\)"),
        ('{1: 2}', "json_invalid", "expected a name in quotes"),
        ('{"a": [1 2]}', "json_invalid", r"expected ',' or ']' \(character 9\)"),
    ],
)
def test_what_is_wrong_is_said(path, chunk, text, kind, message):
    path.write_text(text)
    with pytest.raises(JsonError, match=message) as caught:
        list(read_records(path))
    assert caught.value.kind == kind


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads numbers of any length")
def test_number_of_too_many_digits(path):
    path.write_text('{"a": [' + "9" * 5000 + "]}")
    with pytest.raises(JsonError, match="integer string conversion"):
        list(read_records(path))


def test_no_text(path):
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(JsonError, match="not text in utf-8"):
        list(read_records(path))


def test_memory_is_that_of_a_record(tmp_path, monkeypatch):
    import tracemalloc

    with open(tmp_path / "long.json", "w") as file:
        file.write('{"a": [')
        file.writelines(f'{{"id": {i}, "bbox": [1, 2, 3, 4]}},' for i in range(20_000))
        file.write("{}]}")
    monkeypatch.setattr(json_stream, "_CHUNK", 1 << 12)
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "long.json")) == 20_002
    assert tracemalloc.get_traced_memory()[1] < 200_000  # the file has 700 KB, its content as one object 9 MB
    tracemalloc.stop()


def test_a_copy_that_cannot_be_finished_leaves_nothing(tmp_path):
    def records():
        yield "a", None, []
        raise JsonError("json_invalid", "it ends here")

    with pytest.raises(JsonError):
        write_records(records(), tmp_path / "out" / "a.json")
    assert not list((tmp_path / "out").iterdir())
