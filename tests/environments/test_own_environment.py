"""The environment that docs/environments.md writes as an example works as the document says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from openzaya.errors import DataError

DOCUMENT = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(blocks[0], str(DOCUMENT), "exec", dont_inherit=True), names)
    return names


def test_it_comes_from_a_recipe_and_rewards_the_right_answer_only(example: dict[str, Any]) -> None:
    [environment] = example["BackwardsSpec"].model_validate({"kind": "backwards", "seed": 3}).make()
    task = environment.task(2, 5)
    assert task == example["Backwards"](3).task(2, 5) and len(task.data["word"]) == 6
    right = task.data["word"][::-1]
    assert environment.verify(task, f"<think>from the end</think>{right}").reward == 1
    for wrong in ("", "<think></think>", task.data["word"] + "x", f"{right} {right}", f"the answer is {right}"):
        assert environment.verify(task, wrong).reward == 0, wrong


def test_failures_give_no_verdict(example: dict[str, Any]) -> None:
    environment = example["Backwards"]()
    task = environment.task(0, 0)
    assert environment.verify(task, None).reward is None
    with pytest.raises(DataError):
        environment.task(-1, 0)
