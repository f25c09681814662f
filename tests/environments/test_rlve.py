"""RLVE-Gym through a miniature checkout with the same interface; the real one where RLVE_GYM_PATH names it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from openzaya.environments.base import Environment, Task
from openzaya.environments.rlve import PATH_VARIABLE, RlveSpec, rlve_environments
from openzaya.errors import DataError

ENVIRONMENTS = """
import os, random, time
class Sum:
    def __init__(self, answer_markers=None):
        self.markers, self.parameter = answer_markers, None
    def generator(self, seed, parameter=None, timeout_second=10):
        random.seed(seed)
        self.parameter = dict(parameter)
        if self.parameter["N"] > 9:
            return False
        self.parameter["numbers"] = [random.randint(0, 99) for _ in range(self.parameter["N"])]
        self.parameter["reference_answer"] = sum(self.parameter["numbers"])
        return True
    def prompt_generator(self):
        return f"Sum of {self.parameter['numbers']} between {self.markers[0]} and {self.markers[1]}"
    def verifier(self, output):
        answer = output.split(self.markers[0])[-1].split(self.markers[1])[0]
        score = float(answer.strip() == str(self.parameter["reference_answer"]))
        return {"reward": score - 0.25, "accuracy": int(score), "format_score": 1}
class Slow(Sum):
    def prompt_generator(self):
        while True:
            pass
class Dies(Sum):
    def verifier(self, output):
        os._exit(1)
class Raises(Sum):
    def verifier(self, output):
        raise AssertionError("score out of bounds")
identifier2environment = {"Sum": Sum, "Slow": Slow, "Dies": Dies, "Raises": Raises, "Alone": Sum}
"""
CONTROLLERS = """
class Controller:
    def __init__(self):
        self.N = 2
    def update(self):
        self.N += 1
    def get_parameter_list(self):
        return [{"N": self.N, "kind": kind} for kind in "ab"]
identifier2controller = {name: Controller for name in ("Sum", "Slow", "Dies", "Raises")}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rlve")
    for package, source in (("environments", ENVIRONMENTS), ("parameter_controllers", CONTROLLERS)):
        (path / "Gym" / package).mkdir(parents=True)
        (path / "Gym" / package / "__init__.py").write_text(source)
    (path / "Gym" / "__init__.py").write_text("")
    return path


@pytest.fixture(scope="module")
def environments(checkout: Path) -> Iterator[dict[str, Environment]]:
    made = {environment.name: environment for environment in rlve_environments(str(checkout))}
    yield made
    for environment in made.values():
        environment.close()


def gold_of(task: Task) -> int:
    return sum(map(int, task.messages[0]["content"].split("[")[1].split("]")[0].split(",")))


def test_all_environments_that_have_a_controller_are_there(environments: dict[str, Environment]) -> None:
    assert list(environments) == ["rlve/Sum", "rlve/Slow", "rlve/Dies", "rlve/Raises"]


def test_tasks_are_pure_and_grow_with_difficulty(environments: dict[str, Environment]) -> None:
    environment = environments["rlve/Sum"]
    state = random.getstate()
    for difficulty in range(4):
        tasks = [environment.task(difficulty, number) for number in range(6)]
        assert tasks == [environment.task(difficulty, number) for number in range(6)]
        assert len({task.messages[0]["content"] for task in tasks}) == 6
        assert all(task.messages[0]["content"].count(",") == 1 + difficulty for task in tasks)
        assert [Task.from_json(task.to_json()) for task in tasks] == tasks
    assert random.getstate() == state, "global generators of this process are left alone"


def test_only_one_right_answer_between_the_markers_is_rewarded(environments: dict[str, Environment]) -> None:
    environment = environments["rlve/Sum"]
    task = environment.task(3, 1)
    gold = gold_of(task)
    for response in (f"<think>so</think><answer>{gold}</answer>", f"It is <answer> {gold} </answer>."):
        assert environment.verify(task, response).reward == 1.0
    for response in (
        "",
        f"<think>{gold}",
        str(gold),
        f"<think><answer>{gold}</answer></think>",
        f"<answer>{gold + 1}</answer>",
        f"<answer>{gold + 1}</answer><answer>{gold}</answer>",
        f"<answer>{gold} or {gold + 1}</answer>",
        f"<answer>{gold}",
        "<answer></answer>",
        f"<answer>{gold}</answer>" + "x" * 200_000,
        "<answer>\ud800</answer>",
    ):
        assert environment.verify(task, response).reward == 0.0, response[:80]


def test_failures_give_no_verdict_and_errors_that_name_the_environment(environments: dict[str, Environment]) -> None:
    with pytest.raises(DataError, match=r"rlve/Sum cannot set task 0 of difficulty 8: .*generator failed"):
        environments["rlve/Sum"].task(8, 0)
    with pytest.raises(DataError, match="difficulty=-1"):
        environments["rlve/Sum"].task(-1, 0)
    environments["rlve/Slow"]._task_timeout_s = 0.2  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"rlve/Slow cannot set task 3 of difficulty 0: prompt: no answer within 0.2 s"):
        environments["rlve/Slow"].task(0, 3)
    for name, reason in (("rlve/Dies", "died"), ("rlve/Raises", "out of bounds")):
        task = environments[name].task(0, 0)
        verdict = environments[name].verify(task, "<answer>1</answer>")
        assert verdict.reward is None and reason in verdict.reason
    task = environments["rlve/Sum"].task(0, 0)
    assert environments["rlve/Sum"].verify(task, f"<answer>{gold_of(task)}</answer>").reward == 1.0, "and goes on"
    other = Task(task.environment, 0, 0, [{"role": "user", "content": "another prompt"}], task.data)
    assert environments["rlve/Sum"].verify(other, "<answer>1</answer>").reward is None
    assert environments["rlve/Raises"].verify(task, "<answer>1</answer>").reward is None
    assert environments["rlve/Sum"].verify(Task("rlve/Sum", 0, 0, [], {}), "<answer>1</answer>").reward is None
    assert environments["rlve/Sum"].verify(task, None).reward is None  # type: ignore[arg-type]


def test_names_and_paths_are_checked(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, str(checkout))
    chosen = RlveSpec(names=["S*"], exclude=["Slow"]).make()
    assert [environment.name for environment in chosen] == ["rlve/Sum"]
    first = chosen[0].task(0, 0)
    (other,) = RlveSpec(names=["Sum"], seed=1).make()
    assert other.task(0, 0) != first
    for environment in (*chosen, other):
        environment.close()
        environment.close()
    with pytest.raises(DataError, match="did you mean 'Sum'"):
        rlve_environments(names=["Summ"])
    monkeypatch.delenv(PATH_VARIABLE)
    with pytest.raises(DataError, match=f"neither path nor {PATH_VARIABLE} is set"):
        rlve_environments()
    with pytest.raises(DataError, match="holds no folder Gym/environments"):
        rlve_environments(str(tmp_path))
    for package in ("environments", "parameter_controllers"):
        (tmp_path / "Gym" / package).mkdir(parents=True)
        (tmp_path / "Gym" / package / "__init__.py").write_text("import no_such_library")
    with pytest.raises(DataError, match=r"does not run: .*no_such_library"):
        rlve_environments(str(tmp_path))
    with pytest.raises(ValidationError, match="nmes"):
        RlveSpec.model_validate({"nmes": []})


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(PATH_VARIABLE), reason=f"{PATH_VARIABLE} names no checkout")
def test_every_environment_of_the_real_checkout_rewards_its_own_answers() -> None:
    environments = rlve_environments()
    assert len(environments) == 400
    num_right = num_known = 0
    for environment in environments:
        for difficulty in (0, 3):
            task = environment.task(difficulty, 1)
            gold = environment._worker.call("gold", environment._name, difficulty, 1, timeout_s=30)  # type: ignore[attr-defined]
            assert environment.verify(task, "<answer>no</answer>").reward == 0.0
            if gold is not None:
                num_known += 1
                num_right += environment.verify(task, gold).reward == 1.0
        environment.close()
    assert num_known >= 600 and num_right >= 0.98 * num_known
