"""Constrained answers: whatever the logits, they follow their schema; a schema that cannot be used is refused."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN, TURN_START, encode_batch
from openzaya.errors import DataError
from openzaya.infer.choosing import SequenceState, choose
from openzaya.infer.constraint import MAX_INDENT, make_constraint
from openzaya.infer.sampling import SamplingParams
from tests.infer.tokenizers_for_text import byte_fallback, byte_level

VOCAB_SIZE = 420
"""More than the tokenizers have: ids that stand for nothing."""
TOKENIZERS = pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=["byte level", "byte fallback"])
HEADER = f"{TURN_START}assistant\n"


class Point(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    x: int = Field(ge=-5, le=120)
    kind: Literal["näive", "b c"]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(max_length=6)
    closed: bool | None
    points: list[Point] = Field(min_length=1, max_length=2)


def write(
    make: Any, params: SamplingParams, prompt: str = HEADER + "<think></think>", seed: int = 0, script: str = ""
) -> tuple[str, str, SequenceState]:
    """Text and finish reason under random logits, which favour the end of turn; ``script`` is wanted first."""
    tokenizer = make()
    eos: int = tokenizer.eos_token_id
    prompt_tokens = encode_batch(tokenizer, [prompt])[0]
    state = SequenceState(
        params, prompt_tokens, tokenizer=tokenizer, eos_token_id=eos, vocab_size=VOCAB_SIZE, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    wanted = encode_batch(tokenizer, [script])[0]
    text = ""
    while True:
        logits = 3 * torch.randn(1, VOCAB_SIZE, generator=generator)
        logits[0, eos] = 9
        if len(state.tokens) < len(wanted):
            logits[0, wanted[len(state.tokens)]] = 40
        progress = state.accept(choose(logits, [state])[0])
        text += progress.text
        if progress.finish_reason is not None:
            return text, progress.finish_reason, state


@TOKENIZERS
def test_every_answer_validates_against_its_schema(make) -> None:
    params = SamplingParams(json_schema=Shape.model_json_schema(), max_new_tokens=1000, top_p=1)
    texts = set()
    for seed in range(25):
        text, reason, _ = write(make, params, seed=seed)
        assert reason == "stop"
        Shape.model_validate_json(text)
        texts.add(text)
    assert len(texts) > 20


def test_true_is_any_object_and_text_is_a_schema() -> None:
    for seed in range(5):
        text, reason, _ = write(byte_level, SamplingParams(json_schema=True, max_new_tokens=3000), seed=seed)
        assert reason == "stop" and isinstance(json.loads(text), dict)
        text, _, _ = write(byte_level, SamplingParams(json_schema='{"type": "integer"}', max_new_tokens=50), seed=seed)
        assert isinstance(json.loads(text), int)


def test_the_end_of_turn_comes_only_where_the_answer_may_end() -> None:
    params = SamplingParams(grammar="start: /[0-9]{3,5}/", temperature=0)
    assert [len(write(byte_level, params, seed=seed)[0]) for seed in range(4)] == [3] * 4
    longer = params.model_copy(update={"min_new_tokens": 4})
    text, reason, _ = write(byte_level, longer)
    assert len(text) == 4 and reason == "stop"
    # A grammar that is complete ends the answer even where more tokens were asked for, or EOS is to be ignored.
    for changes in ({"min_new_tokens": 50}, {"ignore_eos": True, "min_new_tokens": 50}):
        text, reason, state = write(byte_level, params.model_copy(update=changes))
        assert (len(text), reason, len(state.tokens)) == (5, "stop", 5)
    empty = SamplingParams(grammar='start: ""', min_new_tokens=5)
    assert write(byte_level, empty)[:2] == ("", "stop")
    text, reason, _ = write(byte_level, params.model_copy(update={"ignore_eos": True}))
    assert len(text) == 3 and reason == "stop"


def test_blanks_come_to_an_end() -> None:
    tokenizer = byte_level()
    constraint = make_constraint(
        SamplingParams(json_schema=True), tokenizer, vocab_size=VOCAB_SIZE, eos_token_id=tokenizer.eos_token_id
    )
    assert constraint is not None
    blank, line, brace = (encode_batch(tokenizer, [text])[0][0] for text in (" ", "\n", "{"))
    constraint.push(brace)
    assert constraint.allowed()[blank]
    constraint.push(line)
    for _ in range(MAX_INDENT):
        assert constraint.allowed()[blank] and not constraint.allowed()[line]
        constraint.push(blank)
    assert not constraint.allowed()[blank] and constraint.allowed().any()


def test_json_may_be_compact_spaced_or_indented() -> None:
    value = {"x": 5, "kind": "b c"}
    params = SamplingParams(json_schema=Point.model_json_schema(), max_new_tokens=300)
    for text in (json.dumps(value, separators=(",", ":")), json.dumps(value), json.dumps(value, indent=4)):
        assert write(byte_level, params, script=text)[0] == text


@TOKENIZERS
@pytest.mark.parametrize("seed", range(3))
def test_the_schema_holds_for_what_follows_the_reasoning(make, seed) -> None:
    params = SamplingParams(json_schema=Shape.model_json_schema(), max_new_tokens=1000)
    reasoning = f"{THINK_OPEN}the: {{no JSON{THINK_CLOSE}"
    text, reason, _ = write(make, params, HEADER, seed, script=reasoning)
    assert text.startswith(reasoning) and reason == "stop"
    Shape.model_validate_json(text.removeprefix(reasoning))


@TOKENIZERS
def test_budget_and_schema_together(make) -> None:
    """The turn cannot end while reasoning is open (the logits favour it); the budget closes it."""
    params = SamplingParams(json_schema=Shape.model_json_schema(), max_new_tokens=1000, thinking_budget=9)
    for seed, (prompt, script) in enumerate(((HEADER, THINK_OPEN), (HEADER + THINK_OPEN, ""))):
        text, reason, state = write(make, params, prompt, seed, script=script)
        reasoning, close, answer = text.partition(THINK_CLOSE)
        assert reason == "stop" and close and reasoning.startswith(script)
        Shape.model_validate_json(answer)
        assert len(state.tokens) > 9
    assert write(make, params.model_copy(update={"thinking_budget": 0}), HEADER + THINK_OPEN)[0].startswith(THINK_CLOSE)


@TOKENIZERS
def test_a_turn_that_does_not_open_with_reasoning_is_all_answer(make) -> None:
    params = SamplingParams(json_schema=Shape.model_json_schema(), max_new_tokens=1000, top_p=1)
    for seed in range(6):
        text, _, _ = write(make, params, HEADER, seed, script="{")
        Shape.model_validate_json(text)


def test_a_grammar_that_begins_like_a_tag_of_several_tokens_keeps_its_text() -> None:
    params = SamplingParams(grammar='start: "<a>" /[0-9]/', max_new_tokens=30)
    assert write(byte_fallback, params, HEADER, script="<")[0].startswith("<a>")


def test_the_rest_of_the_token_that_closes_the_reasoning_counts() -> None:
    """``>{`` is one token: the brace is the answer's first character."""
    tokenizer = byte_fallback()
    params = SamplingParams(json_schema=Point.model_json_schema(), max_new_tokens=200)
    tokens = encode_batch(tokenizer, ["<think>a</think>{"])[0]
    assert tokenizer.convert_tokens_to_ids(">{") in tokens
    text, reason, _ = write(byte_fallback, params, HEADER, script="<think>a</think>{")
    Point.model_validate_json(text.removeprefix("<think>a</think>"))
    assert reason == "stop"


def test_stop_strings_and_length_end_a_constrained_answer_early() -> None:
    params = SamplingParams(json_schema=Shape.model_json_schema(), max_new_tokens=1000, stop=('"points"',))
    text, reason, _ = write(byte_level, params)
    assert reason == "stop" and not text.endswith('"') and '"points"' not in text
    text, reason, state = write(byte_level, params.model_copy(update={"max_new_tokens": 5}))
    assert reason == "length" and len(state.tokens) == 5


NESTED: dict[str, Any] = {}
for _ in range(5000):
    NESTED = {"items": NESTED}


@pytest.mark.parametrize(
    "setting",
    [
        {"json_schema": "{"},
        {"json_schema": "[]"},
        {"json_schema": "12"},
        {"json_schema": "\ud800"},
        {"json_schema": '{"const": "\\ud800"}'},
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"$ref": "#/nowhere"}},
        {"json_schema": {"$ref": "https://example.com/schema"}},
        {"json_schema": {"type": "string", "pattern": "(a"}},
        {"json_schema": {"type": "integer", "minimum": 5, "maximum": 1}},
        {"json_schema": {"enum": []}},
        {"json_schema": {"not": {"type": "string"}}},
        {"json_schema": {"const": float("nan")}},
        {"json_schema": {"const": {1, 2}}},
        {"json_schema": NESTED},
        {"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000},
        {"json_schema": {"enum": ["x" * 200_000]}},
        {"json_schema": {"anyOf": [{"properties": {f"k{n}": {"type": "string"}}} for n in range(2200)]}},
        {"grammar": ""},
        {"grammar": "start: /[0-9"},
        {"grammar": "start: start"},
        {"grammar": "start: missing"},
        {"grammar": "\ud800"},
        {"grammar": "x" * 200_000},
    ],
    ids=lambda setting: repr(setting)[:60] if setting != {"json_schema": NESTED} else "nested",
)
def test_schemas_that_cannot_be_used_are_refused_at_once(setting) -> None:
    tokenizer = byte_level()
    begun = time.monotonic()
    with pytest.raises(DataError, match=next(iter(setting))) as error:
        make_constraint(
            SamplingParams(**setting), tokenizer, vocab_size=VOCAB_SIZE, eos_token_id=tokenizer.eos_token_id
        )
    assert len(str(error.value)) < 600
    assert time.monotonic() - begun < 60


def test_candidates_share_the_compiled_grammar_and_nothing_else() -> None:
    tokenizer = byte_level()
    params = SamplingParams(grammar='start: "ab" | "cd"')
    first, second = (make_constraint(params, tokenizer, vocab_size=VOCAB_SIZE, eos_token_id=4) for _ in range(2))
    assert first is not None and second is not None
    a, c = (encode_batch(tokenizer, [letter])[0][0] for letter in "ac")
    first.push(a)
    assert second.allowed()[c] and not first.allowed()[c]
    first.push(a)
    assert first.has_failed and not second.has_failed and not first.allowed().any()


def test_requests_of_several_threads_can_be_made_at_once() -> None:
    failures: list[BaseException] = []

    def ask(thread: int) -> None:
        try:
            for number in range(20):
                params = SamplingParams(json_schema={"const": f"{number % 7}"}, max_new_tokens=20)
                assert json.loads(write(byte_level, params, seed=thread)[0]) == f"{number % 7}"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


@pytest.mark.parametrize("token", [4, 100], ids=["end of turn", "another"])
def test_a_parser_that_gives_up_ends_the_answer_as_cut_off(token) -> None:
    params = SamplingParams(json_schema=True, max_new_tokens=50, temperature=0)
    tokenizer = byte_level()
    prompt = encode_batch(tokenizer, [HEADER + "<think></think>"])[0]
    state = SequenceState(params, prompt, tokenizer=tokenizer, eos_token_id=4, vocab_size=VOCAB_SIZE, seed=0)
    assert state._constraint is not None
    state._constraint.push(encode_batch(tokenizer, ["x"])[0][0])
    chosen = choose(torch.eye(VOCAB_SIZE)[token : token + 1], [state])[0]
    assert chosen.token == token
    assert state.accept(chosen).finish_reason == "length"
