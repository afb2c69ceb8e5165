"""Tables that a program writes into a document, between two marks."""

import os
from pathlib import Path

from fpn_d2.files import write_atomically


def write_between(document: str | os.PathLike, begin: str, end: str, text: str) -> None:
    """Put ``text`` in place of what stands between the two marks; all else stays.

    Raises:
        ValueError: the document has not each mark once, in this order.
    """
    before, found_begin, rest = Path(document).read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in rest or end in before + after:
        raise ValueError(f"{document} has not the marks {begin.strip()} and {end.strip()}, once each and in this order")
    write_atomically(str(document), f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
