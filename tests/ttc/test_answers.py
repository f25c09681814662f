"""Answers are found where they stand, brought to one spelling, grouped, voted on and checked."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openzaya.environments import math_equality
from openzaya.errors import RSAError
from openzaya.ttc import answers as answers_module
from openzaya.ttc.answers import (
    answer_of,
    check_answer,
    extract_answer,
    group_answers,
    last_boxed,
    majority,
    normalise_math,
    select,
)
from openzaya.ttc.completer import Rollout, Usage
from openzaya.ttc.results import Candidate

TASKS = ("general", "math", "code", "multiple_choice")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\dfrac{1}{2}}.", "1/2"),
        (r"\boxed{3}, no, \boxed{4}", "4"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"it is \boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{12\text{ cm}}", "12"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"only \boxed{8", None),
        ("The answer is 1,234.", "1234"),
        ("The answer is:\n\n**7**", "7"),
        ("First 3, then 9.\nThat makes 12 apples", "12"),
        ("x^2+1", "x^2+1"),
        ("-3", "-3"),
        ("", None),
        ("   \n ", None),
    ],
)
def test_math_answers(text, expected):
    assert extract_answer(text, "math") == expected


@pytest.mark.parametrize(
    ("spellings", "expected"),
    [
        (["0.5", ".50", r"\frac12", r"\dfrac{1}{2}", "1/2", "x = 0.5", "$0.5$", r"\displaystyle 0.5", "2/4"], "1/2"),
        (["1234", "1,234", "1{,}234", "01234.0", "$1,234.00$", "\\$1,234", "1234."], "1234"),
        (["90", r"90^\circ", r"90^{\circ}", "90°", "90 degrees"], "90"),
        (["-3", "−3", "- 3"], "-3"),
        (["0", "-0", "0.0", "0/7"], "0"),
        ([r"\frac{a+b}{2}", r"\tfrac{a + b}{2}"], "(a+b)/2"),
        (["(1,234)", "(1, 234)"], "(1,234)"),
        ([r"\text{east}", "east"], "east"),
    ],
)
def test_one_value_has_one_spelling(spellings, expected):
    assert {normalise_math(text) for text in spellings} == {expected}


def test_different_values_stay_different():
    texts = ["1", "-1", "10", "1/10", "(1,2)", "[1,2]", "1,2", "12", "x", "2x", "x^2", "1/0", "0/1", "1e9", "½"]
    assert len({normalise_math(text) for text in texts}) == len(texts)


@given(st.text("0123456789.,/-+{}\\$ \nabofrcxedt%^_", max_size=60))
def test_spelling_is_settled_and_never_fails(text):
    once = normalise_math(text)
    assert isinstance(once, str)
    for task in TASKS:
        extract_answer(text, task)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is (D).", "D"),
        ("Answer: b", "B"),
        ("**Answer:** C", "C"),
        (r"$\boxed{\textbf{(E)}\ 12}$", "E"),
        ("B) Paris", "B"),
        ("I think it is (A).\nNo: (B) fits better", "B"),
        ("The best choice is clearly E.", "E"),
        ("Answer: C. Because A is wrong", "C"),
        ("The answer is a dog", None),
        ("A dog, I like it", None),
        ("", None),
    ],
)
def test_letters(text, expected):
    assert extract_answer(text, "multiple_choice") == expected


def test_code_is_the_last_block_without_its_white_space():
    text = "Try\n```python\nold()\n```\nor\n```python\ndef f(x):  \n\n\treturn x\n```\nDone."
    assert extract_answer(text, "code") == "def f(x):\n    return x"
    assert extract_answer("```\nopen", "code") == "open"
    assert extract_answer("print(1)\n", "code") == "print(1)"
    assert extract_answer("", "code") is None
    assert extract_answer("if a:\n  b", "code") != extract_answer("if a:\nb", "code"), "indentation has a meaning"


def test_general_answers_are_compared_by_tokens_or_by_their_box():
    assert extract_answer("X = 07  y=3\n", "general") == extract_answer("x=7 y = 3", "general")
    assert extract_answer(r"Long talk \boxed{07}", "general") == extract_answer("7", "general")
    assert extract_answer("\n", "general") is None


def test_a_long_answer_is_short_and_still_itself():
    one, other = "word " * 5000, "word " * 4999 + "wort"
    found = [extract_answer(text, "general") for text in (one, other, one)]
    assert found[0] == found[2] != found[1] and len(found[0] or "") < 600
    assert extract_answer("\ud800" * 1000, "general")


def test_only_closed_reasoning_has_an_answer():
    def rollout(is_closed: bool) -> Rollout:
        return Rollout("", r"\boxed{4}", is_closed, "length", Usage())

    assert answer_of(rollout(True), "math") == "4"
    assert answer_of(rollout(False), "math") is None


@pytest.mark.parametrize(
    "junk",
    [
        "-",
        "answer ",
        r"\boxed{",
        "{",
        "*",
        "answer is ",
        "```\n",
        "1,",
        r"\frac",
        "answer" + " " * 50,
        "1/",
        "option (",
    ],
)
def test_a_model_that_repeats_itself_costs_no_time(junk):
    """Patterns that backtrack would take hours here."""
    text = junk * (200_000 // len(junk))
    began = time.process_time()
    for task in TASKS:
        extract_answer(text, task)
    assert time.process_time() - began < 20


def test_the_last_box_is_found_with_its_braces():
    assert last_boxed(r"\fbox{a\}b{c}}") == r"a\}b{c}"
    assert last_boxed("}} \\boxed {x} {") == "x"
    assert last_boxed("boxed{x}") is None


# --- groups and votes -------------------------------------------------------------------------------


def test_the_majority_is_the_earliest_of_the_most_frequent():
    assert majority(["a", "b", "b", "a", "c"]) == 0
    assert majority(["c", "b", "a", "b"]) == 1
    assert majority([None, None, "x", None]) == 2
    assert majority([None]) is None and majority([]) is None


def test_groups_without_math_verify_are_spellings(monkeypatch):
    monkeypatch.setattr(math_equality, "is_available", lambda: False)
    math_equality.is_equal.cache_clear()
    assert group_answers(["2", None, "3", "2"], "math") == ["2", None, "3", "2"]
    assert group_answers([r"2\sqrt{2}", r"\sqrt{8}"], "math") == [r"2\sqrt{2}", r"\sqrt{8}"]
    math_equality.is_equal.cache_clear()


def test_a_group_takes_its_first_name_and_few_pairs_are_asked(monkeypatch):
    asked = []

    def is_equal(one: str, other: str) -> bool:
        asked.append((one, other))
        return one[0] == other[0]

    monkeypatch.setattr(answers_module.math_equality, "is_equal", is_equal)
    assert group_answers(["b1", "a1", None, "a2", "b2", "a1"], "math") == ["b1", "a1", None, "a1", "b1", "a1"]
    asked.clear()
    assert group_answers(["b1", "b2"], "general") == ["b1", "b2"] and not asked
    many = [chr(0x4E00 + index) for index in range(300)]
    assert group_answers(many, "math") == many
    assert len(asked) == answers_module.MAX_PAIRS


def test_math_verify_judges_what_is_spelled_differently():
    pytest.importorskip("math_verify")
    assert math_equality.is_equal(r"\sqrt{8}", r"2\sqrt{2}")
    assert not math_equality.is_equal("blue", "red")
    assert not math_equality.is_equal("10^{10^{10}}", "10^{10^{11}}"), "given up after a while"
    assert math_equality.is_equal("x^2+2x+1", "(x+1)^2"), "and works again afterwards"
    assert check_answer(r"\boxed{\sqrt{8}}", r"2\sqrt{2}", "math") == 1.0


def candidates(*values: tuple[str | None, float | None]) -> list[Candidate]:
    rollout = Rollout("", "", True, "stop", Usage())
    return [
        Candidate(1, slot, (), "done", 0, rollout, answer=answer, correct=correct)
        for slot, (answer, correct) in enumerate(values)
    ]


def test_selection():
    given_ = candidates(("a", 0.5), ("b", None), ("b", 1.0), ("a", 1.0), ("b", -1.0))
    failed = Candidate(1, 5, (), "failed", 0)
    assert [c.slot for c in select([*given_, failed], "majority", 0)] == [1]
    assert [c.slot for c in select([*given_, failed], "aggregate", 0)] == [1]
    assert [c.slot for c in select(given_, "verifier", 0)] == [2]
    assert [c.slot for c in select([*given_, failed], "all", 0)] == [0, 1, 2, 3, 4]
    drawn = [select([*given_, failed], "random", seed)[0].slot for seed in range(200)]
    assert drawn == [select([*given_, failed], "random", seed)[0].slot for seed in range(200)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    with pytest.raises(RSAError, match="none of 1 candidates is done"):
        select([failed], "majority", 0)


def test_selection_without_rewards_or_answers_still_gives_one():
    assert select(candidates(("a", None), ("b", None), ("b", None)), "verifier", 0)[0].slot == 1
    assert select(candidates((None, 0.0), (None, -1.0)), "verifier", 0)[0].slot == 0
    open_ended = Candidate(1, 0, (), "done", 0, Rollout("cut off", "", False, "length", Usage()))
    assert select([open_ended, *candidates((None, None))], "majority", 0)[0].rollout.is_closed


@pytest.mark.parametrize(
    ("response", "gold", "task", "expected"),
    [
        (r"<think>\boxed{5}</think>It is \boxed{70}.", "70", "math", 1.0),
        (r"\boxed{70.0}", 70, "math", 1.0),
        (r"\boxed{71}", 70, "math", 0.0),
        ("no idea", "70", "math", 0.0),
        (r"\boxed{18}", "9 + 9 = <<9+9=18>>18\n#### 18", "math", 1.0),
        (r"\boxed{2}", ["1", "2"], "math", 1.0),
        (r"\boxed{3}", ["1", "2"], "math", 0.0),
        ("The answer is (C)", "C", "multiple_choice", 1.0),
        ("The answer is (C)", "(B) blue", "multiple_choice", 0.0),
        ("```\nx\n```", "x", "code", None),
        (" 07 ", "7", "general", 1.0),
        ("7 or 8", "7", "general", 0.0),
        ("<think>7", "7", "general", 0.0),
        ("7", "", "general", None),
    ],
)
def test_answers_are_checked(response, gold, task, expected):
    assert check_answer(response, gold, task) == expected
