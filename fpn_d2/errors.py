"""Mistakes of the user: one exception for them, the words for them, and the way out of a program that meets one."""

import contextlib
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

MISTAKE = 2  # exit status of a program that a mistake of the user has ended


class UserError(ValueError):
    """Something that the user asked for cannot be: its text is one sentence that says what to do instead.

    It is raised where the mistake is found. It alone becomes one line on a terminal; any other error is taken for a
    fault of a program, and keeps its traceback.
    """


def did_you_mean(name: str, candidates: Iterable[str], most: int = 3) -> str:
    """Phrase that names the candidates nearest to ``name``: " (did you mean X or Y?)", or "" where none is near.

    Letters count without their case, and for dotted names the last part counts by itself too, so that a key in the
    wrong section is found.
    """

    def likeness(candidate: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

        whole = ratio(name, candidate)
        if "." not in name and "." not in candidate:
            return whole
        tail = ratio(name.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1])
        return max(whole, 0.5 * (whole + tail))

    scored = sorted(((likeness(c), c) for c in set(candidates)), key=lambda pair: (-pair[0], pair[1]))
    near = [c for score, c in scored[:most] if score >= max(0.65, scored[0][0] - 0.1)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def not_found(path: str) -> str:
    """Phrase for a file or folder that is not there: where it was looked for, and what lies near that name."""
    full = os.path.abspath(os.path.expanduser(path))
    folder = os.path.dirname(full)
    if os.path.isdir(folder):
        hint = did_you_mean(os.path.basename(full), os.listdir(folder))
        return f"looked for {full}{hint}"
    while folder and not os.path.isdir(folder):
        full, folder = folder, os.path.dirname(folder)
    hint = did_you_mean(os.path.basename(full), os.listdir(folder))
    return f"looked for {os.path.abspath(os.path.expanduser(path))}, but {folder} has no {os.path.basename(full)}{hint}"


def shown(text: object, most: int = 80) -> str:
    """What a user's file says, fit for a terminal and a log: no control characters, and at most ``most`` characters.

    Text comes as it is, anything else as Python writes it. Characters that cannot be printed (escape sequences, line
    breaks, marks that turn the direction of writing, halves of surrogate pairs) become ``\\x1b``, ``\\u202e``; of a
    long text the start and the end are left.
    """
    if not isinstance(text, str):
        try:
            text = repr(text)
        except (ValueError, RecursionError):  # a whole number of thousands of digits, a list of lists of lists ...
            text = f"a {type(text).__name__}"
    whole = _printable(text) if len(text) <= most else ""
    if whole and len(whole) <= most or not text:
        return whole
    left_out = f"... ({len(text)} characters) ..."
    end = max(1, (most - len(left_out)) // 3)
    start = max(1, most - len(left_out) - end)
    return _printable(text[:start])[:start] + left_out + _printable(text[-end:])[-end:]


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_value(value: object, most: int = 80) -> str:
    """As `shown`, with quotes round text, so that '1' and 1 are told apart."""
    return f"'{shown(value, most)}'" if isinstance(value, str) else shown(value, most)


def one_line(error: BaseException) -> str:
    """What an error says, in one line that a terminal can be given; out of a loader's worker without its traceback."""
    text = str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return shown(" ".join(text.split()), 4000)


@contextlib.contextmanager
def user_mistakes_end_the_program(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within this context a `UserError` ends the program with one line on stderr and exit status `MISTAKE`.

    Args:
        say: Shows the line; by default it is printed on stderr.
    """
    try:
        yield
    except UserError as error:
        sys.exit(tell(error, say))


def tell(error: UserError, say: Callable[[str], None] | None = None) -> int:
    """Show a mistake of the user in one line, on stderr or by ``say``; returns the exit status that belongs to it.

    The log file, where there is one by then, has the traceback too.
    """
    logging.getLogger("fpn_d2.traceback").debug("".join(traceback.format_exception(error)))
    line = f"error: {one_line(error)}"
    say(line) if say else print(line, file=sys.stderr, flush=True)
    return MISTAKE
