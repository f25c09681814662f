"""Reasoning inside ``<think>...</think>``: where it is open, and the hard budget that closes it.

A turn is *undecided* until its first token, *reasoning* inside the tags and *answering* after them. What the prompt
holds of the turn counts: a prompt that ends with ``<think>`` begins reasoning, one with ``<think></think>`` answering.
Where a turn does not open with ``<think>``, all of it is the answer; a tag later on opens reasoning again unless the
answer is constrained.

The budget counts tokens between the tags, over all blocks of a completion. At the limit ``</think>`` is forced, and
``<think>`` is no longer possible. Tags that are single tokens are recognised by their ids; for other tokenizers they
are looked for in the text, and a tag that the model is in the middle of writing is completed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN, TURN_START, encode_batch
from openzaya.infer.text import visible_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Phase = Literal["undecided", "reasoning", "answering"]


class Thinking:
    """Follows one candidate through reasoning and answer.

    Args:
        answer_only: the answer is constrained: once it has begun, no tag opens reasoning again.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt_tokens: Sequence[int],
        *,
        budget: int | None,
        answer_only: bool,
    ):
        self._tokenizer, self._budget, self._answer_only = tokenizer, budget, answer_only
        self.open_tokens, self._close_tokens = encode_batch(tokenizer, [THINK_OPEN, THINK_CLOSE])
        self._by_id = len(self.open_tokens) == 1 and len(self._close_tokens) == 1
        self._num_tokens = 0
        self._is_spent = False
        self._tail = ""
        self.forced: deque[int] = deque()
        """Tokens that come next, whatever the model says."""
        self.rest = ""
        """Text behind the closing tag that came in the same token (tags of several tokens only)."""
        self.phase: Phase = self._phase_of(prompt_tokens)
        self._spend()

    @property
    def banned(self) -> Sequence[int]:
        """Tokens that cannot come next: behind a block that the budget has closed, opening or closing another one."""
        is_over = self._by_id and self._is_spent and self.phase == "answering"
        return [*self.open_tokens, *self._close_tokens] if is_over else ()

    def push(self, token: int, text: str) -> None:
        """Take the next token and the text that it made final."""
        if self.forced and token == self.forced[0]:
            self.forced.popleft()
        self.rest = ""
        if self.phase == "reasoning":
            self._num_tokens += 1
            if self._sees(self._close_tokens, THINK_CLOSE, token, text):
                self.phase = "answering"
                self._num_tokens -= 1
                self.forced.clear()
        elif not (self._answer_only and self.phase == "answering") and self._sees(
            self.open_tokens, THINK_OPEN, token, text
        ):
            self.phase = "reasoning"
        elif self.phase == "undecided" and (self._by_id or not self._may_open()):
            self.phase = "answering"
        self._spend()

    def open(self) -> None:
        """The model began an opening tag, perhaps of several tokens: it is completed."""
        self.forced.extend(self.open_tokens[1:])

    def answer(self) -> None:
        """The model began the answer without reasoning."""
        self.phase = "answering"

    def _spend(self) -> None:
        if self.phase != "reasoning" or self._budget is None or self._num_tokens < self._budget or self.forced:
            return
        self._is_spent = True
        begun = next((n for n in range(len(THINK_CLOSE) - 1, 0, -1) if self._tail.endswith(THINK_CLOSE[:n])), 0)
        self.forced.extend(encode_batch(self._tokenizer, [THINK_CLOSE[begun:]])[0] if begun else self._close_tokens)

    def _sees(self, tag_tokens: Sequence[int], tag: str, token: int, text: str) -> bool:
        if self._by_id:
            return token == tag_tokens[0]
        self._tail += text
        start = self._tail.find(tag)
        if start < 0:
            self._tail = self._tail[-len(THINK_CLOSE) + 1 :]
            return False
        self.rest, self._tail = self._tail[start + len(tag) :], ""
        return True

    def _may_open(self) -> bool:
        return THINK_OPEN.startswith(self._tail)

    def _phase_of(self, prompt_tokens: Sequence[int]) -> Phase:
        """By the last tag of the prompt's last turn (of all of it where there are no turns)."""
        turn = list(prompt_tokens)
        start = encode_batch(self._tokenizer, [TURN_START])[0]
        if len(start) == 1 and start[0] in turn:
            turn = turn[len(turn) - turn[::-1].index(start[0]) :]
        if self._by_id:
            tags = [token for token in turn if token in (self.open_tokens[0], self._close_tokens[0])]
            if not tags:
                return "undecided"
            return "reasoning" if tags[-1] == self.open_tokens[0] else "answering"
        text = visible_text(self._tokenizer, turn)
        opened, closed = text.rfind(THINK_OPEN), text.rfind(THINK_CLOSE)
        if opened == closed:
            return "undecided"
        return "reasoning" if opened > closed else "answering"
