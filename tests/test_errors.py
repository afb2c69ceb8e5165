"""Words for mistakes, and the way out of the program."""

import json

import pytest
from torch.utils.data import DataLoader

from fpn_d2 import cli
from fpn_d2.engine.launch import launch
from fpn_d2.errors import UserError, did_you_mean, not_found, shown, shown_value, user_mistakes_end_the_program


@pytest.mark.parametrize(
    ("name", "candidates", "first"),
    [
        ("NEK", ["NORM", "NECK", "NAME"], "NECK"),
        ("MODEL.NECK", ["MODEL.FPN.NECK", "MODEL.MASK_ON", "SOLVER.NESTEROV"], "MODEL.FPN.NECK"),
        ("model.weights", ["MODEL.WEIGHTS", "MODEL.DEVICE"], "MODEL.WEIGHTS"),
    ],
)
def test_did_you_mean_puts_the_nearest_first(name, candidates, first):
    assert did_you_mean(name, candidates).startswith(f" (did you mean {first}")


@pytest.mark.parametrize("candidates", [[], ["zzzz"]])
def test_did_you_mean_keeps_silent_where_nothing_is_near(candidates):
    assert did_you_mean("NECK", candidates) == ""


def test_not_found_names_the_nearest_file_or_the_missing_folder(tmp_path):
    (tmp_path / "model_final.pth").touch()
    text = not_found(str(tmp_path / "model_finl.pth"))
    assert str(tmp_path / "model_finl.pth") in text
    assert "did you mean model_final.pth" in text
    text = not_found(str(tmp_path / "a" / "b" / "c.json"))
    assert f"{tmp_path} has no a" in text


def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as end, user_mistakes_end_the_program():
        raise UserError("set X\n to 3")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: set X to 3\n"


def test_a_mistake_that_our_code_finds_is_one_line(capsys):
    with pytest.raises(SystemExit), user_mistakes_end_the_program():
        launch(print, 1, num_machines=2, device="cpu")
    assert "--dist-url" in capsys.readouterr().err


def test_any_other_error_of_our_own_code_keeps_its_traceback(monkeypatch):
    with pytest.raises(TypeError), user_mistakes_end_the_program():
        shown("text", most="80")  # a fault in a program, not in what a user asked for
    monkeypatch.setattr("fpn_d2.data.scenes.make_scenes", lambda *_, **__: shown("text", most="80"))
    with pytest.raises(TypeError):
        cli.main(["scenes", "--output", "nowhere"])


def test_an_error_of_another_library_keeps_its_traceback():
    with pytest.raises(json.JSONDecodeError), user_mistakes_end_the_program():  # a ValueError
        json.loads("{")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a plain näme 斑马", "a plain näme 斑马"),
        ("", ""),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("line\nbreak\r\u2028", r"line\nbreak\r\u2028"),
        ("\u202eover", r"\u202eover"),
        ("\ud800", r"\ud800"),
        (None, "None"),
        ([1, float("nan")], "[1, nan]"),
    ],
)
def test_text_of_users_is_made_fit_for_a_terminal(text, expected):
    assert shown(text) == expected and shown(shown(text)) == shown(text)


@pytest.mark.parametrize("character", ["a", "\x1b", "斑", "\U000e0001"])
@pytest.mark.parametrize("most", [40, 80, 200])
def test_long_text_keeps_its_ends(character, most):
    text = shown(f"start{character * 20_000}end", most)
    assert len(text) <= most and text.startswith("start") and text.endswith("end") and "20008 characters" in text
    assert text.isprintable() and shown(text, most) == text


def test_numbers_of_thousands_of_digits_have_no_text():
    assert shown(10**5000) == "a int"


def test_text_and_numbers_are_told_apart():
    assert (shown_value("1"), shown_value(1)) == ("'1'", "1")


def test_errors_reach_the_terminal_in_one_printable_line(capsys):
    with pytest.raises(SystemExit), user_mistakes_end_the_program():
        raise UserError("no file \x1b]0;title\x07 of\n" + "a" * 20_000)
    line = capsys.readouterr().err
    assert line.startswith(r"error: no file \x1b]0;title\x07 of aaa") and len(line) < 4200 and line.count("\n") == 1


def test_an_error_out_of_a_worker_is_its_text_alone(capsys):
    class Failing:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise UserError("the disk is gone")

    with pytest.raises(SystemExit), user_mistakes_end_the_program():
        list(DataLoader(Failing(), num_workers=1))
    assert capsys.readouterr().err == "error: the disk is gone\n"
