"""Instruction environments: only the right answer in all forms is rewarded, files are read strictly."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from openzaya.environments.base import Task
from openzaya.environments.instructions import (
    ConstraintEnvironment,
    ConstraintFileEnvironment,
    ConstraintsSpec,
    InstructionEnvironment,
    InstructionsSpec,
    constraints_of,
    problem_and_forms,
    solve,
)
from openzaya.errors import DataError
from openzaya.problems import TRAINED_FAMILIES, make_problem, split_of
from openzaya.problems.instructions.answer_forms import ANSWER_FORMS, get_form
from openzaya.problems.instructions.composed import draw_forms, judge, right_answer, verify_forms


def response(solution) -> str:
    return f"<think>{solution.trace}</think>{solution.answer}"


def test_gold_answers_score_and_nothing_else_does():
    environment = InstructionEnvironment()
    forms_seen = set()
    for number in range(150):
        values = json.dumps(environment.task(number % 12, number).to_json())
        assert values == json.dumps(InstructionEnvironment().task(number % 12, number).to_json())
        task = Task.from_json(json.loads(values))
        solution = solve(task)
        problem, forms = problem_and_forms(task)
        forms_seen |= {form.name for form in forms}
        right = right_answer(problem)
        assert environment.verify(task, response(solution)).reward == 1.0
        assert environment.verify(task, solution.answer).reward == 1.0
        wrong = [
            "",
            right,
            f"{solution.answer}\n{solution.answer}",
            f"{solution.answer} {right}",
            f"Sure: {solution.answer}",
            f"<think>{solution.answer}",
            f"<think>{solution.answer}</think>",
            f"{solution.answer}</think>x",
            solution.answer[::-1] + "</think>" if solution.answer[::-1] != solution.answer else "",
            task.messages[0]["content"],
            "[" * 100_000,
        ]
        for text in wrong:
            verdict = environment.verify(task, text)
            assert verdict.reward == 0.0, (task, text)
        assert "right answer, not followed" in environment.verify(task, right).reason
    assert forms_seen == set(ANSWER_FORMS)


def test_a_tag_that_appears_by_reading_backwards_earns_nothing():
    problem = make_problem("addition", 1, 0, 0, "train")
    right = right_answer(problem)
    smuggled = f"noise</think>{right}"[::-1]
    assert verify_forms(problem, [get_form("backwards")], smuggled).reward == 0.0
    assert verify_forms(problem, [get_form("backwards")], right[::-1]).reward == 1.0


def test_the_reason_tells_answer_and_forms_apart():
    problem = make_problem("addition", 1, 0, 1, "train")
    right = right_answer(problem)
    assert right != right[::-1]
    forms = [get_form("backwards"), get_form("brackets"), get_form("last_done")]
    told = {
        f"[{right[::-1]}] done": "correct",
        f"[{right}] done": "right answer, not followed: backwards",
        f"{right[::-1]} done": "right answer, not followed: brackets",
        right: "right answer, not followed: backwards, brackets, last_done",
        "[1] done": "wrong answer, all forms followed",
        "1 done": "wrong answer, not followed: brackets",
    }
    assert {text: verify_forms(problem, forms, text).reason for text in told} == told
    assert verify_forms(problem, forms[1:], "[1] done", answer_required=False).reward == 1.0


@pytest.mark.parametrize("family", TRAINED_FAMILIES)
def test_forms_come_off_again(family):
    """What judges wrong answers: a form that was put on is seen, one that is missing is reported."""
    for number in range(80):
        problem = make_problem(family, 2, 0, number, "train")
        right = right_answer(problem)
        forms = draw_forms(random.Random(number), right, 1 + number % 4)
        text = right
        for form in forms:
            text = form.apply(text)
            assert form.undo(text) is not None, (form.name, text)
        # Judged against another right answer, as a wrong answer in perfect form.
        assert all(judge("no such answer", forms, text).followed), ([form.name for form in forms], text)
        for form in forms:
            if form.checkable and form.slot not in ("layout", "case"):
                assert not form.check(right), form.name


def test_difficulty_adds_forms_then_makes_problems_harder():
    environment = InstructionEnvironment(num_forms=(1, 3))
    shapes = []
    for difficulty in range(12):
        tasks = [environment.task(difficulty, number) for number in range(8)]
        shapes.append((max(len(task.data["forms"]) for task in tasks), tasks[0].data["difficulty"]))
        assert all(split_of(task.data["canonical"]) == "train" for task in tasks)
    assert shapes == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), *((3, level) for level in range(6))]
    assert all(one <= other for one, other in pairwise(shapes))
    heldout = InstructionEnvironment(split="heldout")
    assert split_of(heldout.task(0, 0).data["canonical"]) == "heldout"
    assert environment.task(40, 0).data["difficulty"] == 34
    with pytest.raises(DataError, match="below 0"):
        environment.task(-1, 0)


def test_damaged_tasks_and_other_types_give_no_verdict():
    environment = InstructionEnvironment()
    task = environment.task(0, 0)
    for data in (
        {},
        None,
        {**task.data, "forms": ["none"]},
        {**task.data, "family": "none"},
        {**task.data, "data": []},
    ):
        assert environment.verify(replace(task, data=data), "1").reward is None
    assert environment.verify(task, None).reward is None  # type: ignore[arg-type]
    texts = ConstraintEnvironment()
    assert texts.verify(replace(texts.task(0, 0), data={"constraints": [["none", {}]]}), "x").reward is None


def test_drawn_constraints():
    environment = ConstraintEnvironment(seed=3)
    for number in range(60):
        task = Task.from_json(json.loads(json.dumps(environment.task(number % 3, number).to_json())))
        constraints = constraints_of(task)
        assert task.messages == environment.task(number % 3, number).messages
        rng = random.Random(number)
        verdict = environment.verify(task, constraints[0].violation(rng))
        assert verdict.reward == 0.0 and constraints[0].kind in verdict.reason
        assert environment.verify(task, "").reward == environment.verify(task, "<think>x").reward == 0.0
        if len(constraints) == 1:
            assert environment.verify(task, f"<think>x</think>{constraints[0].witness(rng)}").reward == 1.0
    assert len(constraints_of(environment.task(50, 1))) >= 2, "no end of difficulty, as many as go together"


def rows() -> list[dict]:
    return [
        {"prompt": "A", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"prompt": "B", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
        {
            "key": 7,
            "prompt": "C",
            "instruction_id_list": ["keywords:existence", "detectable_format:title"],
            "kwargs": [{"keywords": ["cat"], "num_words": None}, {}],
        },
    ]


def test_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())) + "\n\n")
    (environment,) = ConstraintsSpec(path=str(path), name="mine").make()
    assert [environment.task(0, number).messages[0]["content"] for number in range(3)] == ["A", "B", "A"]
    task = environment.task(9, 0)
    assert task.messages[0]["content"] == "C" and task.environment == "mine"
    assert environment.verify(task, "<think>,</think><<a cat>>").reward == 1.0
    assert environment.verify(task, "<<a dog>>") == type(environment.verify(task, ""))(
        0.0, "not followed: keywords:existence"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "list instead of an object"),
        ('{"prompt": ""}', "'prompt' is no text"),
        ('{"prompt": "a", "instruction_id_list": []}', "'instruction_id_list'"),
        ('{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}', "'kwargs'"),
        ('{"prompt": "a", "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}', "did you mean"),
        ('{"prompt": "a", "instruction_id_list": [3], "kwargs": [{}]}', "no text"),
        ('{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [3]}', "int instead of an object"),
    ],
)
def test_bad_files(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(rows()[0])}\n{line}\n")
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        ConstraintFileEnvironment(path)


def test_settings(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        ConstraintFileEnvironment(tmp_path / "none.jsonl")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        ConstraintFileEnvironment(tmp_path / "empty")
    with pytest.raises(DataError, match="both given"):
        ConstraintsSpec(path="x", constraints=["punctuation:no_comma"]).make()
    with pytest.raises(DataError, match="num_forms"):
        InstructionsSpec(num_forms=(2, 1)).make()
    with pytest.raises(DataError, match="did you mean 'brackets'"):
        InstructionsSpec(forms=["bracket"]).make()
    hard = InstructionsSpec(name="hard", num_forms=(2, 3), forms=["brackets", "hash", "backwards"]).make()[0]
    assert hard.name == "hard" and len(hard.task(0, 0).data["forms"]) == 2
