"""How the next token is chosen from logits.

Filters are applied in the usual order: temperature, top-k, top-p, min-p. A token is then drawn by inverting the
cumulative distribution at a uniform number that belongs to the row's own seed and step, so a row's tokens do not
depend on what else is in the batch.

``probabilities`` is the plain form on any device: it sorts the vocabulary. On a CPU, ``draw`` finds the same tokens
with less work, in C++ and without sorting (openzaya/kernels/cpp/cpu/draw.hpp); where there are no kernels it takes the
plain form row by row.

Shape suffixes: B rows, V vocabulary, G greedy rows.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor

from openzaya.kernels import build

SMALLEST_TEMPERATURE = 1e-30
"""Below it fp32 could not hold the temperature itself."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_BIASES = 1024
SHARED_FROM = 1 << 16
"""From so many logits on, all threads draw."""
UNIFORMS_AT_ONCE = 128

Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class SamplingParams(BaseModel):
    """Sampling settings of a request. The defaults are ZAYA1's: temperature 1, top-p 0.95."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """0 is greedy: the most likely token, whatever the filters."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Keep the smallest set of most likely tokens with at least this share; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens below this share of the most likely one's probability."""
    max_new_tokens: int = Field(256, ge=1)
    seed: int = 0
    """Any integer. Candidate i of a request draws from ``seed + i``; equal modulo 2**32 is equal."""

    repetition_penalty: float = Field(1.0, gt=0, le=100)
    """Divides positive and multiplies negative logits of tokens in the prompt or the completion so far."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logits of tokens in the completion so far."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted once for each time that a token is in the completion so far."""
    logit_bias: dict[int, Bias] = Field(default_factory=dict, max_length=MAX_BIASES)
    """Token id -> number added to its logit after the penalties and before the temperature."""

    stop: tuple[StopString, ...] = Field((), max_length=MAX_STOPS)
    """The text ends where one of these first is complete, reasoning included."""
    stop_token_ids: tuple[NonNegativeInt, ...] = Field((), max_length=MAX_BIASES)
    """Tokens that end the completion, like the end of turn."""
    include_stop: bool = False
    """Keep the stop string in the text."""
    ignore_eos: bool = False
    """The end of turn is a token like others. A finished grammar ends the completion nevertheless."""
    min_new_tokens: int = Field(0, ge=0)
    """No end of turn, stop id or stop string before so many tokens."""

    logprobs: int | None = Field(None, ge=0, le=20)
    """Log probabilities of the chosen tokens and of so many most likely ones; None: not computed."""
    thinking_budget: int | None = Field(None, ge=0)
    """``</think>`` is forced after so many tokens of reasoning."""
    json_schema: dict[str, Any] | bool | str | None = None
    """The answer (after the reasoning) is JSON of this schema, given as such or as text; True: any JSON object."""
    grammar: str | None = None
    """The answer follows this grammar, in llguidance's variant of Lark."""
    return_experts: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar are both given; give one")
        if self.json_schema is False:
            raise ValueError("json_schema is False, which nothing satisfies; leave it out for a free answer")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}; lower it"
            )
        return self


def probabilities(logits_BV: Tensor, params: SamplingParams | Sequence[SamplingParams]) -> Tensor:
    """The distribution (B, V), fp32, that tokens are drawn from; for temperature 0 all weight on the maximum.

    ``params`` are all rows' settings, or one for each row. This is the plain form of :func:`draw`'s, for any device.
    """
    rows = [params] * len(logits_BV) if isinstance(params, SamplingParams) else list(params)
    logits_BV = _finite(logits_BV)
    vocab = logits_BV.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_BV.device)[:, None]

    shares_BV = _shares(logits_BV, column([max(row.temperature, SMALLEST_TEMPERATURE) for row in rows]))
    best_B1 = shares_BV.amax(dim=-1, keepdim=True)
    kept_BV = torch.ones_like(shares_BV, dtype=torch.bool)
    top_k = [row.top_k if 0 < row.top_k < vocab else vocab for row in rows]
    if any(row.top_p < 1 for row in rows) or min(top_k, default=vocab) < vocab:
        # Of equals the token with the smaller id comes first.
        sorted_BV, order_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
        last_B1 = torch.tensor(top_k, device=logits_BV.device)[:, None] - 1
        sorted_BV = sorted_BV.masked_fill(sorted_BV < sorted_BV.gather(1, last_B1), 0)
        kept_BV = torch.zeros_like(kept_BV).scatter_(1, order_BV, sorted_BV > 0)
        # A token stays while the tokens before it have not reached the share.
        wide_BV = sorted_BV.to(_widest(logits_BV.device))
        before_BV = wide_BV.cumsum(dim=-1) - wide_BV
        top_p_B1 = torch.tensor([row.top_p for row in rows], dtype=wide_BV.dtype, device=logits_BV.device)[:, None]
        inside_BV = (before_BV < top_p_B1 * wide_BV.sum(dim=-1, keepdim=True)) | (top_p_B1 >= 1)
        kept_BV &= torch.zeros_like(kept_BV).scatter_(1, order_BV, inside_BV)
    kept_BV &= shares_BV >= column([row.min_p for row in rows]) * best_B1
    shares_BV = shares_BV.masked_fill(~kept_BV, 0)
    shares_BV = shares_BV / shares_BV.sum(dim=-1, keepdim=True)
    greedy = [row for row, settings in enumerate(rows) if settings.temperature == 0]
    if greedy:
        best_G1 = logits_BV[greedy].argmax(dim=-1, keepdim=True)
        shares_BV[greedy] = torch.zeros_like(shares_BV[greedy]).scatter_(1, best_G1, 1.0)
    return shares_BV


def draw(
    logits_BV: Tensor | Sequence[Tensor], params: SamplingParams | Sequence[SamplingParams], uniform_B: Tensor
) -> Tensor:
    """One token id a row (int64 B); ``uniform_B`` in [0, 1) decides, and greedy decoding ignores it.

    ``params`` are all rows' settings, or one for each row. A row's token depends on nothing but the row.
    """
    rows = [params] * len(logits_BV) if isinstance(params, SamplingParams) else list(params)
    if uniform_B.device.type == "cpu" and all(logits_V.device.type == "cpu" for logits_V in logits_BV):
        return torch.tensor(draw_on_cpu(logits_BV, rows, uniform_B.tolist()), dtype=torch.int64)
    matrix_BV = logits_BV if isinstance(logits_BV, Tensor) else torch.stack(list(logits_BV))
    if all(row.temperature == 0 for row in rows):
        return _finite(matrix_BV).argmax(dim=-1)
    return _draw_plain(matrix_BV, rows, uniform_B)


def draw_on_cpu(
    logits_BV: Tensor | Sequence[Tensor], params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """:func:`draw` for logits on the CPU, all as Python numbers."""
    if not len(params):
        return []
    matrix_BV = (logits_BV if isinstance(logits_BV, Tensor) else torch.stack(list(logits_BV))).float().contiguous()
    return _draw_on_cpu(matrix_BV, params, uniforms, None)


def draw_with_logprobs_on_cpu(
    logits_BV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """:func:`draw_on_cpu` and :func:`logprobs_on_cpu` of the drawn tokens, to the same bits in one pass."""
    logprobs = array("f", bytes(4 * len(params)))
    tokens = _draw_on_cpu(logits_BV.float().contiguous(), params, uniforms, logprobs)
    return tokens, logprobs.tolist() if build.inference().library is not None else logprobs_on_cpu(logits_BV, tokens)


def _draw_on_cpu(
    matrix_BV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float], logprobs: array[float] | None
) -> list[int]:
    """Fills ``logprobs``, if given, where there are kernels."""
    library = build.inference().library
    if library is None:
        return [int(_draw_plain(*row)) for row in zip(matrix_BV.split(1), params, uniforms, strict=True)]
    settings, tokens = array("d"), array("q", bytes(8 * len(params)))
    for row, uniform in zip(params, uniforms, strict=True):
        settings.extend((row.temperature, row.top_k, row.top_p, row.min_p, uniform))
    places = _places(settings, tokens) if logprobs is None else _places(settings, tokens, logprobs)
    library.cpu_draw(*_sizes(matrix_BV), *_addresses(matrix_BV.data_ptr(), *places, *([0] * (logprobs is None))))
    return tokens.tolist()


def logprobs_on_cpu(logits_BV: Tensor, tokens: Sequence[int]) -> list[float]:
    """Natural logarithm of one token's share in each row, before any filter; each row by itself, bit for bit."""
    matrix_BV = logits_BV.float().contiguous()
    chosen, found = array("q", tokens), array("f", bytes(4 * len(tokens)))
    library = build.inference().library
    if library is None:
        return [row_V.log_softmax(0)[token].item() for row_V, token in zip(matrix_BV, tokens, strict=True)]
    library.cpu_logprobs(*_sizes(matrix_BV), *_addresses(matrix_BV.data_ptr(), *_places(chosen, found)))
    return found.tolist()


def _sizes(matrix_BV: Tensor) -> tuple[ctypes.c_int, ctypes.c_int64, ctypes.c_int64]:
    """Threads, rows, columns. A few rows take less time than to wake the other threads."""
    threads = torch.get_num_threads() if matrix_BV.numel() >= SHARED_FROM else 1
    return ctypes.c_int(threads), ctypes.c_int64(matrix_BV.shape[0]), ctypes.c_int64(matrix_BV.shape[1])


def _places(*arrays: array[Any]) -> Iterable[int]:
    """Addresses. Arrays cost a small part of what NumPy's do."""
    return (one.buffer_info()[0] for one in arrays)


def _addresses(*addresses: int) -> Iterable[ctypes.c_void_p]:
    return map(ctypes.c_void_p, addresses)


def _draw_plain(
    logits_BV: Tensor, params: SamplingParams | Sequence[SamplingParams], uniform_B: Tensor | float
) -> Tensor:
    cumulative_BV = probabilities(logits_BV, params).cumsum(dim=-1)
    # Rounding may leave the total a little off 1; scaled, the last kept token closes the range.
    threshold_B1 = torch.as_tensor(uniform_B).reshape(-1, 1).to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)


def _shares(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Softmax over the last dimension. The best logit becomes 0 first: no temperature then overflows."""
    if isinstance(temperature, float) and temperature == 1:
        return logits.softmax(dim=-1)
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


def _finite(logits: Tensor) -> Tensor:
    """In fp32; what is no number counts as impossible and +inf as the largest number: a draw always succeeds."""
    logits = logits.float()
    if bool(logits.amax(dim=-1).isfinite().all()):
        return logits
    largest = torch.finfo(torch.float32).max
    return logits.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def uniforms(seeds: list[int], num_steps: int) -> Tensor:
    """Uniform numbers (rows, steps) in fp32: row i depends on ``seeds[i]`` alone."""
    generator = torch.Generator()
    return torch.stack([torch.rand(num_steps, generator=generator.manual_seed(seed % 2**64)) for seed in seeds])


class UniformStream:
    """The numbers of :func:`uniforms` for one seed, made as they are asked for: number i is the same in any order."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed % 2**64)
        self._numbers: list[float] = []

    def __getitem__(self, step: int) -> float:
        while step >= len(self._numbers):
            self._numbers += torch.rand(UNIFORMS_AT_ONCE, generator=self._generator).tolist()
        return self._numbers[step]


class Penalties:
    """Which tokens of a sequence its penalties apply to, and how often they occurred."""

    def __init__(self, params: SamplingParams, prompt_tokens: Iterable[int]):
        self._params = params
        self._place: dict[int, int] = {}
        self._ids = np.zeros(16, dtype=np.int64)
        self._counts = np.zeros(16, dtype=np.float32)
        if params.repetition_penalty != 1:
            for token in prompt_tokens:
                self._find(token)

    def _find(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._place))
        if place >= len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        return place

    def add(self, token: int) -> None:
        """Count a token of the completion."""
        place = self._find(token)  # which may replace the arrays
        self._counts[place] += 1

    def apply(self, logits_V: Tensor) -> None:
        """Change the logits in place."""
        num = len(self._place)
        ids = torch.from_numpy(self._ids[:num]).to(logits_V.device)
        counts = torch.from_numpy(self._counts[:num]).to(logits_V.device)
        values = logits_V[ids]
        repetition = self._params.repetition_penalty
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= self._params.frequency_penalty * counts + self._params.presence_penalty * (counts > 0)
        logits_V[ids] = values
