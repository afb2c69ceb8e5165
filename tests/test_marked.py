"""Tables between marks: what stands around them stays, and a document without the marks is left as it is."""

import pytest

from tests.marked import write_between


def test_what_stands_around_stays(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("one\n<b>\nold\n<e>\ntwo\n")
    for text in ("new", "newer\n"):
        write_between(document, "<b>", "<e>", text)
    assert document.read_text() == "one\n<b>\n\nnewer\n\n<e>\ntwo\n"


@pytest.mark.parametrize("content", ["", "<b>", "<e>", "<e><b>", "<b><b><e>", "<b><e><e>"])
def test_marks_once_and_in_order(tmp_path, content):
    document = tmp_path / "a.md"
    document.write_text(content)
    with pytest.raises(ValueError, match="<b> and <e>, once each and in this order"):
        write_between(document, "<b>", "<e>", "new")
    assert document.read_text() == content
