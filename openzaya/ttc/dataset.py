"""Files of problems for test-time compute: one JSON object a line, every line checked before a token is spent.

    {"question": "What is 17 + 25?", "answer": 42, "id": "sum-1"}
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "..."}]}

The question stands under ``messages``, ``question``, ``problem`` or ``prompt`` (the first of these that is there; a
list is taken as messages). ``answer`` (a text or a number) and ``id`` may be missing; other fields are left alone. A
problem without an id is known by its line number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openzaya.data.messages import normalise
from openzaya.errors import DataError

QUESTION_FIELDS = ("messages", "question", "problem", "prompt")
MAX_LINES_NAMED = 5


@dataclass(frozen=True)
class QuestionRecord:
    """One problem."""

    name: str
    """Its id; unique in the file."""
    messages: tuple[Mapping[str, Any], ...]
    """In OpenAI's form; the last one is the user's, or a tool's."""
    answer: str | None = None
    """What a right answer is compared with."""

    @property
    def text(self) -> str:
        """The last message's text, for tables."""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def question_of(text: str, *, system: str = "", name: str = "problem", answer: str | None = None) -> QuestionRecord:
    """A question in one user message, after a system message where one is given.

    Raises ``DataError`` for a text that is empty or no Unicode.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    _check_messages(messages)
    return QuestionRecord(name, tuple(messages), answer)


def read_questions(path: str | Path, *, system: str = "") -> list[QuestionRecord]:
    """The problems of a file, in order; empty lines are skipped.

    ``system`` is put before problems that have no system message of their own. Raises ``DataError`` for a file that
    cannot be read or holds no problem, and for lines that are wrong: the first is described, others are numbered.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a file of one JSON object a line") from None
    questions: list[QuestionRecord] = []
    names: dict[str, int] = {}
    wrong: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = _read_line(line, number, system)
            if question.name in names:
                raise DataError(f"id '{question.name[:80]}' is that of line {names[question.name]} too; make it unique")
        except DataError as error:
            wrong.append((number, str(error)))
            continue
        names[question.name] = number
        questions.append(question)
    if wrong:
        raise DataError(f"{path}:{wrong[0][0]}: {wrong[0][1]}{_others(wrong[1:])}")
    if not questions:
        raise DataError(f'{path} holds no problem; give one JSON object a line, such as {{"question": "17 + 25?"}}')
    return questions


def _others(wrong: list[tuple[int, str]]) -> str:
    if not wrong:
        return ""
    named = ", ".join(str(number) for number, _ in wrong[:MAX_LINES_NAMED])
    more = ", ..." if len(wrong) > MAX_LINES_NAMED else ""
    return f" ({len(wrong)} more such line{'s' if len(wrong) > 1 else ''}: {named}{more})"


def _read_line(line: bytes, number: int, system: str) -> QuestionRecord:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise DataError(f"not JSON ({reason}): {_shown(line.decode())}; give one object a line") from None
    if not isinstance(record, dict):
        raise DataError(f'{_shown(json.dumps(record))} is not an object; write {{"question": ...}}')
    field = next((field for field in QUESTION_FIELDS if record.get(field) is not None), None)
    if field is None:
        raise DataError(f"no question; it has {_names(record)}, expected one of: {', '.join(QUESTION_FIELDS)}")
    given = record[field]
    if isinstance(given, str) and field != "messages":
        given = [{"role": "user", "content": given}]
    try:
        _check_messages(given)
    except DataError as error:
        raise DataError(f"{field}: {error}") from None
    if system and given[0]["role"] != "system":
        given = [{"role": "system", "content": system}, *given]
    return QuestionRecord(_name(record.get("id"), number), tuple(given), _answer(record.get("answer")))


def _check_messages(messages: Any) -> None:
    normalised = normalise(messages)
    last = normalised[-1]
    if last["role"] not in ("user", "tool"):
        raise DataError(f"the last message is the {last['role']}'s; end with the user's question")
    if not last["content"].strip():
        raise DataError("the question is empty; write one")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not valid Unicode (character {error.start}); give valid text") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"messages cannot be written as JSON ({error}); give plain values") from None


def _name(given: Any, number: int) -> str:
    if given is None:
        return f"line-{number}"
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise DataError(f"id {_shown(json.dumps(given))} is not a text or a whole number; give one, or leave it out")
    return str(given)


def _answer(given: Any) -> str | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise DataError(f"answer {_shown(json.dumps(given))} is not a text or a number; give one, or leave it out")
    text = str(given)
    if not text.strip():
        raise DataError("answer is empty; give one, or leave it out")
    return text.strip()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _names(record: dict[str, Any]) -> str:
    return ", ".join(f"'{name[:40]}'" for name in list(record)[:8]) or "no fields"
