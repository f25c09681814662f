"""reasoning-gym's data sets as environments: curricula, binary rewards, and scorers that reward too much."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from openzaya.environments import reasoning_gym as adapter
from openzaya.environments.base import Environment, Task
from openzaya.environments.reasoning_gym import ReasoningGymSpec
from openzaya.errors import DataError


@pytest.fixture(scope="module")
def environments() -> Iterator[dict[str, Environment]]:
    pytest.importorskip("reasoning_gym")
    made = {environment.name: environment for environment in ReasoningGymSpec().make()}
    yield made
    for environment in made.values():
        environment.close()


def gold(environment: Environment, task: Task) -> str | None:
    arguments = (environment._name, task.data["level"], task.number)  # type: ignore[attr-defined]
    return environment._worker.call("gold", *arguments, timeout_s=30)  # type: ignore[attr-defined]


def test_every_data_set_is_an_environment(environments: dict[str, Environment]) -> None:
    assert len(environments) >= 105
    assert {"reasoning-gym/chain_sum", "reasoning-gym/knights_knaves"} <= environments.keys()


@pytest.mark.parametrize(
    "name", ["chain_sum", "number_sorting", "spell_backward", "word_sorting", "gsm_symbolic", "caesar_cipher", "lcm"]
)
def test_own_answers_are_right_and_others_are_not(environments: dict[str, Environment], name: str) -> None:
    environment = environments[f"reasoning-gym/{name}"]
    for difficulty in (0, 3, 100):
        task = environment.task(difficulty, 1)
        assert environment.task(difficulty, 1) == task
        answer = gold(environment, task)
        others = [gold(environment, environment.task(difficulty, number)) for number in range(2, 12)]
        wrong = next(other for other in others if other != answer)
        assert answer and wrong
        assert environment.verify(task, f"<think>{wrong}</think>\n{answer}\n").reward == 1.0
        for response in (
            "",
            f"<think>{answer}",
            f"<think>{answer}</think>",
            wrong,
            f"{wrong} or {answer}",
            f"{answer} or {wrong}",
            f"{wrong}\n{answer}",
            f"The answer is {answer}.",
            f"{answer} {answer}",
            "1 " * 20_000,
            "\u0661" * 50,
        ):
            assert environment.verify(task, response).reward == 0.0, response[:80]


def test_a_level_makes_tasks_harder(environments: dict[str, Environment]) -> None:
    environment = environments["reasoning-gym/chain_sum"]
    num_signs = [
        sum(environment.task(difficulty, n).messages[0]["content"].count(" + ") for n in range(30))
        for difficulty in (0, 3)
    ]
    assert num_signs[1] > num_signs[0]
    assert environment.task(10**9, 5).messages == environment.task(10**6, 5).messages


def test_partial_credit_is_no_reward(environments: dict[str, Environment]) -> None:
    environment = environments["reasoning-gym/propositional_logic"]
    task = environment.task(0, 0)
    score, _ = environment._worker.call("score", "propositional_logic", 0, 0, "nonsense", timeout_s=10)  # type: ignore[attr-defined]
    assert 0 < score < 1, "the library gives points for any text"
    assert environment.verify(task, "nonsense").reward == 0.0


def test_a_scorer_that_takes_any_text_is_replaced(environments: dict[str, Environment]) -> None:
    environment = environments["reasoning-gym/game_of_life_halting"]
    task = environment.task(0, 1)
    answer = gold(environment, task)
    assert environment.verify(task, str(answer)).reward == 1.0
    for response in ("zzz", f"{answer} {answer}", str(answer != "True"), "True or False"):
        assert environment.verify(task, response).reward == 0.0


def test_a_scorer_that_cannot_read_an_answer_has_judged_it(environments: dict[str, Environment]) -> None:
    environment = environments["reasoning-gym/prime_factorization"]
    task = environment.task(0, 1)
    assert environment.verify(task, str(gold(environment, task))).reward == 1.0
    assert environment.verify(task, "no numbers here").reward == 0.0


def test_data_sets_whose_answers_can_be_guessed_can_be_left_out(environments: dict[str, Environment]) -> None:
    hard_to_guess = ReasoningGymSpec(guessable=False).make()
    left_out = environments.keys() - {environment.name for environment in hard_to_guess}
    assert left_out == {f"reasoning-gym/{name}" for name in adapter.GUESSABLE}
    for environment in hard_to_guess:
        environment.close()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'openzaya\[environments\]'"):
        ReasoningGymSpec().make()
    monkeypatch.undo()
    if importlib.util.find_spec("reasoning_gym") is not None:
        with pytest.raises(DataError, match="did you mean 'chain_sum'"):
            ReasoningGymSpec(names=["chainsum"]).make()
