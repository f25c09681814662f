"""Answer-preserving (AP) trimming (arXiv 2605.05365): long reasoning is cut, answers never are.

For a budget of tokens, counted in the rendered chat template with all its control tokens:

1. a conversation that fits is kept unchanged;
2. else tokens are cut from the END of the LAST assistant turn's think block, exactly as many as make
   it fit (the opening tag, the start of the reasoning, the closing tag and the answer stay);
3. else the think blocks of EARLIER assistant turns are removed, and step 2 is tried again;
4. else the sample is dropped. One without any think block that does not fit is dropped too, never cut.

The cut falls between tokens, so a cut character may leave some of its bytes (byte-level BPE). Done
anew for each context length: a later phase with more room keeps more of the same conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from openzaya.data.chat import Message, Rendered, normalise, render
from openzaya.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TrimAction = Literal["kept", "tail_trimmed", "think_dropped", "dropped"]


def ap_trim(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    budget: int,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    rendered: Rendered | None = None,
) -> tuple[Rendered | None, TrimAction]:
    """Trim a conversation to ``budget`` tokens; the result is None where it was dropped.

    A conversation that was cut has exactly ``budget`` tokens. ``think_dropped`` says that step 3 ran
    (with or without a cut after it). ``rendered`` is the conversation as ``render`` gave it, where the
    caller has it already.
    """
    if budget < 1:
        raise DataError(f"budget={budget} tokens; give at least 1")
    full = rendered if rendered is not None else render(messages, tokenizer, tools=tools)
    if len(full.tokens) <= budget:
        return full, "kept"
    if (cut := cut_last_think(full, budget)) is not None:
        return cut, "tail_trimmed"
    if any(end > start for start, end in full.think_spans[:-1]):
        shorter = render(without_earlier_reasoning(messages), tokenizer, tools=tools)
        if (cut := cut_last_think(shorter, budget)) is not None:
            return cut, "think_dropped"
    return None, "dropped"


def cut_last_think(rendered: Rendered, budget: int) -> Rendered | None:
    """Cut the last assistant turn's reasoning from its end to reach ``budget`` tokens.

    One that fits is returned as it is; None means that the reasoning is shorter than the excess.
    """
    excess = len(rendered.tokens) - budget
    if excess <= 0:
        return rendered
    if not rendered.think_spans:
        return None
    start, end = rendered.think_spans[-1]
    if end - start < excess:
        return None
    tokens = rendered.tokens[: end - excess] + rendered.tokens[end:]
    loss_mask = rendered.loss_mask[: end - excess] + rendered.loss_mask[end:]
    return Rendered(tokens, loss_mask, [*rendered.think_spans[:-1], (start, end - excess)])


def without_earlier_reasoning(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation with reasoning in its last assistant turn only."""
    conversation = normalise(messages)
    last = max((i for i, message in enumerate(conversation) if message["role"] == "assistant"), default=-1)
    return [
        message if i == last else {**message, "reasoning_content": ""} if "reasoning_content" in message else message
        for i, message in enumerate(conversation)
    ]


@dataclass
class TrimReport:
    """What trimming did over a run; ``record`` one sample at a time, add reports with ``+``."""

    kept: int = 0
    tail_trimmed: int = 0
    think_dropped: int = 0
    dropped: int = 0
    tokens_in: int = 0
    """Tokens of all samples before trimming."""
    tokens_lost: int = 0
    """Tokens cut, and all tokens of dropped samples."""

    @property
    def num_samples(self) -> int:
        return self.kept + self.tail_trimmed + self.think_dropped + self.dropped

    def record(self, action: TrimAction, num_tokens_before: int, num_tokens_after: int) -> None:
        """Count one sample; ``num_tokens_after`` is 0 for a dropped one."""
        setattr(self, action, getattr(self, action) + 1)
        self.tokens_in += num_tokens_before
        self.tokens_lost += num_tokens_before - num_tokens_after

    def __add__(self, other: TrimReport) -> TrimReport:
        return TrimReport(**{key: value + getattr(other, key) for key, value in vars(self).items()})

    def as_dict(self) -> dict[str, int]:
        """The counts, as JSON-able values."""
        return dict(vars(self))

    def __str__(self) -> str:
        return (
            f"AP trimming: {self.num_samples} samples = {self.kept} kept + {self.tail_trimmed} tail-trimmed + "
            f"{self.think_dropped} think-dropped + {self.dropped} dropped; "
            f"{self.tokens_lost} of {self.tokens_in} tokens lost"
        )
