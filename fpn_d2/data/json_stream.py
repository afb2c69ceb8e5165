"""Reads a large json record by record: memory for one record at a time, whatever the size of the file."""

import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fpn_d2.files import UNFINISHED, writing

_CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
# The longest word of json that may be cut at the end of a chunk, "-Infinity" or "\ud800\udc00", and some more.
_MARGIN = 16
_MORE = object()


class JsonError(ValueError):
    """What is wrong with the text of a json file; ``kind`` is one of those of ``defects.KINDS``."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def read_records(path: Path) -> Iterator[tuple[str, int | None, Any]]:
    """The entries of a json file that holds one object.

    Args:
        path: A text file in UTF-8, 16 or 32, with a byte order mark or without.

    Yields:
        (key, index, value) for each entry of a list, (key, None, value) for other values. A list by itself comes
        first as (key, None, []), so that an empty one is seen too.

    Raises:
        JsonError: The file is empty, no json, or nested deeper than Python reads.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise JsonError("json_empty", "the file is empty")
        file.seek(0)
        encoding = json.detect_encoding(start)
        text = io.TextIOWrapper(file, encoding=encoding)
        try:
            yield from _Reader(text).top()
        except UnicodeDecodeError as error:
            raise JsonError("json_invalid", f"it is not text in {encoding}: {error.reason}") from error
        except RecursionError as error:
            raise JsonError("json_too_deep", "it is nested deeper than any annotation is") from error


def has_byte_order_mark(path: str | os.PathLike) -> bool:
    """Whether the file starts with a mark that pycocotools stumbles over."""
    with open(path, "rb") as file:
        return file.read(4).startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))


def records_of(content: dict) -> Iterator[tuple[str, int | None, Any]]:
    """The entries of what has been read already, as `read_records` gives those of a file."""
    for key, value in content.items():
        if isinstance(value, list):
            yield key, None, []
            yield from ((key, index, entry) for index, entry in enumerate(value))
        else:
            yield key, None, value


def write_records(records: Iterable[tuple[str, int | None, Any]], path: Path) -> None:
    """Write a json file from records as `read_records` gives them; it appears whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=UNFINISHED)
    try:
        with writing(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            _write_records(file, records)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _write_records(file: io.TextIOBase, records: Iterable[tuple[str, int | None, Any]]) -> None:
    encode = json.JSONEncoder(allow_nan=True).encode
    start, before, open_list = "{", "", False
    for key, index, value in records:
        if index is None:
            file.write(f"{']' if open_list else ''}{start}{encode(key)}: ")
            open_list = isinstance(value, list)
            file.write("[" if open_list else encode(value))
            start, before = ",\n", ""
        else:
            file.write(f"{before}\n{encode(value)}")
            before = ","
    file.write(f"{']' if open_list else ''}{'{' if start == '{' else ''}}}\n")


class _Reader:
    """A window on the text that moves forward with what is read."""

    def __init__(self, text: io.TextIOBase):
        self._text = text
        self._window = ""
        self._place = 0  # of the next character, in the window
        self._before = 0  # characters that the window has left behind
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode

    def top(self) -> Iterator[tuple[str, int | None, Any]]:
        first = self._next()
        if not first:
            raise JsonError("json_empty", "the file holds nothing but blanks")
        if first != "{":
            raise JsonError("not_coco", "expected an object with images, annotations and categories at its top")
        self._place += 1
        seen = set()
        if self._next() == "}":
            self._place += 1
        else:
            while True:
                key = self._value()
                if not isinstance(key, str):
                    raise self._invalid("expected a name in quotes")
                if key in seen:
                    raise JsonError("json_invalid", f"the key {key[:40]!r} stands in it twice")
                seen.add(key)
                if self._next() != ":":
                    raise self._invalid("expected ':'")
                self._place += 1
                if self._next() == "[":
                    yield key, None, []
                    yield from self._list(key)
                else:
                    yield key, None, self._value()
                if self._after("}"):
                    break
        if self._next():
            raise self._invalid("there is more after the end")

    def _list(self, key: str) -> Iterator[tuple[str, int, Any]]:
        self._place += 1
        if self._next() == "]":
            self._place += 1
            return
        index = 0
        while True:
            yield key, index, self._value()
            index += 1
            if self._after("]"):
                return

    def _after(self, end: str) -> bool:
        """Pass the comma, or ``end``; whether it was the end."""
        found = self._next()
        if found not in (",", end) or not found:
            raise self._invalid(f"expected ',' or '{end}'")
        self._place += 1
        return found == end

    def _next(self) -> str:
        """The next character that is not blank; it stays. "" at the end."""
        while True:
            self._place = _SPACE.match(self._window, self._place).end()
            if self._place < len(self._window):
                return self._window[self._place]
            if not self._grow():
                return ""

    def _value(self) -> Any:
        self._next()
        while True:
            value = self._try()
            if value is not _MORE:
                return value
            self._grow()

    def _try(self) -> Any:
        try:
            value, end = self._decode(self._window, self._place)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(self._window) - _MARGIN or error.msg.startswith("Unterminated string")
            if cut and not self._ended:
                return _MORE
            self._place = error.pos
            raise self._invalid(error.msg[0].lower() + error.msg[1:]) from None
        except ValueError as error:  # a whole number of more digits than Python turns into one
            raise self._invalid(str(error).split(";")[0]) from None
        if type(value) in (int, float) and end > len(self._window) - _MARGIN and not self._ended:
            return _MORE  # it may go on behind the end of the window, as 1.5 behind "1" or "1."
        self._place = end
        return value

    def _grow(self) -> bool:
        """Read on, as much again as is there, so that a long record is not tried too often; whether there was more."""
        if self._ended:
            return False
        more = self._text.read(max(_CHUNK, len(self._window) - self._place))
        self._before += self._place
        self._window = self._window[self._place :] + more
        self._place = 0
        self._ended = not more
        return bool(more)

    def _invalid(self, what: str) -> JsonError:
        return JsonError("json_invalid", f"it is not valid json: {what} (character {self._before + self._place})")
