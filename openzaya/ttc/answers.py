"""The answer of a rollout in a form that can be compared, and which rollouts are returned.

    math              the last balanced \\boxed{...}, else what "answer is" says, else the last line or its last number
    multiple_choice   the letter
    code              the last fenced block, without blank lines and spaces at the ends of lines
    general           a \\boxed{...} where there is one, else the whole text by its tokens

Only an answer after a closed reasoning counts; of a long one the beginning and a hash are kept. Mathematical answers
are brought to one spelling (numbers by value, fractions, units and typography removed); where the package math-verify
is installed, answers that are spelled differently are compared by it as well (openzaya/environments/math_equality.py).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Hashable, Sequence

from openzaya.data.aggregation import TaskKind
from openzaya.environments import math_equality
from openzaya.errors import RSAError
from openzaya.problems.math_answers import last_boxed, normalise_math
from openzaya.problems.verify import normalise_answer, split_response
from openzaya.ttc.completer import Rollout
from openzaya.ttc.config import Select
from openzaya.ttc.results import Candidate

MAX_ANSWER_LENGTH = 500
"""Characters of an answer that are kept as they are."""
MAX_PAIRS = 200
"""Most pairs of one group that are given to math-verify."""


def answer_of(rollout: Rollout, task: TaskKind) -> str | None:
    """The rollout's answer for comparing; None where it has none."""
    return extract_answer(rollout.content, task) if rollout.is_closed else None


def extract_answer(text: str, task: TaskKind) -> str | None:
    """The answer in ``text``, which has no reasoning any more, normalised; None where there is none."""
    if task == "multiple_choice":
        return _letter(text)
    if task == "code":
        return _shortened(_code(text))
    boxed = last_boxed(text)
    if task == "math":
        return _shortened(normalise_math(_unboxed(text) if boxed is None else boxed))
    return _shortened(" ".join(normalise_answer(text if boxed is None else boxed)))


def _shortened(answer: str) -> str | None:
    if len(answer) <= MAX_ANSWER_LENGTH:
        return answer or None
    digest = hashlib.sha256(answer.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{answer[:MAX_ANSWER_LENGTH]}... [{len(answer)} characters, {digest}]"


def group_answers(answers: Sequence[str | None], task: TaskKind) -> list[str | None]:
    """One name for all answers that mean the same: the spelling that comes first. None stays None.

    For ``math`` this may ask math-verify, which takes milliseconds a pair.
    """
    names: dict[str, str] = {}
    num_pairs = 0
    for answer in answers:
        if answer is None or answer in names:
            continue
        names[answer] = answer
        if task != "math":
            continue
        for name in dict.fromkeys(name for name in names.values() if name != answer):
            num_pairs += 1
            if num_pairs <= MAX_PAIRS and math_equality.is_equal(name, answer):
                names[answer] = name
                break
    return [None if answer is None else names[answer] for answer in answers]


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """The first index of the most frequent answer, ties to the one that comes first; None where all are None."""
    counts: dict[Hashable, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        return None
    return list(answers).index(max(counts, key=lambda answer: counts[answer]))


def select(candidates: Sequence[Candidate], how: Select, seed: int) -> list[Candidate]:
    """What is returned of the final round's candidates, whose answers are grouped already.

    ``verifier`` takes the highest reward, ties to the earliest; where nobody has a reward, and where nobody has an
    answer to vote with, the next best rule decides: the majority, then the first whose reasoning is closed. That is
    ``aggregate`` too: the call that aggregates is made elsewhere, this is what stands when it fails.

    Raises:
        RSAError: no candidate is done.
    """
    done = [candidate for candidate in candidates if candidate.status == "done" and candidate.rollout is not None]
    if not done:
        raise RSAError(f"none of {len(candidates)} candidates is done; there is nothing to select")
    if how == "all":
        return done
    if how == "random":
        return [random.Random(seed).choice(done)]
    if how == "verifier":
        rewarded = [candidate for candidate in done if candidate.correct is not None]
        if rewarded:
            return [max(rewarded, key=lambda candidate: candidate.correct or 0.0)]
    voted = majority([candidate.answer for candidate in done])
    if voted is not None:
        return [done[voted]]
    return [next((c for c in done if c.rollout is not None and c.rollout.is_closed), done[0])]


def check_answer(response: str, gold: str | float | Sequence[str], task: TaskKind) -> float | None:
    """Whether a response has the right answer: 1.0 or 0.0; None for code, which only running could judge.

    Args:
        response: what the model wrote; a reasoning in think tags is left out.
        gold: the right answer as a file gives it, bare or as a worked solution; of several, any is right.
    """
    if task == "code":
        return None
    if isinstance(gold, Sequence) and not isinstance(gold, str):
        return max((check_answer(response, one, task) or 0.0 for one in gold), default=None)
    _, content = split_response(response)
    found = None if content is None else extract_answer(content, task)
    wanted = extract_answer(str(gold).rpartition("####")[2], task)
    if wanted is None:
        return None
    if found is None:
        return 0.0
    return float(found == wanted or (task == "math" and math_equality.is_equal(wanted, found)))


# --- finding --------------------------------------------------------------------------------------


# Runs of blanks and signs are bounded in all patterns: a model that repeats itself writes very long ones.
_ANSWER_IS = re.compile(r"\banswer[ \t*]{0,8}(?:is|:|=)[\s*:]{0,8}([^\s*][^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s{0,4}/\s{0,4}\d+)?")


def _unboxed(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines or re.search(r"\\f?box(?:ed)?\s{0,8}\{", lines[-1]):
        return ""  # a box that was cut off may lack digits
    stated = _ANSWER_IS.findall(text)
    last = str(stated[-1] if stated else lines[-1])
    if not re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", last)):
        return last  # a formula, without words around it
    numbers = _NUMBER.findall(last)
    return str(numbers[-1]) if numbers else last


_LETTER_ALONE = re.compile(r"(?:option|choice)?[\W_]{0,8}([A-Za-z])(?:$|[).:\]}*])", re.IGNORECASE)
_LETTER_STATED = re.compile(
    r"\b(?:answer|choice|option)\b[^A-Za-z0-9\n]{0,8}(?:is|=)?[^A-Za-z0-9\n]{0,8}(?:(?:option|choice)\W{1,8})?"
    r"((?-i:[A-Z])(?![A-Za-z0-9'])|[a-z](?=[^\w ']|$))",
    re.IGNORECASE,
)
_LETTER_MARKED = re.compile(r"\(([A-J])\)|\*\*([A-J])\b")
_LETTER_STANDING = re.compile(r"(?<![\w'])([B-HJ])(?![\w'])")  # A and I are words


def _letter(text: str) -> str | None:
    boxed = last_boxed(text)
    if boxed is not None:
        return _letter_alone(boxed)
    stated = _LETTER_STATED.findall(text)
    if stated:
        return str(stated[-1]).upper()
    last = text.rstrip().rpartition("\n")[2]
    alone = _letter_alone(last)
    if alone is not None:
        return alone
    marked = ["".join(found) for found in _LETTER_MARKED.findall(text)]
    return (marked or _LETTER_STANDING.findall(last) or [None])[-1]


def _letter_alone(line: str) -> str | None:
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", "", line).lstrip(" \t*_([{$\\").rstrip(" \t*_)]}$.")
    found = _LETTER_ALONE.match(bare)
    return found.group(1).upper() if found else None


def _code(text: str) -> str:
    """The last block between fences; an open one goes to the end; without fences all of it is code."""
    blocks = re.findall(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", text, re.MULTILINE | re.DOTALL)
    code = blocks[-1][1] if blocks else text
    lines = [line.rstrip() for line in code.expandtabs(4).splitlines()]
    return "\n".join(line for line in lines if line)
