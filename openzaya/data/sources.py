"""Sources of training examples: plain text, and conversations of the user's.

``TextSource`` turns documents into ``<bos> text <eos>``, every token but BOS supervised; a document
longer than the context is split into chunks that each open with BOS, so no token is lost.
``ConversationSource`` renders chats and trims them for one context length (``openzaya.data.trim``).
Sources made of generated problems are in ``openzaya.data.problem_sources``. Token work is done for a
block of documents at once; a cursor only says where the block begins, so nothing of it is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openzaya.data.chat import Rendered, render_many
from openzaya.data.documents import PYTHON_STDLIB, DocumentStream, Record, find_files
from openzaya.data.mixture import Example
from openzaya.data.tokenizer import encode_plain
from openzaya.data.trim import TrimAction, TrimReport, ap_trim
from openzaya.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTS_PER_BLOCK = 64


class TextSource:
    """Documents of ``paths`` (folder, glob, files; default: the Python standard library), all tokens supervised.

    Records of JSONL and parquet files give their text in ``text_field``. Examples have at most
    ``context_length`` tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        *,
        paths: str | Path | Sequence[str | Path] = PYTHON_STDLIB,
        seed: int = 0,
        text_field: str = "text",
        name: str = "text",
    ) -> None:
        if context_length < 2:
            raise DataError(f"context_length={context_length}; text needs at least 2 (BOS and one token)")
        self.name = name
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._text_field = text_field
        self._prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._suffix = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._stream = DocumentStream(find_files(paths), seed)
        self._chunk = 0
        self._documents = 0
        self._block: list[list[Example]] = []
        """Chunks of each document from the cursor on."""
        self._empty_since: int | None = None

    def next_example(self) -> Example | None:
        """The next chunk; None for an empty document. ``DataError`` where a whole epoch holds no text."""
        if not self._block:
            records = self._stream.peek(DOCUMENTS_PER_BLOCK)
            texts = [self._text_of(record) for record in records]
            try:
                encoded = encode_plain(self._tokenizer, texts)
            except DataError as error:
                raise DataError(f"{records[0].where} or one of the next {len(records) - 1} records: {error}") from None
            self._block = [self._chunks(tokens) for tokens in encoded]
        chunks = self._block[0]
        example = chunks[self._chunk] if chunks else None
        self._chunk += 1
        if self._chunk >= len(chunks):
            self._block.pop(0)
            self._chunk = 0
            self._stream.advance()
            self._documents += 1
        self._notice_empty_epochs(example)
        return example

    def _chunks(self, tokens: list[int]) -> list[Example]:
        if not tokens:
            return []
        body = tokens + self._suffix
        step = self._context_length - len(self._prefix)
        chunks = []
        for start in range(0, len(body), step):
            piece = self._prefix + body[start : start + step]
            chunks.append(Example(piece, [False] + [True] * (len(piece) - 1)))
        return chunks

    def _text_of(self, record: Record) -> str:
        if isinstance(record.value, str):
            return record.value
        text = record.value.get(self._text_field)
        if not isinstance(text, str):
            raise DataError(
                f"{record.where}: field '{self._text_field}' is {type(text).__name__}, expected a string; the record "
                f"has the fields {sorted(record.value)}; name the right one with text_field"
            )
        return text

    def _notice_empty_epochs(self, example: Example | None) -> None:
        if example is not None:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = self._stream.epoch
        elif self._stream.epoch > self._empty_since + 1:
            raise DataError(f"source '{self.name}': a whole epoch of documents holds no text; check the files")

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict(), "chunk": self._chunk, "documents": self._documents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._chunk = state["chunk"]
        self._documents = state["documents"]
        self._block = []
        self._empty_since = None

    def report(self) -> dict[str, Any]:
        return {"epoch": self._stream.epoch, "documents": self._documents}


class ConversationSource:
    """Chats of the user's, ``{"messages": [...], "tools": [...]}`` a record, trimmed to ``context_length`` tokens.

    Only what the assistant writes is supervised. A conversation that cannot fit is dropped and counted
    (``trim_report``); a broken one raises ``DataError`` naming file and line.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        *,
        paths: str | Path | Sequence[str | Path],
        seed: int = 0,
        messages_field: str = "messages",
        name: str = "conversations",
    ) -> None:
        if context_length < 1:
            raise DataError(f"context_length={context_length}; give at least 1 token")
        self.name = name
        self.trim_report = TrimReport()
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._messages_field = messages_field
        self._stream = DocumentStream(find_files(paths), seed)
        self._block: list[tuple[Rendered | None, TrimAction, int]] = []
        """Trimmed conversations from the cursor on, with their token counts before trimming."""
        self._dropped_since: int | None = None

    def next_example(self) -> Example | None:
        """The next conversation; None for a dropped one. ``DataError`` where a whole epoch is dropped."""
        if not self._block:
            self._block = self._trimmed(self._stream.peek(DOCUMENTS_PER_BLOCK))
        rendered, action, num_tokens = self._block.pop(0)
        self._stream.advance()
        self.trim_report.record(action, num_tokens, len(rendered.tokens) if rendered is not None else 0)
        if rendered is not None:
            self._dropped_since = None
            return Example(rendered.tokens, [False, *rendered.loss_mask[1:]])
        if self._dropped_since is None:
            self._dropped_since = self._stream.epoch
        elif self._stream.epoch > self._dropped_since + 1:
            raise DataError(
                f"source '{self.name}': no conversation of a whole epoch fits {self._context_length} tokens "
                f"({self.trim_report}); raise the context length"
            )
        return None

    def _trimmed(self, records: list[Record]) -> list[tuple[Rendered | None, TrimAction, int]]:
        conversations = [self._field(record, self._messages_field) for record in records]
        tools = [record.value.get("tools") or None for record in records]
        try:
            rendered = render_many(conversations, self._tokenizer, tools=tools)
        except DataError:
            rendered = [self._render_one(*item) for item in zip(records, conversations, tools, strict=True)]
        block = []
        for messages, schemas, full in zip(conversations, tools, rendered, strict=True):
            trimmed, action = ap_trim(messages, self._tokenizer, self._context_length, tools=schemas, rendered=full)
            block.append((trimmed, action, len(full.tokens)))
        return block

    def _field(self, record: Record, field: str) -> Any:
        if not isinstance(record.value, dict) or field not in record.value:
            fields = sorted(record.value) if isinstance(record.value, dict) else "plain text"
            raise DataError(
                f"{record.where}: has no field '{field}' (found: {fields}); give conversations as JSONL or parquet, or "
                "name the field with messages_field"
            )
        return record.value[field]

    def _render_one(self, record: Record, messages: Any, tools: Any) -> Rendered:
        try:
            return render_many([messages], self._tokenizer, tools=[tools])[0]
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict(), "trim_report": self.trim_report.as_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self.trim_report = TrimReport(**state["trim_report"])
        self._block = []
        self._dropped_since = None

    def report(self) -> dict[str, Any]:
        return {"epoch": self._stream.epoch, **self.trim_report.as_dict()}
