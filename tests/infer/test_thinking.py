"""Where reasoning is open, and the budget that closes it, for tags of one token and of several."""

from __future__ import annotations

from typing import Any

import pytest

from openzaya.data.chat import render
from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN, TURN_START, encode_batch
from openzaya.infer.text import Detokeniser, visible_text
from openzaya.infer.thinking import Thinking
from tests.infer.tokenizers_for_text import byte_fallback, byte_level

TOKENIZERS = pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=["one token", "several tokens"])
HEADER = f"{TURN_START}assistant\n"


def encode(tokenizer: Any, text: str) -> list[int]:
    return encode_batch(tokenizer, [text])[0]


def follow(make: Any, prompt: str, text: str, budget: int | None, answer_only: bool = False) -> tuple[str, Thinking]:
    """What comes of a model that wants to write ``text``: forced tokens come before its next one."""
    tokenizer = make()
    thinking = Thinking(tokenizer, encode(tokenizer, prompt), budget=budget, answer_only=answer_only)
    detokeniser, wanted, written = Detokeniser(tokenizer), encode(tokenizer, text), []
    while wanted or thinking.forced:
        token = thinking.forced[0] if thinking.forced else wanted.pop(0)
        if token in thinking.banned:
            continue
        written.append(token)
        thinking.push(token, detokeniser.push(token))
        assert len(written) < 200
    return visible_text(tokenizer, written), thinking


@TOKENIZERS
@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        (HEADER, "undecided"),
        (HEADER + "<think></think>", "answering"),
        (HEADER + "<think>", "reasoning"),
        (HEADER + "<think>first the", "reasoning"),
        (HEADER + "<think>the</think>The", "answering"),
        (HEADER + "<think></think>the<|im_end|>\n" + HEADER, "undecided"),
        (HEADER + "<think>the<|im_end|>\n" + HEADER, "undecided"),
        ("the", "undecided"),
        ("<think>the", "reasoning"),
        ("", "undecided"),
    ],
)
def test_what_the_prompt_settles(make, prompt, phase) -> None:
    tokenizer = make()
    assert Thinking(tokenizer, encode(tokenizer, prompt), budget=None, answer_only=False).phase == phase


def test_the_chat_template_settles_it() -> None:
    tokenizer = byte_level()
    messages = [{"role": "user", "content": "the <think>"}, {"role": "assistant", "content": "the"}] * 2
    for enabled, phase in ((True, "undecided"), (False, "answering")):
        prompt = render(messages[:3], tokenizer, add_generation_prompt=True, enable_thinking=enabled).tokens
        assert Thinking(tokenizer, prompt, budget=None, answer_only=False).phase == phase


@TOKENIZERS
def test_the_budget_closes_the_block_and_the_answer_goes_on(make) -> None:
    tokenizer = make()
    reasoning = "a b c d e f g h"
    for budget in (1, 3, 7):
        shown, thinking = follow(make, HEADER, f"{THINK_OPEN}{reasoning}", budget)
        inside = shown[len(THINK_OPEN) : shown.index(THINK_CLOSE)]
        assert len(encode(tokenizer, inside)) == budget and reasoning.startswith(inside)
        assert thinking.phase == "answering"
        # What the model wrote next is the answer.
        assert shown == THINK_OPEN + inside + THINK_CLOSE + reasoning[len(inside) :]


@TOKENIZERS
def test_a_budget_of_zero_closes_at_once(make) -> None:
    assert follow(make, HEADER, f"{THINK_OPEN}", 0)[0] == "<think></think>"
    assert follow(make, HEADER + THINK_OPEN, "", 0)[0] == "</think>"
    assert follow(make, HEADER + "<think></think>", "the", 0)[0] == "the"
    assert follow(make, HEADER, "the", 0)[0] == "the"


@TOKENIZERS
def test_a_block_that_ends_in_time_is_left_alone(make) -> None:
    text = f"{THINK_OPEN}a b{THINK_CLOSE}the answer that goes on"
    assert follow(make, HEADER, text, 12)[0] == text
    assert follow(make, HEADER, text, None)[0] == text


def test_a_spent_budget_opens_no_other_block() -> None:
    text = f"{THINK_OPEN}abcdef{THINK_OPEN}gh"
    for budget in (0, 2):
        shown, thinking = follow(byte_level, HEADER, text, budget)
        assert shown.count(THINK_OPEN) == shown.count(THINK_CLOSE) == 1
        assert thinking.phase == "answering"


def test_the_budget_counts_all_blocks() -> None:
    text = f"{THINK_OPEN}ab{THINK_CLOSE}x{THINK_OPEN}cdef"
    assert follow(byte_level, HEADER, text, 4)[0] == "<think>ab</think>x<think>cd</think>ef"


def test_a_tag_that_is_being_written_is_completed() -> None:
    """Tags of several tokens: the budget ends in the middle of the model's own closing tag."""
    for begun in ("<", "</"):
        assert follow(byte_fallback, HEADER + THINK_OPEN, f"ab{begun}", 3)[0] == "ab</think>"
    assert follow(byte_fallback, HEADER + THINK_OPEN, "abc", 3)[0] == "abc</think>"


def test_tags_are_found_across_tokens_and_the_rest_of_the_token_is_kept() -> None:
    tokenizer = byte_fallback()
    glued = tokenizer.convert_tokens_to_ids(">{")
    thinking = Thinking(tokenizer, encode(tokenizer, HEADER + THINK_OPEN), budget=None, answer_only=True)
    for token, text in ((encode(tokenizer, "</")[0], "</"), (encode(tokenizer, "think")[0], "think"), (glued, ">{")):
        assert thinking.phase == "reasoning"
        thinking.push(token, text)
    assert thinking.phase == "answering" and thinking.rest == "{"


def test_a_constrained_answer_opens_nothing() -> None:
    text = f'{{"a": "{THINK_OPEN}"}}'
    for make in (byte_level, byte_fallback):
        assert follow(make, HEADER, text, 0, answer_only=True)[1].phase == "answering"
        assert follow(make, HEADER + "<think></think>", text, 0, answer_only=True)[0] == text
