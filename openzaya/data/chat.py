"""Rendering conversations: messages to tokens, loss mask and think spans, in one call.

Our chat template (``chat_template.jinja``) is ChatML-like, with a think block in every assistant turn
and tools in ZAYA1's XML form (arXiv 2605.05365); transformers' Jinja environment renders it. All
borders between scaffold and assistant text are control tokens, so what a model generated and what is
rendered later from its text share every token.

    <bos><|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n<think>...</think>...<|im_end|>\\n

The mask covers what the assistant writes: ``<think>`` to ``<|im_end|>``. An assistant turn without
reasoning has an empty think block that the prompt holds (``enable_thinking=False``), so that block is
not supervised. Control strings in messages and tools become ordinary tokens: before rendering, an
unused noncharacter is put after the first character of each; after rendering, the text is cut there
and the pieces are encoded apart.

A tokenizer with a template of its own works too: the mask is taken from its ``{% generation %}`` marks,
else from rendering the growing prefixes of the conversation (with the generation prompt before each
assistant turn); where the prefixes do not nest, that is an error, not a guess.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from openzaya.data.messages import Message, normalise
from openzaya.data.tokenizer import (
    THINK_CLOSE,
    THINK_OPEN,
    TURN_END,
    TURN_START,
    control_pattern,
    encode_batch,
    encode_with_offsets,
    is_own_template,
)
from openzaya.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    ``loss_mask[t]`` is true where token ``t`` was written by an assistant turn (a training target,
    predicted from the tokens before it). ``think_spans`` holds, for each assistant turn, the token
    indices [start, end) of the reasoning, tags not included; start = end where there is none.
    """

    tokens: list[int]
    loss_mask: list[bool]
    think_spans: list[tuple[int, int]]


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> Rendered:
    """Render one conversation; it begins with exactly one BOS where the tokenizer has one.

    A message is ``{"role", "content"}``; an assistant's may have ``reasoning_content`` (or a content
    that begins with ``<think>...</think>``) and ``tool_calls`` in OpenAI's form. ``tools`` are JSON
    schemas. Raises ``DataError`` for anything else, or where a foreign template gives no mask.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; load one with chat_template.jinja, or set it")
    conversation = normalise(messages)
    conversation, schemas, guard = _guard(conversation, list(tools) if tools else None, tokenizer)
    render_text = partial(_render_text, tokenizer=tokenizer, tools=schemas, enable_thinking=enable_thinking)
    if is_own_template(tokenizer):
        text, _ = render_text(conversation, add_generation_prompt=add_generation_prompt, track=False)
        pieces = [text] if guard is None else [piece for piece in text.split(guard) if piece]
        tokens = [token for piece in encode_batch(tokenizer, pieces) for token in piece]
        return _from_own_template(tokens, _layout(tokenizer))
    return _from_foreign_template(conversation, tokenizer, render_text, add_generation_prompt, guard)


def render_many(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    tools: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
) -> list[Rendered]:
    """``render`` of each conversation, token for token, several times faster for our own template.

    ``tools`` has one entry (schemas or None) a conversation.
    """
    if tools is not None and len(tools) != len(conversations):
        raise DataError(
            f"tools has {len(tools)} entries for {len(conversations)} conversations; give one each, or None"
        )
    if not tokenizer.chat_template or not is_own_template(tokenizer):
        return [
            render(messages, tokenizer, tools=tools[i] if tools else None) for i, messages in enumerate(conversations)
        ]
    results: list[Rendered | None] = [None] * len(conversations)
    plain: list[int] = []
    normalised: list[list[dict[str, Any]]] = []
    pattern = control_pattern(tokenizer)
    for i, messages in enumerate(conversations):
        conversation = normalise(messages)
        if (tools is not None and tools[i]) or _holds_control_strings(conversation, pattern):
            results[i] = render(messages, tokenizer, tools=tools[i] if tools else None)
        else:
            plain.append(i)
            normalised.append(conversation)
    if plain:
        texts, _ = _render_texts(normalised, tokenizer=tokenizer, tools=None)
        layout = _layout(tokenizer)
        for i, tokens in zip(plain, encode_batch(tokenizer, texts), strict=True):
            results[i] = _from_own_template(tokens, layout)
    return [rendered for rendered in results if rendered is not None]


# --- control strings in users' text ------------------------------------------------------------------


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with ``change`` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _holds_control_strings(conversation: list[dict[str, Any]], pattern: re.Pattern[str]) -> bool:
    for message in conversation:
        if pattern.search(message["content"]) is not None:
            return True
        if pattern.search(message.get("reasoning_content", "")) is not None:
            return True
        if (
            "tool_calls" in message
            and pattern.search(json.dumps(message["tool_calls"], ensure_ascii=False)) is not None
        ):
            return True
    return False


def _guard(
    conversation: list[dict[str, Any]], tools: list[Any] | None, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[dict[str, Any]], list[Any] | None, str | None]:
    """Put a noncharacter after the first character of each control string; None where there is none."""
    pattern = control_pattern(tokenizer)
    everything = json.dumps([conversation, tools], ensure_ascii=False, default=str)
    if pattern.search(everything) is None:
        return conversation, tools, None
    guard = next((character for character in NONCHARACTERS if character not in everything), None)
    if guard is None:
        raise DataError("a conversation holds control strings and all noncharacters U+FDD0..U+FDEF; remove the latter")

    def break_strings(text: str) -> str:
        position = 0
        while (match := pattern.search(text, position)) is not None:
            cut = match.start() + 1
            text = text[:cut] + guard + text[cut:]
            position = cut + 1
        return text

    guarded = [
        {key: value if key == "role" else _map_strings(value, break_strings) for key, value in message.items()}
        for message in conversation
    ]
    return guarded, _map_strings(tools, break_strings) if tools else tools, guard


# --- templates -------------------------------------------------------------------------------------


def _render_texts(
    conversations: list[list[dict[str, Any]]],
    *,
    tokenizer: PreTrainedTokenizerFast,
    tools: list[Any] | None,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
    track: bool = False,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Texts and, with ``track``, the character spans of the template's generation blocks."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    try:
        rendered: Any = render_jinja_template(
            conversations=conversations,
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=track,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
            **special_tokens,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"the chat template refused the conversation: {error}; change the messages") from None
    texts, spans = rendered
    return texts, spans


def _render_text(conversation: list[dict[str, Any]], **settings: Any) -> tuple[str, list[tuple[int, int]]]:
    texts, spans = _render_texts([conversation], **settings)
    return texts[0], list(spans[0]) if spans else []


@dataclass(frozen=True)
class _Layout:
    """Ids by which an assistant turn of our template is found."""

    turn_start: int
    turn_end: int
    think_open: int
    think_close: int
    assistant_header: list[int]
    """What follows the turn's start: the role and a newline, then the think tag."""


def _layout(tokenizer: PreTrainedTokenizerFast) -> _Layout:
    cached = tokenizer.__dict__.get("_openzaya_layout")
    if cached is None:
        start, end, opening, closing = (
            encode_batch(tokenizer, [tag])[0][0] for tag in (TURN_START, TURN_END, THINK_OPEN, THINK_CLOSE)
        )
        header = encode_batch(tokenizer, ["assistant\n"])[0]
        cached = _Layout(start, end, opening, closing, [*header, opening])
        tokenizer.__dict__["_openzaya_layout"] = cached
    return cached


def _from_own_template(tokens: list[int], layout: _Layout) -> Rendered:
    """Mask and spans from the positions of control tokens, which only the template can have written."""
    loss_mask = [False] * len(tokens)
    spans: list[tuple[int, int]] = []
    header = layout.assistant_header
    position = 0
    while True:
        try:
            position = tokens.index(layout.turn_start, position) + 1
        except ValueError:
            break
        if tokens[position : position + len(header)] != header:
            continue
        start = position + len(header)
        try:
            close = tokens.index(layout.think_close, start)
            end = tokens.index(layout.turn_end, close) + 1
        except ValueError:
            break  # the generation prompt
        first = start - 1 if close > start else close + 1
        loss_mask[first:end] = [True] * (end - first)
        spans.append((start, close))
        position = end
    return Rendered(tokens, loss_mask, spans)


def _from_foreign_template(
    conversation: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    render_text: Callable[..., tuple[str, list[tuple[int, int]]]],
    add_generation_prompt: bool,
    guard: str | None,
) -> Rendered:
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else tokenizer.get_chat_template()
    if "reasoning_content" not in template:
        # The template knows no reasoning field: it gets the think block as part of the content.
        conversation = [_reasoning_in_content(message) for message in conversation]
    tracks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    text, turns = render_text(conversation, add_generation_prompt=add_generation_prompt, track=tracks)
    if not tracks:
        turns = _turns_by_prefix(conversation, render_text, text, tokenizer.eos_token)

    tokens: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    origin = 0
    for piece in [text] if guard is None else text.split(guard):
        ids, offsets = encode_with_offsets(tokenizer, piece)
        tokens += ids
        starts += [origin + start for start, _ in offsets]
        ends += [origin + end for _, end in offsets]
        origin += len(piece) + 1
    bos = tokenizer.bos_token_id
    if bos is not None and tokens[:1] != [bos]:
        tokens.insert(0, bos)
        starts.insert(0, -1)
        ends.insert(0, -1)
    while bos is not None and tokens[:2] == [bos, bos]:
        del tokens[0], starts[0], ends[0]

    loss_mask = [False] * len(tokens)
    spans = []
    previous_end = 0
    for start_character, end_character in turns:
        # As transformers does, a token that spans the turn's first character belongs to the turn.
        start, end = bisect_right(ends, start_character), bisect_left(starts, end_character)
        loss_mask[start:end] = [True] * (end - start)
        close = text.find(THINK_CLOSE, start_character, end_character)
        opening = text.rfind(THINK_OPEN, previous_end, close) if close >= 0 else -1
        if opening >= 0:
            # Tokens wholly between the tags: cutting them leaves the tags as they are.
            first = bisect_left(starts, opening + len(THINK_OPEN))
            spans.append((first, max(first, bisect_right(ends, close))))
        else:
            spans.append((start, start))
        previous_end = end_character
    return Rendered(tokens, loss_mask, spans)


def _reasoning_in_content(message: dict[str, Any]) -> dict[str, Any]:
    if "reasoning_content" not in message:
        return message
    merged = {key: value for key, value in message.items() if key != "reasoning_content"}
    merged["content"] = f"{THINK_OPEN}{message['reasoning_content']}{THINK_CLOSE}{message['content']}"
    return merged


def _turns_by_prefix(
    conversation: list[dict[str, Any]],
    render_text: Callable[..., tuple[str, list[tuple[int, int]]]],
    text: str,
    eos_token: str | None,
) -> list[tuple[int, int]]:
    """Character spans of the assistant turns, by rendering the conversation up to and with each."""
    turns = []
    for i, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise DataError(
                "messages[0] is an assistant turn, and this chat template marks none; begin with a user turn"
            )
        before, _ = render_text(conversation[:i], add_generation_prompt=True, track=False)
        after, _ = render_text(conversation[: i + 1], add_generation_prompt=False, track=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"messages[{i}]: this chat template renders a turn differently once others follow, so its mask cannot "
                "be found; add {% generation %} marks to the template, or train on one assistant turn at a time"
            )
        end = len(after)
        if eos_token and (last := after.rfind(eos_token, len(before))) >= 0:
            end = last + len(eos_token)  # the newline after the closing token is the template's
        turns.append((len(before), end))
    return turns
