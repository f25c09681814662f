"""A candidate from logits to text: penalties, bias, ends, logprobs, and that rows know nothing of each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN, TURN_START, encode_batch
from openzaya.errors import EngineError
from openzaya.infer.choosing import Progress, SequenceState, choose
from openzaya.infer.outputs import TokenLogprob
from openzaya.infer.sampling import SamplingParams, draw, uniforms
from openzaya.infer.text import visible_text
from tests.infer.tokenizers_for_text import byte_fallback, byte_level

VOCAB_SIZE = 420
EOS = 4


def state_of(prompt: list[int] | None = None, tokenizer: Any = None, seed: int = 0, **settings: Any) -> SequenceState:
    vocab_size = settings.pop("vocab_size", VOCAB_SIZE)
    return SequenceState(
        SamplingParams(**settings),
        prompt or [],
        tokenizer=tokenizer,
        eos_token_id=EOS,
        vocab_size=vocab_size,
        seed=seed,
    )


def feed(state: SequenceState, tokens: list[int]) -> list[Progress]:
    """Until the end at the latest."""
    steps = []
    for token in tokens:
        steps.append(state.accept(TokenLogprob(token, math.nan)))
        if steps[-1].finish_reason is not None:
            break
    return steps


def text_of(steps: list[Progress]) -> str:
    return "".join(step.text for step in steps)


def encode(text: str) -> list[int]:
    return encode_batch(byte_level(), [text])[0]


# --- the draw --------------------------------------------------------------------------------------


def test_penalties_and_bias_by_hand() -> None:
    state = state_of(
        [1, 2, 2],
        vocab_size=6,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={0: 10.0, 3: -1.5},
    )
    feed(state, [2, 3, 3])
    logits = torch.tensor([1.0, -1.0, 4.0, 3.0, 2.0, -math.inf])
    before = logits.clone()
    adjusted = state.adjust(logits)
    # prompt only: repetition; generated once: all three; generated twice: frequency twice; then the bias
    wanted = [1 + 10, -1 * 2, 4 / 2 - 0.5 - 0.25, 3 / 2 - 0.5 - 0.5 - 1.5, 2, -math.inf]
    torch.testing.assert_close(adjusted, torch.tensor(wanted))
    assert torch.equal(logits, before)


def test_without_settings_the_logits_are_not_copied() -> None:
    logits = torch.randn(VOCAB_SIZE)
    assert state_of().adjust(logits) is logits
    assert state_of(tokenizer=byte_level(), stop=("a",), logprobs=3).adjust(logits) is logits


@pytest.mark.parametrize(
    "setting",
    [{"logit_bias": {7: 100.0}}, {"presence_penalty": -2.0}, {"thinking_budget": 9, "tokenizer": 1}, {}],
    ids=str,
)
def test_each_setting_alone_reaches_the_choice(setting: dict[str, Any]) -> None:
    tokenizer = byte_level() if setting.pop("tokenizer", None) else None
    state = state_of(tokenizer=tokenizer, temperature=0, **setting)
    feed(state, [7])
    assert state.is_plain == (not setting)
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 3] = 1
    wanted = 7 if {"logit_bias", "presence_penalty"} & set(setting) else 3
    assert [chosen.token for chosen in choose(logits, [state, state])] == [wanted] * 2


def test_penalties_of_many_tokens() -> None:
    tokens = [token % 300 for token in range(700)]
    state = state_of(frequency_penalty=0.01, presence_penalty=-1, max_new_tokens=10_000, ignore_eos=True)
    feed(state, tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE)
    torch.testing.assert_close(state.adjust(torch.zeros(VOCAB_SIZE)), (counts > 0).float() - 0.01 * counts)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_k": 20},
    {"top_p": 1.0, "logprobs": 5},
    {"min_p": 0.1, "presence_penalty": 1.5, "logprobs": 0},
    {"repetition_penalty": 1.3, "logit_bias": {7: 5.0}},
    {"min_new_tokens": 5, "stop_token_ids": (9,)},
    {"tokenizer": byte_level, "json_schema": True},
    {"tokenizer": byte_level, "thinking_budget": 0},
]


def make_states() -> list[SequenceState]:
    prompt = encode(f"{TURN_START}assistant\n{THINK_OPEN}")
    states = []
    for seed, settings in enumerate(SETTINGS):
        tokenizer = settings["tokenizer"]() if "tokenizer" in settings else None
        rest = {name: value for name, value in settings.items() if name != "tokenizer"}
        states.append(state_of(prompt, tokenizer, seed, max_new_tokens=1000, **rest))
    return states


def test_a_row_does_not_depend_on_the_others() -> None:
    together, alone = make_states(), make_states()
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        logits = 2 * torch.randn(len(together), VOCAB_SIZE, generator=generator)
        logits[:, EOS] = -30
        before = logits.clone()
        order = torch.randperm(len(together), generator=generator).tolist()
        chosen = choose(logits[order], [together[row] for row in order])
        assert torch.equal(logits, before)
        for place, row in enumerate(order):
            single = choose(logits[row : row + 1], [alone[row]])[0]
            assert repr(single) == repr(chosen[place])
            together[row].accept(chosen[place])
            alone[row].accept(single)
    assert len({tuple(state.tokens) for state in together}) == len(SETTINGS)


@given(st.integers(-(2**70), 2**70), st.integers(1, 300))
def test_draws_are_those_of_the_seeds_uniform_numbers(seed, step) -> None:
    state = state_of(seed=seed, max_new_tokens=1000)
    feed(state, [7] * step)
    logits = torch.linspace(0, 3, VOCAB_SIZE)[None]
    uniform = uniforms([seed], step + 1)[:, step]
    assert state.uniform == uniform.item()
    assert choose(logits, [state])[0].token == int(draw(logits, state.params, uniform))
    assert choose(logits, [state])[0].token == choose(logits, [state])[0].token


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 0.5]])
    own = logits[0].log_softmax(0)
    settings = {"temperature": 0.0, "logit_bias": {1: 50.0}, "repetition_penalty": 3.0, "vocab_size": 6}
    chosen = choose(logits, [state_of([3], logprobs=3, **settings)])[0]
    assert chosen.token == 1 and chosen.logprob == pytest.approx(own[1].item())
    assert [token for token, _ in chosen.top] == [3, 1, 2]
    assert [value for _, value in chosen.top] == pytest.approx(own[[3, 1, 2]].tolist())
    assert choose(logits, [state_of(logprobs=0, **settings)])[0].top == ()
    assert math.isnan(choose(logits, [state_of(**settings)])[0].logprob)
    assert len(choose(logits, [state_of(logprobs=20, **settings)])[0].top) == 6


def test_a_forced_token_has_the_models_logprob() -> None:
    prompt = encode(f"{TURN_START}assistant\n{THINK_OPEN}")
    state = state_of(prompt, byte_level(), thinking_budget=0, logprobs=1)
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits, [state])[0]
    assert [chosen.token] == encode(THINK_CLOSE)
    assert chosen.logprob == pytest.approx(logits[0].log_softmax(0)[chosen.token].item())
    assert state.accept(chosen).text == THINK_CLOSE
    assert choose(logits, [state])[0].token != chosen.token


def test_logits_that_are_no_numbers_do_not_stop_the_engine() -> None:
    rows = torch.full((4, VOCAB_SIZE), math.nan)
    rows[1] = -math.inf
    rows[2, 5] = math.inf
    rows[3] = 0
    rows[3, 6] = math.nan
    for settings in (
        {},
        {"temperature": 0},
        {"presence_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"min_new_tokens": 2},
    ):
        states = [state_of(**settings) for _ in range(4)]
        chosen = choose(rows, states)
        assert all(0 <= token.token < VOCAB_SIZE for token in chosen)
        assert chosen[2].token == 5 and chosen[3].token != 6
    state = state_of([], byte_level(), json_schema=True)
    assert choose(rows[1:2], [state])[0].token in (*encode("{"), *encode(THINK_OPEN))


# --- the end ---------------------------------------------------------------------------------------


def test_the_end_of_turn_and_stop_ids() -> None:
    assert feed(state_of(), [7, EOS])[-1] == Progress("", "stop", None, False)
    assert feed(state_of(stop_token_ids=(9,)), [7, 9])[-1] == Progress("", "stop", 9, False)
    assert feed(state_of(stop_token_ids=(EOS,), ignore_eos=True), [EOS])[-1] == Progress("", "stop", EOS, False)
    state = state_of(tokenizer=byte_level(), ignore_eos=True, max_new_tokens=3)
    steps = feed(state, [*encode("a"), EOS, EOS, EOS])
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    assert text_of(steps) == "a" and state.tokens == [*encode("a"), EOS, EOS]


def test_the_length_is_reached_with_the_last_token() -> None:
    state = state_of(max_new_tokens=2)
    assert feed(state, [7, 8])[-1] == Progress("", "length", None, True)
    assert state.tokens == [7, 8]


def test_no_end_before_the_least_number_of_tokens() -> None:
    state = state_of(min_new_tokens=3, stop_token_ids=(9,), temperature=0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, EOS], logits[0, 9], logits[0, 7] = 9, 8, 7
    tokens = []
    while True:
        chosen = choose(logits, [state])[0]
        tokens.append(chosen.token)
        if state.accept(chosen).finish_reason:
            break
    assert tokens == [7, 7, 7, EOS]
    state = state_of(tokenizer=byte_level(), min_new_tokens=3, stop=("a",), max_new_tokens=9)
    steps = feed(state, encode("a")[:1] * 9)
    assert text_of(steps) == "aa" and len(state.tokens) == 3 and steps[-1].stop == "a"


@given(st.text(alphabet="ab日🙂", max_size=20), st.lists(st.text("ab日🙂", min_size=1, max_size=3), max_size=3))
def test_stop_strings_across_tokens_and_characters(text, stops) -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        tokens = encode_batch(tokenizer, [text])[0]
        for include in (False, True):
            state = state_of(
                tokenizer=tokenizer, stop=tuple(stops), include_stop=include, ignore_eos=True, max_new_tokens=1000
            )
            steps = feed(state, tokens)
            ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
            shown = text_of(steps) + (state.flush() if not steps or steps[-1].finish_reason is None else "")
            if ends:
                stop = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
                assert shown == text[: ends[0] - (0 if include else len(stop))]
                if steps[-1].finish_reason is not None:
                    assert (steps[-1].finish_reason, steps[-1].stop, steps[-1].kept) == ("stop", stop, True)
            else:
                assert shown == text


def test_held_back_text_comes_with_the_end() -> None:
    half = encode("🙂")[0]
    for last in (EOS, 9):
        state = state_of(tokenizer=byte_level(), stop=("abc",), stop_token_ids=(9,))
        steps = feed(state, [*encode("xab"), half, last])
        assert text_of(steps) == "xab�" and steps[-1].finish_reason == "stop" and not steps[-1].kept
    state = state_of(tokenizer=byte_level(), stop=("abc",), max_new_tokens=len(encode("xab")))
    assert text_of(feed(state, encode("xab"))) == "xab"
    state = state_of(tokenizer=byte_level(), stop=("abc",))
    assert text_of(feed(state, encode("xab"))) + state.flush() == "xab" and state.flush() == ""


def test_a_stop_string_that_is_completed_by_a_broken_character() -> None:
    state = state_of(tokenizer=byte_level(), stop=("a�",))
    steps = feed(state, [*encode("xa"), encode("🙂")[0], EOS])
    assert text_of(steps) == "x" and steps[-1].stop == "a�"


def test_budget_and_stop_string_together() -> None:
    state = state_of(encode(f"{TURN_START}assistant\n"), byte_level(), thinking_budget=2, stop=("zz",))
    wanted = [*encode(THINK_OPEN), *encode("abcdezz")]
    text, step = "", None
    while step is None or step.finish_reason is None:
        token = state.forced if state.forced is not None else wanted.pop(0)
        step = state.accept(TokenLogprob(token, math.nan))
        text += step.text
    assert text == "<think>ab</think>cde" and step.stop == "zz"
    assert visible_text(byte_level(), state.tokens) == "<think>ab</think>cdezz"


@pytest.mark.parametrize(
    "settings",
    [
        {"stop": ("a",)},
        {"thinking_budget": 3},
        {"json_schema": True},
        {"grammar": "start: /a/"},
        {"logit_bias": {VOCAB_SIZE: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"stop_token_ids": (VOCAB_SIZE,)},
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_at_once(settings) -> None:
    with pytest.raises(EngineError):
        state_of(**settings)
