"""Answers that follow a JSON schema or a grammar: before each token, which tokens may come.

The work is done by llguidance: an Earley parser over a lazy lexer, walked along the tree of the vocabulary. Here are
its limits, its caches and its errors. Whatever is wrong with a schema is found when the request is made: the grammar
is compiled and its first tokens are tried out. Compiled grammars are kept, a request works on a copy.

Between the parts of a JSON text a space, or a new line with an indent up to ``MAX_INDENT``, may stand: with any
blanks allowed, a model that is unsure would write blanks forever. Control tokens (thinking and tool tags) do not
occur in JSON, spelled-out they do.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openzaya.data.tokenizer import CONTROL_TOKENS
from openzaya.errors import DataError
from openzaya.infer.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_CHARACTERS = 100_000
"""Of a schema or grammar; compiling one of that size takes a second or two."""
MAX_INDENT = 32
MAX_COMPILED = 32
NUM_TRIED_TOKENS = 32
"""Steps that are tried out before a grammar is taken: one that is too costly shows it within a few."""


class Constraint:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, control_tokens: NDArray[np.int64]):
        self._matcher, self._vocab_size, self._control_tokens = matcher, vocab_size, control_tokens

    @property
    def is_complete(self) -> bool:
        """Nothing but the end can follow."""
        return bool(self._matcher.is_stopped()) and not self.has_failed

    @property
    def has_failed(self) -> bool:
        """The parser ran into a limit of its own, or was given a token that it had not allowed."""
        return bool(self._matcher.is_error())

    def allowed(self) -> Tensor:
        """bool (V): what may come next; the end of turn where the answer may end. None allowed: it has failed."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed_V = np.zeros(self._vocab_size, dtype=bool)
        if not self.has_failed:
            num = min(len(bits), self._vocab_size)
            allowed_V[:num] = bits[:num]
            allowed_V[self._control_tokens] = False
        return torch.from_numpy(allowed_V)

    def push(self, token: int) -> None:
        """Take the next token; one that is not allowed makes the constraint fail."""
        self._matcher.consume_token(token)

    def try_push(self, tokens: list[int]) -> None:
        """Take as many of ``tokens`` as the grammar allows."""
        self._matcher.try_consume_tokens(tokens)


class _Compiler:
    """Grammars for one tokenizer, vocabulary size and end of turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_id: int):
        import llguidance.hf

        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=eos_token_id
            )
        except Exception as error:  # whatever the library finds wrong with a tokenizer
            raise DataError(
                f"answers cannot be constrained with this tokenizer ({_first_line(error)}); "
                "leave out json_schema and grammar, or use a tokenizer.json with byte-level or byte-fallback tokens"
            ) from None
        self._vocab_size = vocab_size
        self._control_tokens = np.array(
            [
                token
                for token, added in tokenizer.added_tokens_decoder.items()
                if (added.special or added.content in CONTROL_TOKENS) and token != eos_token_id and token < vocab_size
            ],
            dtype=np.int64,
        )
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, params: SamplingParams) -> Constraint:
        kind = "json_schema" if params.json_schema is not None else "grammar"
        grammar = _schema_grammar(params.json_schema) if kind == "json_schema" else _lark_grammar(params.grammar or "")
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar, kind)  # a costly one does not keep the others waiting
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            matcher = matcher.deep_copy()
        no_control = self._control_tokens if kind == "json_schema" else np.zeros(0, dtype=np.int64)
        return Constraint(matcher, self._vocab_size, no_control)

    def _compile(self, grammar: str, kind: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=100_000,
            step_max_items=50_000,
            max_items_in_row=10_000,
            max_lexer_states=20_000,
            max_grammar_size=500_000,
            verbose_errors=False,
        )
        try:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
            trial = Constraint(matcher.deep_copy(), self._vocab_size, np.zeros(0, dtype=np.int64))
            message = matcher.get_error()
            for step in range(NUM_TRIED_TOKENS if not message else 0):
                allowed = trial.allowed().nonzero()
                if trial.has_failed or not len(allowed):
                    message = trial._matcher.get_error() or "nothing can follow"
                    break
                trial.push(int(allowed[step * 7919 % len(allowed)]))
                if trial.is_complete:
                    break
        except Exception as error:  # a panic in the library included
            message = _first_line(error)
        if message:
            raise _refusal(kind, message)
        return matcher


_COMPILERS_LOCK = threading.Lock()


def make_constraint(
    params: SamplingParams, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, eos_token_id: int
) -> Constraint | None:
    """The constraint that ``params`` ask for; None where they ask for none.

    The first one for a tokenizer of 262,144 tokens takes a second or two, the others milliseconds.

    Raises:
        DataError: a schema or grammar that is malformed, uses what is not supported, is satisfied by nothing, or is
            beyond the limits of this module.
    """
    if params.json_schema is None and params.grammar is None:
        return None
    key = (vocab_size, eos_token_id)
    with _COMPILERS_LOCK:
        compilers = tokenizer.__dict__.setdefault("_openzaya_grammar_compilers", {})
        if key not in compilers:
            compilers[key] = _Compiler(tokenizer, vocab_size, eos_token_id)
        compiler: _Compiler = compilers[key]
    return compiler.constraint(params)


def _schema_grammar(schema: dict[str, Any] | bool | str | None) -> str:
    from llguidance import LLMatcher

    try:
        if schema is True:
            text = '{"type": "object"}'
        elif isinstance(schema, str):
            _check_size(schema, "json_schema")
            text = json.dumps(json.loads(schema), allow_nan=False)
        else:
            text = json.dumps(schema, allow_nan=False)
        _check_size(text, "json_schema")
        return LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_pattern": rf"(\x20|\x0A[\x20\x09]{{0,{MAX_INDENT}}})"}
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise _refusal("json_schema", _first_line(error)) from None


def _lark_grammar(grammar: str) -> str:
    from llguidance import LLMatcher

    _check_size(grammar, "grammar")
    try:
        return LLMatcher.grammar_from_lark(grammar)
    except (ValueError, TypeError) as error:
        raise _refusal("grammar", _first_line(error)) from None


def _check_size(text: str, kind: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{kind} has {len(text)} characters; at most {MAX_CHARACTERS} are taken: shorten it")


def _refusal(kind: str, message: str) -> DataError:
    remedy = "give a JSON schema that llguidance supports" if kind == "json_schema" else "give a Lark grammar"
    return DataError(f"{kind} cannot be used: {message.splitlines()[0][:300]}; {remedy}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
