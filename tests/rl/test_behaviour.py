"""The behavioural reward: nothing for what does not obey, more than nothing for what does, scores in a chat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from openzaya.environments.base import Environment, Task
from openzaya.environments.families import FamilyEnvironment
from openzaya.errors import DataError
from openzaya.problems import Verdict
from openzaya.rl.behaviour import LARGEST_SCORE, BehaviourConfig, BehaviourReward, make_scorer, positive
from openzaya.rl.judge import Judge
from openzaya.rl.reward_model import RewardModel
from tests.rl.test_reward_model import make as make_reward_model
from tests.train import miniature


class Says(Environment):
    """Obeyed by what ends in ``ok``; gives no verdict on ``?``."""

    name = "says"

    def task(self, difficulty: int, number: int) -> Task:
        return Task(self.name, difficulty, number, [{"role": "user", "content": "say ok"}], None)

    def verify(self, task: Task, response: str) -> Verdict:
        return Verdict(None if "?" in response else float(response.endswith("ok")), "")


class Lengths:
    """Scores a response by its length; none for those with an ``x``."""

    def __init__(self, factor: float = 0.1) -> None:
        self.asked: list[list[str]] = []
        self.factor = factor

    def score_group(self, messages: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> list[float | None]:
        self.asked.append(list(responses))
        return [None if "x" in text else self.factor * len(text) for text in responses]


GATE = Says()
CHAT = FamilyEnvironment("sorting")
ENVIRONMENTS = {"says": GATE, "sorting": CHAT}


def verdicts_of(responses: Sequence[str]) -> list[float | None]:
    return [GATE.verify(GATE.task(0, 0), response).reward for response in responses]


def reward(scorer: Any) -> BehaviourReward:
    return BehaviourReward(scorer, ENVIRONMENTS, chat=["sorting"])


def test_the_gate_gives_zero_to_what_does_not_obey_whatever_its_score() -> None:
    scorer = Lengths()
    responses = ["very long and friendly", "ok", "quite ok", "what?", "x ok"]
    found = reward(scorer).score_group(GATE.task(0, 0), responses, verdicts_of(responses))
    assert found == [0.0, positive(0.2), positive(0.8), None, None]
    assert scorer.asked == [["ok", "quite ok", "x ok"]], "what fails is not sent to be scored"


def test_known_verdicts_are_taken_and_must_be_as_many() -> None:
    found = reward(Lengths()).score_group(GATE.task(0, 0), ["a", "b", "c"], [1.0, 0.0, None])
    assert found == [positive(0.1), 0.0, None]
    with pytest.raises(DataError, match="2 verdicts for 3 responses"):
        reward(Lengths()).score_group(GATE.task(0, 0), ["a", "b", "c"], [1.0, 0.0])


def test_a_chat_takes_the_score_and_no_answer_is_the_worst() -> None:
    scorer = Lengths()
    responses = ["<think>a</think>fine", "<think>endless", "", "ax", "b" * 500]
    found = reward(scorer).score_group(CHAT.task(0, 0), responses, [0.0] * 5)
    assert found == [pytest.approx(positive(2.0)), 0.0, 0.0, None, positive(LARGEST_SCORE)]
    assert min(positive(-LARGEST_SCORE), found[0]) > 0, "a verbatim loop's 0 must be the lowest"
    assert scorer.asked == [[responses[0], responses[3], responses[4]]]


def test_a_score_that_is_no_number_is_no_verdict() -> None:
    for factor in (math.nan, math.inf):
        assert reward(Lengths(factor)).score_group(CHAT.task(0, 0), ["a"], [0.0]) == [None]
        assert reward(Lengths(factor)).score_group(GATE.task(0, 0), ["ok", "no"], [1.0, 0.0]) == [None, 0.0]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ok", "no", "what?", ""]), st.floats(-99, 99)), max_size=16))
def test_obedience_comes_before_every_score(group: list[tuple[str, float]]) -> None:
    class Given:
        def score_group(self, messages: Any, responses: Sequence[str]) -> list[float | None]:
            values = {place: score for place, (text, score) in enumerate(group) if text == "ok"}
            return list(values.values())

    texts = [text for text, _ in group]
    found = reward(Given()).score_group(GATE.task(0, 0), texts, verdicts_of(texts))
    for (text, _), value in zip(group, found, strict=True):
        if text == "ok":
            assert value is not None and 0 < value < 1
        else:
            assert value == (0.0 if text in ("no", "") else None)
    by_score = sorted((score, value) for (text, score), value in zip(group, found, strict=True) if text == "ok")
    assert [value for _, value in by_score] == sorted(value for _, value in by_score)


def test_unknown_environments_are_refused() -> None:
    with pytest.raises(DataError, match="chat names sortng"):
        BehaviourReward(Lengths(), ENVIRONMENTS, chat=["sortng"])
    with pytest.raises(DataError, match="environment 'counting'; this reward knows: says, sorting"):
        reward(Lengths()).score_group(FamilyEnvironment("counting").task(0, 0), ["a"], [1.0])
    assert reward(Lengths()).score_group(GATE.task(0, 0), [], []) == []


def test_the_recipe_names_one_scorer(tmp_path: Path) -> None:
    judge = {"base_url": "http://localhost:1/v1"}
    for values in ({}, {"reward_model": "07-rm", "judge": judge}):
        with pytest.raises(ValidationError, match="either reward_model or judge"):
            BehaviourConfig.model_validate(values)
    scorer = make_scorer(BehaviourConfig.model_validate({"judge": judge}), tmp_path)
    assert isinstance(scorer, Judge)
    scorer.close()
    make_reward_model().save(tmp_path / "07-rm" / "model")
    signs: list[str] = []
    scorer = make_scorer(BehaviourConfig(reward_model="07-rm"), tmp_path, on_wait=lambda: signs.append("alive"))
    assert isinstance(scorer, RewardModel)
    found = BehaviourReward(scorer, ENVIRONMENTS).score_group(GATE.task(0, 0), ["ok", "no", "very ok"], [1.0, 0.0, 1.0])
    assert signs, "while it scores, its process must not be taken for a dead one"
    assert found[1] == 0.0 and 0 < found[0] < 1 and 0 < found[2] < 1 and found[0] != found[2]
    assert len(miniature.tokenizer()) <= scorer.model.config.vocab_size
