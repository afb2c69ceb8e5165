import pytest

from fpn_d2.errors import UserError
from fpn_d2.files import locate, writable_folder, write_atomically


def test_relative_to_current_directory_first_then_detectron2s_root(tmp_path, monkeypatch):
    here, root = tmp_path / "here", tmp_path / "root"
    for place in (here, root):
        place.mkdir()
        (place / "both.json").write_text("")
    (root / "only.json").write_text("")
    monkeypatch.chdir(here)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    assert locate("both.json", "it") == here / "both.json"
    assert locate("only.json", "it") == root / "only.json"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    (here / "datasets").mkdir()
    (here / "datasets" / "default.json").write_text("")
    assert locate("default.json", "it") == here / "datasets" / "default.json"


def test_missing_file_tells_all_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "root"))
    with pytest.raises(UserError) as caught:
        locate("x/set.json", "the annotations of data set 'cells'")
    message = str(caught.value)
    assert "no file for the annotations of data set 'cells'" in message
    assert str(tmp_path / "x" / "set.json") in message and str(tmp_path / "root" / "x" / "set.json") in message


def test_close_name_of_the_same_kind_is_offered(tmp_path):
    (tmp_path / "instances_train.json").write_text("")
    (tmp_path / "instances_trains.json").mkdir()
    with pytest.raises(UserError, match=r"Did you mean .*/instances_train\.json\?"):
        locate(tmp_path / "instance_train.json", "it")
    with pytest.raises(UserError, match=r"Did you mean .*/instances_trains\.json\?"):
        locate(tmp_path / "instance_train.json", "it", folder=True)


def test_close_name_of_a_folder_on_the_way_is_offered(tmp_path):
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match=r"Did you mean .*/annotations\?"):
        locate(tmp_path / "anotations" / "set.json", "it")


def test_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder for it"):
        locate(tmp_path / "file", "it", folder=True)


@pytest.mark.parametrize("value", ["", None, 3])
def test_what_is_no_path(value):
    with pytest.raises(UserError, match="Expected the path of it as text"):
        locate(value, "it")


def test_mistyped_name_beside_links_in_a_circle(tmp_path):
    (tmp_path / "set.json").write_text("")
    (tmp_path / "sett.json").symlink_to("sett.json")
    with pytest.raises(UserError, match=r"Did you mean .*/set\.json"):
        locate(tmp_path / "stt.json", "it")
    with pytest.raises(UserError, match="There is no folder"):
        locate(tmp_path / "sett.json", "it", folder=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    assert writable_folder(str(tmp_path / "new" / "folder")) == tmp_path / "new" / "folder"
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            writable_folder(str(path))


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/there: Is a directory"):
        write_atomically(str(tmp_path / "there"), "text")
    with pytest.raises(UserError, match="cannot write .*/nowhere/file: No such file or directory"):
        write_atomically(str(tmp_path / "nowhere" / "file"), "text")
