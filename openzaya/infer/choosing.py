"""One candidate's next token, and what it does to the candidate: text, reasoning, constraint, the end.

From the model's logits to a token, in this order:

    penalties (repetition: prompt and completion; presence, frequency: completion)
    logit bias
    tokens that cannot come: no end before min_new_tokens, what the constraint leaves
    temperature, top-k, top-p, min-p, and a draw with the seed's number of this step (sampling.py)

A forced token (thinking.py) takes the place of the draw. Logprobs are always those of the model's own logits. The
constraint (constraint.py) holds for the answer: for all of the turn where the model does not open ``<think>`` with
its first token, which it always may unless the prompt has settled that; else for what follows ``</think>``, and the
turn cannot end before.

Shape suffixes: B rows, V vocabulary, K tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from openzaya.data.tokenizer import encode_batch
from openzaya.errors import EngineError
from openzaya.infer.constraint import make_constraint
from openzaya.infer.outputs import FinishReason, TokenLogprob
from openzaya.infer.sampling import (
    Penalties,
    SamplingParams,
    UniformStream,
    draw,
    draw_on_cpu,
    draw_with_logprobs_on_cpu,
    logprobs_on_cpu,
)
from openzaya.infer.stopping import StopStrings
from openzaya.infer.text import Detokeniser
from openzaya.infer.thinking import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMPOSSIBLE = -math.inf
NOTHING_CHOSEN = TokenLogprob(-1, math.nan)


class Progress(NamedTuple):
    """What one more token did."""

    text: str
    """Text that became final."""
    finish_reason: FinishReason | None
    stop: str | int | None
    """The stop string or stop id that ended the completion; None for the end of turn and a finished constraint."""
    kept: bool
    """False: the token is no part of the completion (end of turn, stop id)."""


class SequenceState:
    """Everything about choosing that belongs to one candidate. It does not change when the candidate is preempted.

    Args:
        params: ``max_new_tokens`` is taken at its word: the caller lowers it to the room that the prompt leaves.
        prompt_tokens: all of the prompt; penalties and reasoning look at it.
        tokenizer: None: no text, and no setting that needs it.
        vocab_size: number of logits a row; token ids in ``params`` must be below.

    Raises:
        EngineError: a token id beyond the vocabulary, or a setting that needs a tokenizer where there is none.
        DataError: a JSON schema or grammar that cannot be used.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: Sequence[int],
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        eos_token_id: int,
        vocab_size: int,
        seed: int,
    ):
        _check(params, tokenizer, vocab_size)
        self.params = params
        self.tokens: list[int] = []
        """Generated so far, without a token that ended the completion."""
        self._tokenizer, self._eos = tokenizer, eos_token_id
        self._uniforms = UniformStream(seed)
        self._num_steps = 0
        self._detokeniser = None if tokenizer is None else Detokeniser(tokenizer)
        self._stops = StopStrings(params.stop, include_stop=params.include_stop)
        has_penalties = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._penalties = Penalties(params, prompt_tokens) if has_penalties else None
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._ends = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else (eos_token_id,))))
        self._constraint = self._thinking = None
        if tokenizer is not None:
            self._constraint = make_constraint(params, tokenizer, vocab_size=vocab_size, eos_token_id=eos_token_id)
            if self._constraint is not None or params.thinking_budget is not None:
                self._thinking = Thinking(
                    tokenizer,
                    prompt_tokens,
                    budget=params.thinking_budget,
                    answer_only=self._constraint is not None,
                )
        self._is_plain = self._penalties is None and self._thinking is None and not params.logit_bias

    @property
    def uniform(self) -> float:
        """The number in [0, 1) that decides this step's draw: a function of the seed and the step."""
        return self._uniforms[self._num_steps]

    @property
    def forced(self) -> int | None:
        """The token that comes next whatever the model says, if one must."""
        return self._thinking.forced[0] if self._thinking is not None and self._thinking.forced else None

    @property
    def is_plain(self) -> bool:
        """Whether :meth:`adjust` would leave the logits as they are at this step."""
        return self._is_plain and len(self.tokens) >= self.params.min_new_tokens

    def adjust(self, logits_V: Tensor) -> Tensor:
        """The logits to draw from; ``logits_V`` itself, unchanged, where no setting changes it."""
        adjusted_V = logits_V
        if self._penalties is not None:
            adjusted_V = adjusted_V.float().clone()
            self._penalties.apply(adjusted_V)
        if len(self._bias):
            adjusted_V = adjusted_V.float().clone() if adjusted_V is logits_V else adjusted_V
            adjusted_V[self._bias_ids.to(logits_V.device)] += self._bias.to(logits_V.device)
        allowed_V = self._allowed(len(logits_V))
        if allowed_V is not None:
            banned_V = ~allowed_V.to(logits_V.device)
            masked_V = adjusted_V.float().masked_fill(banned_V, IMPOSSIBLE)
            if not bool(masked_V.amax().isfinite()):
                # What the model gives no chance, or no number, stays above what cannot come.
                lowest = torch.finfo(torch.float32).min
                masked_V = adjusted_V.float().nan_to_num(nan=lowest, neginf=lowest).masked_fill(banned_V, IMPOSSIBLE)
            adjusted_V = masked_V
        return adjusted_V

    def _allowed(self, vocab_size: int) -> Tensor | None:
        """bool (V), or None where all tokens may come."""
        allowed_V = None
        if self._constraint is not None and self._thinking is not None:
            if self._thinking.phase != "reasoning":
                allowed_V = self._constraint.allowed()
                if self._thinking.phase == "undecided":
                    allowed_V[self._thinking.open_tokens[0]] = True
            elif self._eos < vocab_size:
                allowed_V = torch.ones(vocab_size, dtype=torch.bool)
                allowed_V[self._eos] = False
        banned = [] if self._thinking is None else list(self._thinking.banned)
        if len(self.tokens) < self.params.min_new_tokens:
            banned += self._ends if self._constraint is None else [*self._ends, self._eos]
        banned = [token for token in banned if token < vocab_size]
        if banned:
            all_V = torch.ones(vocab_size, dtype=torch.bool) if allowed_V is None else allowed_V
            fewer_V = all_V.clone()
            fewer_V[banned] = False
            # A grammar that has nothing but its end left is not kept from it.
            allowed_V = fewer_V if bool(fewer_V.any()) else all_V
        if allowed_V is not None and not bool(allowed_V.any()):
            return None  # the constraint has failed; accept() ends the completion
        return allowed_V

    def accept(self, chosen: TokenLogprob) -> Progress:
        """Take the sampled token: the text that became final, and whether the completion ends with it.

        A constraint that runs into a limit of its parser ends the completion as ``length``.
        """
        token = chosen.token
        self._num_steps += 1
        is_constrained = self._constraint is not None and self._is_constrained(token)
        if token in self._ends or (is_constrained and token == self._eos):
            reason: FinishReason = "length" if self._has_failed else "stop"
            return self._finish("", reason, token if token in self.params.stop_token_ids else None, kept=False)
        self.tokens.append(token)
        if self._penalties is not None:
            self._penalties.add(token)
        piece = "" if self._detokeniser is None else self._detokeniser.push(token)
        if is_constrained and self._constraint is not None:
            self._constraint.push(token)
        if self._thinking is not None:
            self._thinking.push(token, piece)
            if self._constraint is not None and self._tokenizer is not None and self._thinking.rest:
                self._constraint.try_push(encode_batch(self._tokenizer, [self._thinking.rest])[0])
        num_tokens = len(self.tokens)
        if num_tokens < self.params.min_new_tokens:
            text, stop = self._stops.pass_by(piece), None
        else:
            text, stop = self._stops.push(piece)
        if stop is not None:
            return Progress(text, "stop", stop, True)
        if self._constraint is not None and self._constraint.is_complete:
            return self._finish(text, "stop", None, kept=True)
        if num_tokens >= self.params.max_new_tokens or self._has_failed:
            return self._finish(text, "length", None, kept=True)
        return Progress(text, None, None, True)

    def flush(self) -> str:
        """Text held back, when the request ends otherwise."""
        return self._rest()[0]

    @property
    def _has_failed(self) -> bool:
        return self._constraint is not None and self._constraint.has_failed

    def _is_constrained(self, token: int) -> bool:
        """Whether ``token`` belongs to the constraint; settles what an undecided turn begins with."""
        thinking, constraint = self._thinking, self._constraint
        if constraint is None or thinking is None or thinking.phase == "reasoning" or thinking.forced:
            return False
        if thinking.phase == "undecided":
            # A tag of several tokens may begin like the grammar's own text: then it is the grammar's.
            is_tag = token == thinking.open_tokens[0]
            if is_tag and (len(thinking.open_tokens) == 1 or not bool(constraint.allowed()[token])):
                thinking.open()
                return False
            thinking.answer()
        return True

    def _rest(self) -> tuple[str, str | None]:
        text, stop = self._stops.push("" if self._detokeniser is None else self._detokeniser.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)

    def _finish(self, text: str, reason: FinishReason, stop: int | None, *, kept: bool) -> Progress:
        rest, found = self._rest()
        if found is not None and stop is None:
            return Progress(text + rest, "stop", found, kept)
        return Progress(text + rest, reason, stop, kept)


def choose(logits_BV: Tensor, states: Sequence[SequenceState]) -> list[TokenLogprob]:
    """One token a row. Rows are independent of each other, bit for bit; the logits are left as they are.

    ``logprob`` is NaN where no logprobs were asked for. Nothing about a state changes before its ``accept``.
    """
    if logits_BV.device.type == "cpu" and all(state.is_plain and state.params.logprobs == 0 for state in states):
        settings, uniforms = [state.params for state in states], [state.uniform for state in states]
        return list(map(TokenLogprob, *draw_with_logprobs_on_cpu(logits_BV, settings, uniforms)))
    forced = [state.forced for state in states]
    free = [row for row, token in enumerate(forced) if token is None]
    tokens = [0 if token is None else token for token in forced]
    if free:
        for row, token in zip(free, _draw(logits_BV, states, free), strict=True):
            tokens[row] = token
    wanted: dict[int | None, list[int]] = {}
    for row, state in enumerate(states):
        wanted.setdefault(state.params.logprobs, []).append(row)
    chosen = [NOTHING_CHOSEN] * len(states)
    for num_top, rows in wanted.items():
        some_BV = logits_BV if len(rows) == len(states) else logits_BV[rows]
        found = _with_logprobs(some_BV, [tokens[row] for row in rows], num_top)
        for row, token_logprob in zip(rows, found, strict=True):
            chosen[row] = token_logprob
    return chosen


def _draw(logits_BV: Tensor, states: Sequence[SequenceState], free: list[int]) -> list[int]:
    """The tokens of the rows ``free``."""
    params = [states[row].params for row in free]
    uniforms = [states[row].uniform for row in free]
    adjusted: Tensor | list[Tensor] = logits_BV
    if len(free) < len(states) or not all(state.is_plain for state in states):
        adjusted = [states[row].adjust(logits_BV[row]) for row in free]
    if logits_BV.device.type == "cpu":
        return draw_on_cpu(adjusted, params, uniforms)
    tokens: list[int] = draw(adjusted, params, torch.tensor(uniforms).to(logits_BV.device)).tolist()
    return tokens


def _with_logprobs(logits_BV: Tensor, tokens: list[int], num_top: int | None) -> list[TokenLogprob]:
    if num_top is None:
        return [TokenLogprob(token, math.nan) for token in tokens]
    if num_top == 0 and logits_BV.device.type == "cpu":
        return list(map(TokenLogprob, tokens, logprobs_on_cpu(logits_BV, tokens)))
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    chosen = logprobs_BV.gather(1, torch.tensor(tokens, device=logits_BV.device)[:, None])[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    best_BK = logprobs_BV.topk(min(num_top, logprobs_BV.shape[1]))
    top = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best_BK.indices.tolist(), best_BK.values.tolist(), strict=True)
    ]
    return [TokenLogprob(*row) for row in zip(tokens, chosen, top, strict=True)]


def _check(params: SamplingParams, tokenizer: PreTrainedTokenizerFast | None, vocab_size: int) -> None:
    beyond = [token for token in (*params.logit_bias, *params.stop_token_ids) if not 0 <= token < vocab_size]
    if beyond:
        raise EngineError(
            f"token id {beyond[0]} in logit_bias or stop_token_ids; the model has ids 0 to {vocab_size - 1}: remove it"
        )
    needed = {
        "stop": bool(params.stop),
        "thinking_budget": params.thinking_budget is not None,
        "json_schema": params.json_schema is not None,
        "grammar": params.grammar is not None,
    }
    if tokenizer is None and any(needed.values()):
        names = ", ".join(name for name, is_set in needed.items() if is_set)
        raise EngineError(f"{names} needs a tokenizer and the engine has none; give it one, or leave {names} out")
