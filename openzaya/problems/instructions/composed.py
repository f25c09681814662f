"""Problems whose answer is to take given forms: the prompt, a complying solver, and the judge.

A problem of a family (``openzaya.problems``) gets the sentences of one or more answer forms behind its
prompt. The right response is then one known text: the right answer with the forms applied. The judge

1. rewards exactly that text (up to blanks at line ends, runs of blanks and blanks behind commas), so that a
   guess, a remark or the answer among others earns nothing;
2. otherwise says what was missed: with a right answer, which forms were left out (the right answer is put
   into every selection of the forms and compared); with a wrong one, which forms are visibly missing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from openzaya.errors import DataError
from openzaya.problems.base import Problem, Solution, Verdict
from openzaya.problems.instructions.answer_forms import (
    ALWAYS_APPLY,
    ANSWER_FORMS,
    AnswerForm,
    apply_forms,
    get_form,
    in_order,
)
from openzaya.problems.registry import get_family
from openzaya.problems.verify import UNCLOSED_REASONING, split_response

_TIDY = re.compile(r"[ \t]*\n[ \t]*|,[ \t]*|[ \t]+")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of an answer: is it right, and which of the forms does it have."""

    right: bool
    followed: tuple[bool, ...]
    complete: bool
    """Right, in all forms."""


def allowed_forms(names: Sequence[str]) -> list[AnswerForm]:
    """The forms called ``names``, all where it is empty.

    Raises :class:`DataError` for an unknown name, and where no form is left that fits every answer.
    """
    forms = [get_form(name) for name in names] or list(ANSWER_FORMS.values())
    if not any(form.slot in ALWAYS_APPLY for form in forms):
        raise DataError(
            f"forms={list(names)} leave some answers as they are; add one that changes every answer, such as brackets"
        )
    return forms


def draw_forms(
    rng: random.Random, answer: str, num: int, allowed: Sequence[AnswerForm] | None = None
) -> list[AnswerForm]:
    """``num`` forms in order, each of which makes a difference to ``answer``; fewer where not so many do.

    ``allowed`` limits the choice; :class:`DataError` where none of them makes a difference.
    """
    if num < 1:
        raise DataError(f"num={num} forms of an answer; give at least 1")
    by_slot: dict[str, list[AnswerForm]] = {}
    for form in ANSWER_FORMS.values() if allowed is None else allowed:
        by_slot.setdefault(form.slot, []).append(form)
    drawn: list[AnswerForm] = []
    for slot in rng.sample(sorted(by_slot), len(by_slot)):
        trial = in_order([*drawn, rng.choice(by_slot[slot])])
        if all(needed(trial, place, answer) for place in range(len(trial))):
            drawn = trial
        if len(drawn) == num:
            break
    if not drawn:
        raise DataError("none of the allowed forms changes this answer; allow one of repeat, wrap, first or last")
    return drawn


def needed(forms: Sequence[AnswerForm], place: int, answer: str) -> bool:
    """Whether leaving out the form at ``place`` gives another text."""
    return apply_forms(forms, answer) != apply_forms([*forms[:place], *forms[place + 1 :]], answer)


def prompt_with_forms(prompt: str, forms: Sequence[AnswerForm]) -> str:
    """The problem's prompt, and a line with what the answer is to look like."""
    return f"{prompt}\n{' '.join(form.describe() for form in forms)}"


def right_answer(problem: Problem) -> str:
    """The problem's answer without any form."""
    return get_family(problem.family).solve(problem).answer


def comply(
    solution: Solution, forms: Sequence[AnswerForm], rng: random.Random | None = None, ignore_share: float = 0.0
) -> Solution:
    """The solution with its answer in the forms.

    With probability ``ignore_share`` one or more of them, any selection being as likely, are left out.
    """
    kept = list(forms)
    if rng is not None and forms and rng.random() < ignore_share:
        selection = rng.randrange(2 ** len(forms) - 1)
        kept = [form for i, form in enumerate(forms) if selection >> i & 1]
    return Solution(solution.trace, apply_forms(kept, solution.answer), solution.correct and len(kept) == len(forms))


def tidy(text: str) -> str:
    """``text`` with blanks unified: none at line ends, one elsewhere, one behind a comma."""
    return _TIDY.sub(lambda found: "\n" if "\n" in found[0] else ", " if found[0][0] == "," else " ", text.strip())


def judge(right: str, forms: Sequence[AnswerForm], answer: str) -> Judgement:
    """Judge ``answer``, the text behind the reasoning, where ``right`` is the right answer without forms."""
    # Bounded work on hostile input: a complying answer is never much longer than ours.
    expected = apply_forms(forms, right)
    if len(answer) > 4 * len(expected) + 64:
        return Judgement(False, (False,) * len(forms), False)
    given = tidy(answer)
    for num_left_out in range(len(forms) + 1):
        for left_out in combinations(range(len(forms)), num_left_out):
            kept = [form for i, form in enumerate(forms) if i not in left_out]
            if tidy(apply_forms(kept, right)) == given:
                return Judgement(True, tuple(i not in left_out for i in range(len(forms))), not left_out)
    followed = []
    for form in reversed(forms):
        inner = form.undo(given)
        followed.append(inner is not None)
        given = given if inner is None else inner
    return Judgement(False, tuple(reversed(followed)), False)


def verify_forms(
    problem: Problem, forms: Sequence[AnswerForm], response: str, *, answer_required: bool = True
) -> Verdict:
    """Judge ``<think>…</think>answer`` or a bare answer.

    Reward 1 for the right answer in all forms. ``answer_required=False`` also rewards a wrong answer that
    has all forms, which only makes sense for forms that are ``checkable``. The reason names the forms that
    were missed and says whether the answer itself is right.
    """
    if not isinstance(response, str):
        return Verdict(None, f"response is {type(response).__name__}, not text")
    try:
        right = right_answer(problem)
        expected_forms = in_order(forms)
    except Exception as error:  # any failure of the solver means that we cannot judge
        return Verdict(None, f"solver failed: {type(error).__name__}: {error}")
    _, answer = split_response(response)
    if answer is None:
        return Verdict(0.0, UNCLOSED_REASONING)
    if not answer:
        return Verdict(0.0, "empty answer")
    judgement = judge(right, expected_forms, answer)
    if judgement.complete:
        return Verdict(1.0, "correct")
    missed = [form.name for form, kept in zip(expected_forms, judgement.followed, strict=True) if not kept]
    quality = "right answer" if judgement.right else "wrong answer"
    if missed:
        return Verdict(0.0, f"{quality}, not followed: {', '.join(missed)}")
    return Verdict(0.0 if answer_required else 1.0, f"{quality}, all forms followed")
