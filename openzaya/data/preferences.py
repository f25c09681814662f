"""Preference pairs: two conversations with one beginning, the first of them better than the second.

A pair comes from the user's files (``PairFileSource``) or is generated (``preference_problems.py``). It travels
through the mixture of sources as one example, both conversations one behind the other, so that shares, cursors and
resuming are those of all training data. ``PairBatches`` packs the conversations of whole pairs into windows of one
micro-batch; a conversation's score is taken at its last token, the only one that its loss mask marks.

Held-out pairs are never trained on: which side a pair is on depends on its prompt alone.

Shapes: B windows, T tokens a window, P pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openzaya.data.chat import Rendered, render_many
from openzaya.data.documents import DocumentStream, Record, find_files
from openzaya.data.messages import normalise
from openzaya.data.mixture import Example, Mixture
from openzaya.data.packing import Batch, assign, fill_window
from openzaya.errors import DataError
from openzaya.problems import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTS_PER_BLOCK = 32
HELD_OUT_SHARE = 1 / 8

Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class PairExample(Example):
    """Both conversations of a pair: the chosen one's tokens, then the rejected one's."""

    num_chosen: int
    """Tokens of the chosen conversation."""
    kind: str = ""
    """What is wrong with the rejected one, or where the pair is from; for reports."""

    @property
    def conversations(self) -> tuple[list[int], list[int]]:
        """Chosen and rejected."""
        return self.tokens[: self.num_chosen], self.tokens[self.num_chosen :]


def make_pair(chosen: Sequence[int], rejected: Sequence[int], kind: str = "") -> PairExample:
    """A pair of two conversations in tokens; ``DataError`` where one is empty."""
    if not chosen or not rejected:
        raise DataError(f"a pair has {len(chosen)} and {len(rejected)} tokens; give two conversations")
    mask = [False] * (len(chosen) + len(rejected))
    mask[len(chosen) - 1] = mask[-1] = True
    return PairExample([*chosen, *rejected], mask, len(chosen), kind)


def scored_form(messages: Sequence[Mapping[str, Any]], *, with_reasoning: bool) -> Conversation:
    """A conversation as a reward model reads it: in one form, and without reasoning where it is not to see any.

    Raises:
        DataError: no conversation, or one that does not end with the assistant.
    """
    conversation = normalise(messages)
    if conversation[-1]["role"] != "assistant":
        raise DataError(f"the last message is of role '{conversation[-1]['role']}'; end with the assistant's")
    if with_reasoning:
        return conversation
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in conversation]


def render_pairs(
    pairs: Sequence[tuple[Conversation, Conversation]], tokenizer: PreTrainedTokenizerFast, *, with_reasoning: bool
) -> list[tuple[Rendered, Rendered]]:
    """Both conversations of each pair as tokens."""
    both = [scored_form(messages, with_reasoning=with_reasoning) for pair in pairs for messages in pair]
    rendered = render_many(both, tokenizer)
    return list(zip(rendered[::2], rendered[1::2], strict=True))


class PairFileSource:
    """Pairs of the user's, one JSON object a record (JSONL or parquet).

    ``chosen`` and ``rejected`` are a text, one assistant message, the messages behind the prompt, or the whole
    conversation. ``prompt`` (a text) or ``messages`` is what both begin with; it may be left out where they are
    whole. An optional ``kind`` is for reports. Pairs of the other split, and those with a conversation longer than
    ``context_length`` tokens, are passed over and counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        *,
        paths: str | Path | Sequence[str | Path],
        seed: int = 0,
        split: Split = "train",
        held_out_share: float = HELD_OUT_SHARE,
        with_reasoning: bool = True,
        name: str = "pairs",
    ) -> None:
        if not 0 <= held_out_share < 1:
            raise DataError(f"{name}: held_out_share={held_out_share}; give 0 or more, and less than 1")
        self.name = name
        self._tokenizer, self._context_length, self._with_reasoning = tokenizer, context_length, with_reasoning
        self._split, self._held_out_share = split, held_out_share
        self._stream = DocumentStream(find_files(paths), seed)
        self._counts = {"pairs": 0, "other_split": 0, "too_long": 0}
        self._block: list[PairExample | str] = []
        """Pairs from the cursor on, or which count a record is for."""

    def next_example(self) -> PairExample | None:
        """The next pair; None for one that is passed over."""
        if not self._block:
            self._block = self._read(self._stream.peek(DOCUMENTS_PER_BLOCK))
        found = self._block.pop(0)
        self._stream.advance()
        self._counts[found if isinstance(found, str) else "pairs"] += 1
        return None if isinstance(found, str) else found

    def _read(self, records: list[Record]) -> list[PairExample | str]:
        pairs = [read_pair(record) for record in records]
        wanted = [i for i, pair in enumerate(pairs) if self._split_of(pair[0]) == self._split]
        results: list[PairExample | str] = ["other_split"] * len(records)
        for i, (chosen, rejected) in zip(wanted, self._rendered(records, pairs, wanted), strict=True):
            if max(len(chosen.tokens), len(rejected.tokens)) > self._context_length:
                results[i] = "too_long"
                continue
            kind = records[i].value.get("kind")
            results[i] = make_pair(chosen.tokens, rejected.tokens, kind if isinstance(kind, str) else self.name)
        return results

    def _rendered(
        self, records: list[Record], pairs: list[tuple[Conversation, Conversation]], wanted: list[int]
    ) -> list[tuple[Rendered, Rendered]]:
        def render(indices: list[int]) -> list[tuple[Rendered, Rendered]]:
            return render_pairs([pairs[i] for i in indices], self._tokenizer, with_reasoning=self._with_reasoning)

        try:
            return render(wanted)
        except DataError:
            results = []
            for i in wanted:
                try:
                    results += render([i])
                except DataError as error:
                    raise DataError(f"{records[i].where}: {error}") from None
            return results

    def _split_of(self, chosen: Conversation) -> Split:
        # Without the last turn: all pairs of one prompt are on one side.
        text = json.dumps(chosen[:-1], sort_keys=True, default=str)
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        return "heldout" if place < self._held_out_share else "train"

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict(), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._counts = dict(state["counts"])
        self._block = []

    def report(self) -> dict[str, Any]:
        return {"epoch": self._stream.epoch, **self._counts}


def read_pair(record: Record) -> tuple[Conversation, Conversation]:
    """Chosen and rejected conversation of a record, see :class:`PairFileSource`; ``DataError`` names the record."""
    values = record.value
    if not isinstance(values, dict) or "chosen" not in values or "rejected" not in values:
        fields = sorted(values) if isinstance(values, dict) else "plain text"
        raise DataError(f"{record.where}: has no fields 'chosen' and 'rejected' (found: {fields}); give both")
    prompt = values.get("messages", values.get("prompt"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None:
        prompt = []
    elif not isinstance(prompt, list):
        raise DataError(f"{record.where}: the prompt is {type(prompt).__name__}; give a text or a list of messages")
    chosen, rejected = (_conversation(record, prompt, values[side], side) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{record.where}: 'chosen' and 'rejected' are equal; remove the record")
    return chosen, rejected


def _conversation(record: Record, prompt: list[Any], value: Any, side: str) -> Conversation:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: '{side}' is {type(value).__name__}; give a text or messages, at least one")
    is_whole = len(value) > len(prompt) and value[: len(prompt)] == prompt
    whole = value if is_whole else [*prompt, *value]
    if len(whole) < 2:
        raise DataError(f"{record.where}: '{side}' answers nothing; give a prompt, or whole conversations")
    try:
        return normalise(whole)
    except DataError as error:
        raise DataError(f"{record.where}: '{side}': {error}") from None


# --- batches ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch(Batch):
    """Packed windows with whole pairs in them; ``loss_mask`` marks the scored tokens, two a pair."""

    chosen_P: torch.Tensor
    """int64: where the last token of each chosen conversation is among the B*T tokens."""
    rejected_P: torch.Tensor
    """int64, the same of the rejected ones, in the same order."""


def pack_conversations(
    conversations: Sequence[Sequence[int]], window_length: int, groups: list[list[int]] | None = None
) -> tuple[Batch, torch.Tensor]:
    """Windows with all ``conversations`` (tokens), and where the last token of each is among the B*T tokens, int64.

    ``groups`` is what ``packing.assign`` gives for their lengths, where it is known already.
    """
    lengths = [len(tokens) for tokens in conversations]
    groups = assign(lengths, window_length) if groups is None else groups
    last = [0] * len(conversations)
    windows = []
    for row, group in enumerate(groups):
        examples = [Example(list(conversations[i]), [False] * (lengths[i] - 1) + [True]) for i in group]
        windows.append(fill_window(examples, window_length))
        end = row * window_length
        for i in group:
            end += lengths[i]
            last[i] = end - 1
    names = ("tokens", "loss_mask", "document_ids", "positions")
    stacked = (torch.stack([torch.from_numpy(getattr(window, name)) for window in windows]) for name in names)
    return Batch(*stacked), torch.tensor(last)


class PairBatches:
    """An endless iterator of ``PairBatch`` over a mixture of pairs, resumable bit for bit.

    Pairs are taken in the mixture's order until the next one does not fit into ``windows_per_batch`` windows; that
    one opens the next batch.
    """

    def __init__(self, mixture: Mixture, window_length: int, windows_per_batch: int) -> None:
        if windows_per_batch < 2:
            raise DataError(f"windows_per_batch={windows_per_batch}; a pair may need 2 windows: give at least 2")
        self.mixture = mixture
        self.window_length = window_length
        self.windows_per_batch = windows_per_batch
        self._counts = {"batches": 0, "windows": 0, "pairs": 0, "tokens": 0}
        self._left_over: tuple[PairExample, dict[str, Any]] | None = None
        """A pair that is drawn already, and the mixture's state before."""

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        conversations: list[list[int]] = []
        groups: list[list[int]] = []
        while True:
            pair, state_before = self._left_over or self._draw()
            self._left_over = None
            together = [*conversations, *pair.conversations]
            needed = assign([len(tokens) for tokens in together], self.window_length)
            if len(needed) > self.windows_per_batch:
                self._left_over = (pair, state_before)
                break
            conversations, groups = together, needed
        batch, last = pack_conversations(conversations, self.window_length, groups)
        added = (1, len(groups), len(conversations) // 2, sum(map(len, conversations)))
        self._counts = {key: self._counts[key] + n for key, n in zip(self._counts, added, strict=True)}
        return PairBatch(**vars(batch), chosen_P=last[::2], rejected_P=last[1::2])

    def _draw(self) -> tuple[PairExample, dict[str, Any]]:
        state = self.mixture.state_dict()
        pair = self.mixture.next_example()
        if not isinstance(pair, PairExample):
            raise DataError(f"a source gave {type(pair).__name__}, no pair; use sources of preference pairs")
        return pair, state

    def state_dict(self) -> dict[str, Any]:
        """Small and JSON-able."""
        return {
            "mixture": self.mixture.state_dict() if self._left_over is None else self._left_over[1],
            "counts": dict(self._counts),
            "window_length": self.window_length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch before ``state`` was taken."""
        if state["window_length"] != self.window_length:
            raise DataError(
                f"the saved batches have windows of {state['window_length']} tokens, these {self.window_length}; "
                "resume with the same recipe, or start the phase anew"
            )
        self.mixture.load_state_dict(state["mixture"])
        self._counts = dict(state["counts"])
        self._left_over = None

    def report(self) -> dict[str, Any]:
        """Counts so far and the fill rate (tokens per window place)."""
        places = self._counts["windows"] * self.window_length
        return {**self._counts, "fill_rate": self._counts["tokens"] / places if places else 0.0}
