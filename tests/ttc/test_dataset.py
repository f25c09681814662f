"""Files of problems: every form that is taken, and one clear line for whatever is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import DataError
from openzaya.ttc.dataset import question_of, read_questions

USER = {"role": "user", "content": "What is 17 + 25?"}


def write(path: Path, *lines: object) -> Path:
    file = path / "problems.jsonl"
    file.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines))
    return file


def test_every_form_of_a_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    found = read_questions(
        write(
            tmp_path,
            {"question": "a?", "answer": 42, "id": "first"},
            b"",
            {"problem": "b?", "answer": " 1/2 ", "id": 7, "source": ["anything", None]},
            {"prompt": "c?", "answer": None},
            {"prompt": [system, USER], "answer": 0.5},
            {"messages": [system, USER], "question": "not this one"},
        )
    )
    assert [one.name for one in found] == ["first", "7", "line-4", "line-5", "line-6"]
    assert [one.answer for one in found] == ["42", "1/2", None, "0.5", None]
    assert [one.text for one in found] == ["a?", "b?", "c?", USER["content"], USER["content"]]
    assert found[3].messages == found[4].messages == (system, USER)


def test_the_system_message_is_put_where_there_is_none(tmp_path: Path) -> None:
    own = {"role": "system", "content": "own"}
    given_, kept = read_questions(write(tmp_path, {"question": "a"}, {"messages": [own, USER]}), system="new")
    assert given_.messages == ({"role": "system", "content": "new"}, {"role": "user", "content": "a"})
    assert kept.messages == (own, USER)


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    file = write(tmp_path)
    file.write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n\r\n{"question": "b"}')
    assert [one.text for one in read_questions(file)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"text"', "is not an object"),
        (b"\xff\xfe", "not UTF-8"),
        ({}, "no question; it has no fields"),
        ({"text": "a", "answer": 1}, "no question; it has 'text', 'answer'"),
        ({"question": "  "}, "the question is empty"),
        ({"question": 3}, "question: messages is int"),
        ({"messages": "text"}, "messages is str"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "the last message is the assistant's"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is unknown"),
        ({"question": "a", "answer": [1]}, "answer '[1]' is not a text or a number"),
        ({"question": "a", "answer": ""}, "answer is empty"),
        ({"question": "a", "answer": True}, "answer 'true' is not"),
        ({"question": "a", "id": {"x": 1}}, "is not a text or a whole number"),
        ({"question": "a", "id": "first"}, "id 'first' is that of line 1 too"),
        (b'{"question": "bad \\ud800"}', "not valid Unicode"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    file = write(tmp_path, {"question": "fine", "id": "first"}, line, b"also bad")
    with pytest.raises(DataError) as refusal:
        read_questions(file)
    text = str(refusal.value)
    assert text.startswith(f"{file}:2: ") and message in text and text.endswith("(1 more such line: 3)")
    assert len(text) < 500


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no problem"):
        read_questions(write(tmp_path, b"", b"  "))
    with pytest.raises(DataError, match="No such file"):
        read_questions(tmp_path / "nowhere")
    with pytest.raises(DataError, match="Is a directory"):
        read_questions(tmp_path)


def test_a_question_of_the_command_line() -> None:
    assert question_of("a", system="s").messages[0] == {"role": "system", "content": "s"}
    for text in ("", " \n", "bad \ud800"):
        with pytest.raises(DataError):
            question_of(text)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.one_of(st.binary(), st.recursive(st.none() | st.booleans() | st.text() | st.floats(), st.lists).map(str)))
def test_any_line_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, line: bytes | str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(line if isinstance(line, bytes) else line.encode(errors="surrogatepass"))
    with pytest.raises(DataError):
        read_questions(file)


@pytest.mark.parametrize(("name", "number"), [("aime25", 30), ("hmmt25_feb", 30), ("gsm8k_test", 1319)])
def test_public_sets_are_read_as_they_are(name: str, number: int) -> None:
    """Only where OPENZAYA_DATA names a folder that holds them."""
    import os

    folder = os.environ.get("OPENZAYA_DATA")
    if folder is None or not (Path(folder) / f"{name}.jsonl").is_file():
        pytest.skip("OPENZAYA_DATA names no folder with this set")
    found = read_questions(Path(folder) / f"{name}.jsonl")
    assert len(found) == number and all(one.answer for one in found)
