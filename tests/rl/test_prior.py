"""What the starting policy solves decides where a stage begins: difficulties of online sources."""

from __future__ import annotations

import json

import pytest

from openzaya.data.tokenizer import train_tokenizer
from openzaya.rl.prior import apply_prior
from openzaya.rl.prompts import PromptStream
from openzaya.rl.recipe import RLConfig
from tests.rl.scripted import ScriptedPool


@pytest.mark.parametrize("max_difficulty", [2, None])
def test_a_stage_begins_where_its_file_says(max_difficulty: int | None) -> None:
    source = {
        "name": "online",
        "environments": [{"kind": "problems", "families": ["addition", "sorting"]}],
        "curriculum": "online",
        "max_difficulty": max_difficulty,
    }
    config = RLConfig(model={"start_from": "00-start"}, sources=[source], prior={"queries": 6, "rollouts": 4})
    tokenizer = train_tokenizer(["user\nassistant\n0 1 2 3 4 5 6 7 8 9 + - * = a b c"] * 40, 300)
    prompts = PromptStream(config.sources, tokenizer, group_size=4, max_prompt_tokens=4000, seed=0)
    pool = ScriptedPool(lambda order: [float(order.task.difficulty < 5)] * 4)
    found = apply_prior(config, prompts, pool)
    fits = json.loads(json.dumps(found))["calibration"]["online"]
    assert set(fits) == {"addition", "sorting"}
    for name, fit in fits.items():
        assert prompts.sources["online"].online[name].difficulty == fit["difficulty"]
        assert fit["middle"] > 3, "the estimate is told, whatever the limit"
        assert fit["difficulty"] == (max_difficulty or round(fit["middle"]))
