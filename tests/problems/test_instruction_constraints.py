"""The constraint types: witnesses hold, violations do not, hostile texts are judged quickly and without a crash."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import DataError
from openzaya.problems.instructions.base import EVERYTHING
from openzaya.problems.instructions.registry import (
    CONSTRAINTS,
    HARD_CONSTRAINTS,
    IFEVAL_CONSTRAINTS,
    NEEDS_LANGDETECT,
    draw_constraints,
    make_constraint,
)
from openzaya.problems.instructions.text import paragraphs, sentences, words

OFFLINE = [kind for kind in CONSTRAINTS if kind not in NEEDS_LANGDETECT]
every_kind = pytest.mark.parametrize("kind", OFFLINE)
HOSTILE = (
    "[" * 50_000,
    "<<" * 25_000,
    "* " * 25_000,
    "*" * 50_000,
    "\n" * 25_000 + "x" + "\n" * 25_000 + "y",
    " " * 50_000 + "-" + " " * 50_000 + "x",
    "a" * 100_000,
    "a." * 37_000,
    "." * 75_000 + "x",
    "a-" * 37_000,
    "p. " * 25_000,
    "Section " * 12_000,
    "1," * 37_000,
    "|" * 50_000 + "\n" + "|-" * 25_000 + "|",
    "```" * 25_000,
    '{"a":' * 12_000,
    "9" * 75_000,
    "\x00\ud800\u202e\ufeff" * 5_000,
    "é́" * 12_000,
    "İ" * 12_000,
)


def test_the_numbers_of_types():
    assert len(IFEVAL_CONSTRAINTS) == 25 and len(HARD_CONSTRAINTS) >= 15
    assert not IFEVAL_CONSTRAINTS.keys() & HARD_CONSTRAINTS.keys()


@every_kind
@given(seed=st.integers(0, 2**32))
@settings(derandomize=True, max_examples=30, deadline=None)
def test_witnesses_hold_and_violations_do_not(kind, seed):
    constraint = CONSTRAINTS[kind].draw(random.Random(seed))
    rng = random.Random(seed)
    witness, violation = constraint.witness(rng), constraint.violation(rng)
    assert constraint.check(witness) and constraint.check(f"<think>{violation}</think>\n{witness}\n")
    assert violation.strip() and not constraint.check(violation)
    assert not constraint.check(f"<think>{witness}</think>{violation}")
    assert not constraint.check(f"<think>{witness}"), "reasoning that never ends holds no answer"
    assert make_constraint(kind, constraint.arguments()) == constraint


@every_kind
def test_an_empty_answer_never_holds(kind):
    for seed in range(20):
        constraint = CONSTRAINTS[kind].draw(random.Random(seed))
        assert not any(constraint.check(text) for text in ("", " \n", "<think>a</think>", "<think>a</think> \n"))


@every_kind
def test_descriptions_name_every_argument_and_differ(kind):
    constraint = CONSTRAINTS[kind].draw(random.Random(3))
    said = {constraint.describe(random.Random(seed)) for seed in range(30)}
    assert len(said) == len(constraint.phrasings) >= 2 and constraint.describe() in said
    for text in said:
        for value in constraint.arguments().values():
            assert all(str(item) in text for item in (value if isinstance(value, list) else [value])), text


@every_kind
def test_hostile_texts_are_judged(kind):
    constraint = CONSTRAINTS[kind].draw(random.Random(1))
    for text in HOSTILE:
        assert constraint.check(text) in (True, False)
    assert not constraint.check("word " * 200_001), "beyond the limit of length"


@given(text=st.text(max_size=300))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_text_is_judged(text):
    for kind in OFFLINE:
        assert CONSTRAINTS[kind].draw(random.Random(0)).check(text) in (True, False)


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("One. Two! Three? Four", 4),
        ("Mr. Smith met Dr. Jones. They talked.", 2),
        ("It costs 3.50 dollars. Cheap.", 2),
        ("J. R. Smith came. He left.", 2),
        ("He lives in the U.S. and works. Fine.", 2),
        ('He said "Stop!" Then he left.', 2),
        ("Wait... what? Yes.", 3),
        ("1. First point\n2. Second point", 1),
        ("Use e.g. a knife, forks etc. and so on.", 1),
        ("We sell pens, paper, etc. Come in.", 2),
        ("At www.site.org you find it.", 1),
        ("", 0),
        ("...", 1),
    ],
)
def test_sentences(text, num):
    assert len(sentences(text)) == num


def test_words_and_paragraphs():
    assert words("It's a well-known_thing, isn’t it? 3rd") == ["It's", "a", "well-known", "thing", "isn’t", "it", "3rd"]
    assert paragraphs("one\ntwo\n\n \nthree\n") == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("kind", "arguments", "text", "holds"),
    [
        ("keywords:existence", {"keywords": ["cat"]}, "A CATALOGUE", True),
        ("keywords:existence", {"keywords": ["c.t"]}, "cat", False),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A catalogue", True),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "My Cat.", False),
        ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"}, "two words", True),
        ("words:every_nth", {"word": "so", "step": 2}, "a so b so c so d", True),
        ("words:every_nth", {"word": "so", "step": 2}, "so so so so so so", True),
        ("words:every_nth", {"word": "so", "step": 2}, "a so b so c", False),
        ("words:chain", {"least": 3}, "One egg, good.", True),
        ("words:chain", {"least": 3}, "One egg, food.", False),
        ("sentences:acrostic", {"word": "Hi"}, "Here we are. It works.", True),
        ("sentences:acrostic", {"word": "Hi"}, "Here we are. It works. Really.", False),
        ("content:copy_words", {"source": "a b c d", "first": 2, "last": 3}, "b  c", True),
        ("content:copy_words", {"source": "a b c d", "first": 2, "last": 3}, "b c.", False),
        ("layout:line_pattern", {"num_words": [2, 1]}, "two words\n\none", True),
        ("layout:nested_brackets", {"depth": 3}, "({[x]})", True),
        ("layout:nested_brackets", {"depth": 3}, "({[x})]", False),
        ("layout:table", {"num_columns": 2, "num_rows": 1}, "|a|b|\n|-|-|\n|c|d|", True),
        ("layout:table", {"num_columns": 2, "num_rows": 1}, "|a|b|\n|c|d|\n|-|-|", False),
        ("letters:number_characters", {"num_characters": 4}, "a bc", True),
    ],
)
def test_cases(kind, arguments, text, holds):
    assert make_constraint(kind, arguments).check(text) is holds


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("keywords:exist", {}, "did you mean 'keywords:existence'"),
        ("keywords:existence", {}, "are missing"),
        ("keywords:existence", {"keywords": None}, "are missing"),
        ("keywords:existence", {"keywords": "cat"}, "no list of texts"),
        ("keywords:existence", {"keywords": ["cat", 3]}, "no text"),
        ("punctuation:no_comma", {"num": 1}, "unknown arguments"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "most"}, "give 'less than' or 'at least'"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "less than"}, "no whole number"),
        ("length_constraints:number_words", {"num_words": -1, "relation": "less than"}, "below 0"),
        ("letters:without", {"letter": "ab", "least": 3}, "not a single letter"),
        ("content:copy_words", {"source": "a b", "first": 1, "last": 3}, "behind the text's 2 words"),
        ("layout:line_pattern", {"num_words": [0]}, "whole numbers from 1"),
        ("words:lengths_between", {"shortest": "3", "longest": 2, "least": 1}, "no whole number"),
    ],
)
def test_wrong_arguments_are_refused(kind, arguments, message):
    with pytest.raises(DataError, match=message):
        make_constraint(kind, arguments)


def test_several_constraints_share_no_aspect():
    seen = set()
    for seed in range(300):
        drawn = draw_constraints(random.Random(seed), 1 + seed % 4)
        aspects = [aspect for constraint in drawn for aspect in constraint.aspects]
        assert len(aspects) == len(set(aspects)) and (len(drawn) == 1 or EVERYTHING not in aspects)
        assert len(drawn) == 1 + seed % 4 or EVERYTHING in aspects or len(drawn) >= 2
        seen |= {constraint.kind for constraint in drawn}
    assert seen == set(OFFLINE)
    with pytest.raises(DataError, match="num=0"):
        draw_constraints(random.Random(0), 0)
