"""The prompt stream: shares, turns, levels, aggregation prompts, and a state that continues it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from pydantic import ValidationError

from openzaya.data.tokenizer import train_tokenizer
from openzaya.errors import DataError
from openzaya.problems import TRAINED_FAMILIES
from openzaya.rl.prompts import PromptStream
from openzaya.rl.recipe import PromptSource
from openzaya.rl.rollout import Group, prompt_of
from tests.rl.scripted import group, rollout


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user\nassistant\n0 1 2 3 4 5 6 7 8 9 + - * = a b c"] * 40, 300)


def problems(*families, seed=3):
    return [{"kind": "problems", "families": list(families or TRAINED_FAMILIES), "seed": seed}]


def stream(tokenizer, *sources, max_prompt_tokens=400, seed=0):
    made = [PromptSource(**source) for source in sources]
    return PromptStream(made, tokenizer, group_size=4, max_prompt_tokens=max_prompt_tokens, seed=seed)


def source(name="a", **values):
    return {"name": name, "environments": problems("addition", "sorting"), **values}


def test_turns_levels_and_numbers(tokenizer):
    orders = [one.next() for one in [stream(tokenizer, source(difficulties=(2, 4)))] for _ in range(60)]
    assert Counter(order.task.environment for order in orders) == {"addition": 30, "sorting": 30}
    assert {order.task.difficulty for order in orders} == {2, 3, 4}
    asked = [(order.task.environment, order.task.difficulty, order.task.number) for order in orders]
    assert len(set(asked)) == len(asked)
    assert [order.number for order in orders] == list(range(60))
    assert len({order.seed for order in orders}) == 60


def test_weights_are_shares(tokenizer):
    one = stream(tokenizer, source("a", weight=3), source("b", weight=1), source("c", weight=0))
    counts = Counter(one.next().source for _ in range(400))
    assert set(counts) == {"a", "b"} and 250 < counts["a"] < 350


def test_online_difficulty_follows_plain_groups_at_the_current_level(tokenizer):
    one = stream(tokenizer, source(curriculum="online", start=2, max_difficulty=3))
    online = one.sources["a"].online
    order = next(order for order in iter(one.next, None) if order.task.environment == "addition")
    assert order.task.difficulty == 2
    one.finished(group(order, [1, 1, 1, 0]))
    assert online["addition"].difficulty == 3 and online["sorting"].difficulty == 2
    one.finished(group(order, [1, 1, 1, 1]))  # made at level 2, which is the past
    assert online["addition"].difficulty == 3
    harder = next(order for order in iter(one.next, None) if order.task.environment == "addition")
    one.finished(group(harder, [1, 1, 1, 1]))
    assert online["addition"].difficulty == 3, "max_difficulty"
    one.finished(group(harder, [None, None, None, None]))
    assert online["addition"].difficulty == 3, "no verdict says nothing"
    one.finished(group(harder, [0, 0, 0, None]))
    assert online["addition"].difficulty == 2


def remembered(order, texts, rewards):
    made = [rollout(reward, text=text) for reward, text in zip(rewards, texts, strict=True)]
    return Group(order, group(order, [0]).prompt_tokens, made)


@pytest.mark.parametrize("form", ["tails", "answers"])
def test_aggregation_prompts_show_the_policys_own_rollouts(tokenizer, form):
    aggregation = {f"{form}_share": 1.0, "num_candidates": (2, 2), "tau": 3, "solve_rates": (0.1, 0.9)}
    one = stream(tokenizer, source(aggregation=aggregation))
    first = one.next()
    assert first.form == "plain", "nothing is remembered yet"
    texts = [f"<think>x x x x a{i}</think>b{i}" for i in range(4)]
    one.finished(remembered(first, texts, [0, 0, 0, 0]))
    assert one.next().form == "plain", "solve rate below the range"
    one.finished(remembered(first, texts, [1, 0, 0, 0]))
    order = one.next()
    assert order.form == form and order.task.data == first.task.data
    prompt = order.task.messages[-1]["content"]
    assert prompt.startswith(first.task.messages[-1]["content"])
    shown = [i for i in range(4) if (f"a{i}" if form == "tails" else f"b{i}") in prompt]
    assert len(shown) == 2
    assert "x x x x" not in prompt and ("b0" not in prompt if form == "tails" else "a0" not in prompt)
    one.finished(remembered(order, texts, [1, 0, 0, 0]))
    assert not one.sources["a"].memory, "a group is shown once, and only plain ones are remembered"
    assert one.next().form == "plain"


def test_prompts_that_are_too_long_become_easier(tokenizer):
    whole = stream(tokenizer, source(environments=problems("sorting"), difficulties=(40, 40)))
    length = len(prompt_of(whole.next().task, tokenizer))
    short = stream(
        tokenizer, source(environments=problems("sorting"), difficulties=(40, 40)), max_prompt_tokens=length - 20
    )
    order = short.next()
    assert order.task.difficulty < 40 and len(prompt_of(order.task, tokenizer)) <= length - 20
    assert short.num_eased == 1
    with pytest.raises(DataError, match="difficulty 0"):
        stream(tokenizer, source(), max_prompt_tokens=3).next()


def test_tasks_that_cannot_be_set_become_easier(tokenizer, monkeypatch):
    one = stream(tokenizer, source(environments=problems("sorting"), difficulties=(5, 5)))
    (environment,) = one.environments["a"].values()
    original = environment.task

    def task(difficulty, number):
        if difficulty > 3:
            raise DataError(f"the generator took too long for difficulty {difficulty}")
        return original(difficulty, number)

    monkeypatch.setattr(environment, "task", task)
    assert one.next().task.difficulty == 3 and one.num_eased == 1
    assert one.task("a", environment.name, 4, 0) is None and one.task("a", environment.name, 3, 0) is not None
    monkeypatch.setattr(environment, "task", lambda difficulty, number: task(9, number))
    with pytest.raises(DataError, match="took too long for difficulty 9"):
        one.next()


def test_an_online_difficulty_that_cannot_be_set_comes_down(tokenizer, monkeypatch):
    one = stream(tokenizer, source(environments=problems("sorting"), curriculum="online", start=6))
    (environment,) = one.sources["a"].environments.values()
    original = environment.task

    def task(difficulty, number):
        if difficulty > 4:
            raise DataError("too hard to make")
        return original(difficulty, number)

    monkeypatch.setattr(environment, "task", task)
    order = one.next()
    assert order.task.difficulty == 4
    one.finished(group(order, [0.0] * 4))
    assert one.next().task.difficulty == 3, "what was asked counts, so it goes on down from there"


def test_state_continues_the_stream(tokenizer):
    recipe = (
        source("a", curriculum="online", start=1, aggregation={"tails_share": 0.4}),
        source("b", environments=problems()),
    )

    def walk(one, num):
        orders = []
        for _ in range(num):
            order = one.next()
            orders.append(order)
            one.finished(group(order, [1, 0, 1, float(order.number % 2)]))
        return orders

    whole, first = stream(tokenizer, *recipe), stream(tokenizer, *recipe)
    expected = walk(whole, 40)
    assert walk(first, 17) == expected[:17]
    state = json.loads(json.dumps(first.state_dict()))
    second = stream(tokenizer, *recipe)
    second.load_state_dict(state)
    again = walk(second, 23)
    assert [json.dumps(order.to_json()) for order in again] == [json.dumps(order.to_json()) for order in expected[17:]]
    assert any(order.form == "tails" for order in again)


def test_bad_sources(tokenizer):
    with pytest.raises(DataError, match="weight 0"):
        stream(tokenizer, source(weight=0))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"difficulties": (7, 0)}, "difficulties="),
        ({"difficulties": (-2, 3)}, "difficulties="),
        ({"curriculum": "online", "start": -1}, "start=-1"),
        ({"curriculum": "online", "max_difficulty": -1}, "max_difficulty"),
        ({"aggregation": {"tails_share": 0.5, "solve_rates": (0.95, 0.0)}}, "solve_rates="),
        ({"aggregation": {"tails_share": 0.5, "num_candidates": (0, 2)}}, "num_candidates="),
    ],
)
def test_levels_and_rates_that_cannot_be_are_refused_with_the_recipe(values, complaint):
    with pytest.raises(ValidationError, match=complaint):
        PromptSource(**source(**values))
