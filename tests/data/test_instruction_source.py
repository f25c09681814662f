"""Instruction problems as a training source: complying and careless demonstrations, in a mixture."""

from __future__ import annotations

import pytest

from openzaya.data.instruction_source import InstructionSource
from openzaya.data.mixture import Source
from openzaya.data.recipe import DataConfig, build_mixture
from openzaya.errors import DataError
from openzaya.problems import TRAINED_FAMILIES, Problem, make_problem, split_of
from openzaya.problems.instructions.answer_forms import ANSWER_FORMS
from openzaya.problems.instructions.composed import Judgement, judge, right_answer
from openzaya.problems.verify import split_response

FAMILIES = list(TRAINED_FAMILIES)
USER = "<bos><|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
FORM_OF = {form.phrase: form for form in ANSWER_FORMS.values()}


def judged(tokenizer, source, index, family, difficulty, seed) -> tuple[Judgement, int]:
    """The judgement of an item's demonstration, and its number of forms, both read from the text alone."""
    prompt, response = tokenizer.decode(source.example(index).tokens).split(ASSISTANT)
    question, _, wishes = prompt.removeprefix(USER).rpartition("\n")
    problem: Problem = make_problem(family, difficulty, seed, index, "train")
    assert question == problem.prompt and split_of(problem.canonical) == "train"
    places = sorted((wishes.index(phrase), form.name) for phrase, form in FORM_OF.items() if phrase in wishes)
    forms = [ANSWER_FORMS[name] for _, name in places]
    assert wishes == " ".join(form.phrase for form in forms)
    answer = split_response(response.removesuffix("<|im_end|>\n"))[1]
    return judge(right_answer(problem), forms, answer), len(forms)


def test_random_access_equals_the_stream_and_resumes(tokenizer):
    source, other = (InstructionSource(tokenizer, FAMILIES, (0, 2), seed=5) for _ in range(2))
    assert isinstance(source, Source)
    stream = [source.next_example() for _ in range(300)]
    assert [other.example(i) for i in (299, 0, 256, 255)] == [stream[i] for i in (299, 0, 256, 255)]
    other.load_state_dict({"index": 200, "too_long": 0})
    assert [other.next_example() for _ in range(10)] == stream[200:210]
    assert InstructionSource(tokenizer, FAMILIES, (0, 2), seed=6).example(0) != stream[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_ignoring_every_demonstration_complies(tokenizer, family):
    source = InstructionSource(tokenizer, [family], (1, 1), seed=3, num_forms=(1, 3), ignore_share=0.0)
    seen = [judged(tokenizer, source, index, family, 1, 3) for index in range(60)]
    assert all(judgement.complete for judgement, _ in seen)
    assert {num for _, num in seen} == {1, 2, 3}


def test_the_share_that_ignores_forms_keeps_the_right_answer(tokenizer):
    source = InstructionSource(tokenizer, ["sorting"], (1, 1), seed=4, num_forms=(1, 2), ignore_share=0.4)
    seen = [judged(tokenizer, source, index, "sorting", 1, 4) for index in range(300)]
    assert all(judgement.right for judgement, _ in seen)
    assert 0.3 < sum(not judgement.complete for judgement, _ in seen) / 300 < 0.5
    partly = [judgement.followed for judgement, num in seen if num == 2 and not judgement.complete]
    assert {(False, False), (True, False), (False, True)} == set(partly)


def test_wrong_solutions_are_formed_too(tokenizer):
    source = InstructionSource(
        tokenizer, ["addition"], (2, 2), seed=4, num_forms=1, forms=["brackets"], ignore_share=0.0, wrong_share=1.0
    )
    seen = [judged(tokenizer, source, index, "addition", 2, 4)[0] for index in range(60)]
    assert sum(judgement.right for judgement in seen) < 30 and all(judgement.followed == (True,) for judgement in seen)


def test_a_recipe_names_it(tokenizer):
    config = DataConfig.model_validate(
        {"sources": [{"kind": "instructions", "num_forms": [1, 2], "ignore_share": 0.3}]}
    )
    mixture = build_mixture(config, tokenizer, 256)
    drawn = [mixture.next_example() for _ in range(20)]
    assert all(len(example.tokens) <= 256 for example in drawn)
    alone = InstructionSource(tokenizer, FAMILIES, (0, 2), seed=0, num_forms=(1, 2), ignore_share=0.3)
    assert drawn == [alone.next_example() for _ in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_forms": 0}, "num_forms=0"),
        ({"num_forms": (3, 1)}, "lower first"),
        ({"ignore_share": 1.5}, "ignore_share=1.5"),
        ({"forms": ["bracket"]}, "did you mean 'brackets'"),
        ({"forms": ["backwards"]}, "add one that changes every answer"),
        ({"style": "poem"}, "unknown style 'poem'"),
    ],
)
def test_wrong_settings_are_refused(tokenizer, settings, message):
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        InstructionSource(tokenizer, FAMILIES, (0, 2), seed=1, **settings)
