"""Generated sources: item = f(seed, index), supervision, quality mix, aggregation examples."""

from __future__ import annotations

import collections
import random
import re

import pytest

from openzaya.data.mixture import Mixture, Source
from openzaya.data.packing import PackedBatches
from openzaya.data.problem_sources import AggregationSource, ProblemSource
from openzaya.data.sources import TextSource
from openzaya.data.tokenizer import encode_plain
from openzaya.errors import DataError
from openzaya.problems import TRAINED_FAMILIES, Annotator, get_family, make_problem, split_of

FAMILIES = list(TRAINED_FAMILIES)
USER = "<bos><|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def parts(tokenizer, example):
    prompt, response = tokenizer.decode(example.tokens).split(ASSISTANT)
    return prompt.removeprefix(USER), response.removesuffix("<|im_end|>\n")


def examples(source, num):
    return [source.next_example() for _ in range(num)]


@pytest.mark.parametrize("make", [ProblemSource, AggregationSource])
def test_random_access_equals_the_stream_and_resumes(tokenizer, make):
    source, other = (make(tokenizer, FAMILIES, (0, 4), seed=5, wrong_share=0.3) for _ in range(2))
    assert isinstance(source, Source)
    stream = examples(source, 520)
    assert [other.example(i) for i in (519, 0, 256, 255)] == [stream[i] for i in (519, 0, 256, 255)]
    other.load_state_dict({"index": 300, "too_long": 0})
    assert examples(other, 10) == stream[300:310]
    assert make(tokenizer, FAMILIES, (0, 4), seed=6).example(0) != stream[0]


def test_perfect_demonstrations_verify_and_only_the_assistant_is_supervised(tokenizer):
    source = ProblemSource(tokenizer, FAMILIES[:1], (2, 2), seed=1)
    family = get_family(FAMILIES[0])
    for index in range(30):
        example = source.example(index)
        problem = make_problem(FAMILIES[0], 2, 1, index, "train")
        prompt, response = parts(tokenizer, example)
        assert prompt == problem.prompt and split_of(problem.canonical) == "train"
        assert family.verify(problem, response).reward == 1
        supervised = [t for t, wanted in zip(example.tokens, example.loss_mask, strict=True) if wanted]
        assert tokenizer.decode(supervised) == response + "<|im_end|>"


def test_text_style_supervises_all_but_the_first_token(tokenizer):
    chat, text = (ProblemSource(tokenizer, FAMILIES, (0, 3), seed=1, style=style) for style in ("chat", "text"))
    for index in range(5):
        assert text.example(index).tokens == chat.example(index).tokens
        assert text.example(index).loss_mask == [False] + [True] * (len(text.example(index).tokens) - 1)


def test_wrong_share_a_difficulty(tokenizer):
    source = ProblemSource(tokenizer, FAMILIES[:1], (2, 3), seed=1, wrong_share=[0.0, 1.0], difficulty_weights=[1, 3])
    family = get_family(FAMILIES[0])
    wrong, seen = {2: 0, 3: 0}, {2: 0, 3: 0}
    for index in range(200):
        prompt, response = parts(tokenizer, source.example(index))
        for difficulty in (2, 3):
            problem = make_problem(FAMILIES[0], difficulty, 1, index, "train")
            if problem.prompt == prompt:
                seen[difficulty] += 1
                wrong[difficulty] += family.verify(problem, response).reward == 0
    assert sum(seen.values()) == 200 and 30 < seen[2] < 70
    assert wrong[2] == 0 and wrong[3] > 0.5 * seen[3]


def test_aggregation_examples_hold_tails_and_a_perfect_target(tokenizer):
    tau = 20
    source = AggregationSource(tokenizer, FAMILIES[:1], (4, 4), seed=1, num_candidates=3, tau=tau, wrong_share=0.6)
    family = get_family(FAMILIES[0])
    for index in range(30):
        prompt, response = parts(tokenizer, source.example(index))
        problem = make_problem(FAMILIES[0], 4, 1, index, "train")
        gold = family.solve(problem)
        assert response == f"<think>{gold.trace}</think>{gold.answer}"
        assert prompt.startswith(problem.prompt)
        pieces = prompt.removeprefix(problem.prompt).split("\n#")
        assert len(pieces) == 5 and pieces[-1] == "?"
        for number, piece in enumerate(pieces[1:4], 1):
            tail = piece.removeprefix(f"{number}\n")
            assert tail and len(encode_plain(tokenizer, [tail])[0]) <= tau + 2


def tails_of(problem, prompt):
    """The tails in a short aggregation prompt."""
    assert prompt.startswith(problem.prompt + "\n#1\n") and prompt.endswith("\n#?")
    return re.split(r"\n#\d\n", prompt.removeprefix(problem.prompt).removesuffix("\n#?"))[1:]


def test_numbers_of_candidates_vary_and_some_stop_early(tokenizer):
    source = AggregationSource(
        tokenizer, FAMILIES[:1], (4, 4), seed=1, num_candidates=(1, 4), tau=400, wrong_share=0.0, cut_share=0.25
    )
    family = get_family(FAMILIES[0])
    numbers, lengths = collections.Counter(), []
    for index in range(200):
        prompt, _ = parts(tokenizer, source.example(index))
        problem = make_problem(FAMILIES[0], 4, 1, index, "train")
        trace = family.solve(problem).trace
        tails = tails_of(problem, prompt)
        assert all(tail and trace.startswith(tail) for tail in tails)
        numbers[len(tails)] += 1
        lengths += [len(tail) / len(trace) for tail in tails]
    assert set(numbers) == {1, 2, 3, 4} and min(numbers.values()) > 25
    cut = [length for length in lengths if length < 1]
    assert 0.18 < len(cut) / len(lengths) < 0.32
    assert min(cut) < 0.2 and max(cut) > 0.8


def test_useless_tails_teach_nothing_but_the_usual_mixture(tokenizer):
    source = AggregationSource(
        tokenizer, FAMILIES[:1], (4, 4), seed=1, wrong_share=0.5, habit_share=1.0, useless_share=0.5, tau=400
    )
    family = get_family(FAMILIES[0])
    right = collections.defaultdict(list)
    for index in range(300):
        prompt, response = parts(tokenizer, source.example(index))
        problem = make_problem(FAMILIES[0], 4, 1, index, "train")
        tails = tails_of(problem, prompt)
        annotators = (None, Annotator(habit=True, slip_rate=0.0, rng=random.Random(0)))
        own = {tail in [family.solve(problem, annotator).trace for annotator in annotators] for tail in tails}
        kind = "empty" if not any(tails) else "own" if own == {True} else "other"
        right[kind].append(family.verify(problem, response).reward)
    assert all(right["own"]) and 100 < len(right["own"]) < 200
    for kind in ("empty", "other"):
        assert 50 < len(right[kind]) < 100 and 0.3 < sum(right[kind]) / len(right[kind]) < 0.7


def test_items_beyond_the_context_are_skipped_and_counted(tokenizer):
    unlimited = ProblemSource(tokenizer, FAMILIES, (0, 7), seed=2)
    limited = ProblemSource(tokenizer, FAMILIES, (0, 7), seed=2, context_length=80)
    expected = [e if len(e.tokens) <= 80 else None for e in examples(unlimited, 300)]
    assert examples(limited, 300) == expected
    assert limited.report() == {"items": 300, "too_long": expected.count(None)} and expected.count(None) > 0


def test_the_whole_pipeline_resumes(tokenizer):
    def pipeline():
        sources = [
            TextSource(tokenizer, 128),
            ProblemSource(tokenizer, FAMILIES, (0, 7), seed=2, context_length=128, style="text"),
            AggregationSource(tokenizer, FAMILIES, (0, 3), seed=2, tau=20, context_length=128),
        ]
        return PackedBatches(Mixture(sources, [3, 5, 2], 1), 128, 4, 64)

    first, second = pipeline(), pipeline()
    for _ in range(13):
        next(first)
    second.load_state_dict(first.state_dict())
    for _ in range(15):
        ours, theirs = next(first), next(second)
        assert ours.tokens.equal(theirs.tokens) and ours.loss_mask.equal(theirs.loss_mask)
        assert ours.document_ids.equal(theirs.document_ids)
    assert first.report() == second.report()
    assert first.mixture.report() == second.mixture.report()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"families": []}, "families is empty"),
        ({"families": ["no_such"]}, "no_such"),
        ({"difficulties": (3, 1)}, "difficulties"),
        ({"wrong_share": [0.1]}, "wrong_share has 1 entries for 4 difficulties"),
        ({"wrong_share": 1.5}, "between 0 and 1"),
        ({"difficulty_weights": [0, 0, 0, 0]}, "not all 0"),
        ({"style": "poem"}, "unknown style"),
        ({"num_candidates": (0, 2)}, "num_candidates="),
        ({"pool_size": 0}, "pool_size=0"),
        ({"num_candidates": (3, 2)}, "the lower first"),
        ({"habit_share": -0.1}, "habit_share=-0.1"),
        ({"cut_share": 2}, "cut_share=2"),
        ({"useless_share": 1.1}, "useless_share=1.1"),
        ({"tau": 0}, "tau=0"),
    ],
)
def test_bad_settings(tokenizer, changes, complaint):
    arguments = {"families": FAMILIES, "difficulties": (0, 3), **changes}
    with pytest.raises(DataError, match=complaint):
        AggregationSource(tokenizer, arguments.pop("families"), arguments.pop("difficulties"), seed=0, **arguments)
