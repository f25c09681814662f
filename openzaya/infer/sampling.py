"""How the next token is chosen from logits.

Filters are applied in the usual order: temperature, top-k, top-p, min-p. A token is then drawn by inverting the
cumulative distribution at a uniform number that belongs to the row's own seed and step, so a row's tokens do not
depend on what else is in the batch.

``probabilities`` is the plain form on any device: it sorts the vocabulary. On a CPU, ``draw`` finds the same tokens
with less work: a small vocabulary is sorted for all rows at once; of a large one, where sorting 262,144 numbers takes
longer than a layer of the model, each row needs one softmax and a few passes.

Shape suffixes: B rows, V vocabulary, G greedy rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor

SMALLEST_TEMPERATURE = 1e-30
"""Below it fp32 could not hold the temperature itself."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_BIASES = 1024
SMALL_VOCABULARY = 4096
"""Up to this size all rows are worked on together."""
SORTED_AT_ONCE = 2048
"""Shares that are sorted as a whole; of more, first the neighbourhood of the border is found."""
NUM_BUCKETS = 1024
"""Shares, at most 1, have bits up to 0x3F800000; shifted by 20 they are below this."""
COUNTED_AT_ONCE = 32_768
"""Shares a call of bincount, whose copies in double precision then stay in the processor's cache."""
UNIFORMS_AT_ONCE = 128
FEW = 16
"""Where less than one share in so many is kept, they are taken out before they are summed."""

FloatArray = NDArray[np.float32]

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
    cumulative_BV = probabilities(matrix_BV, rows).cumsum(dim=-1)
    # Rounding may leave the total a little off 1; scaled, the last kept token closes the range.
    threshold_B1 = uniform_B[:, None].to(cumulative_BV) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp_max(matrix_BV.shape[1] - 1)


def draw_on_cpu(
    logits_BV: Tensor | Sequence[Tensor], params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """:func:`draw` for logits on the CPU, all as Python numbers."""
    if not len(params):
        return []
    if len(logits_BV[0]) > SMALL_VOCABULARY:
        return [_draw_row(*row) for row in zip(logits_BV, params, uniforms, strict=True)]
    matrix_BV = _finite(logits_BV if isinstance(logits_BV, Tensor) else torch.stack(list(logits_BV)))
    is_greedy = [row.temperature == 0 for row in params]
    if all(is_greedy):
        tokens: list[int] = matrix_BV.numpy().argmax(axis=1).tolist()
        return tokens
    tokens = _draw_together(matrix_BV, params, uniforms)
    for row, greedy in enumerate(is_greedy):
        if greedy:
            tokens[row] = int(matrix_BV[row].numpy().argmax())
    return tokens


def _draw_together(logits_BV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[int]:
    """Every operation here gives each row the same bits whatever the other rows are, and however many."""
    vocab = logits_BV.shape[1]
    temperatures = [max(row.temperature, SMALLEST_TEMPERATURE) for row in params]
    temperature_B1 = torch.tensor(temperatures, dtype=torch.float32)[:, None]
    shares_BV = _shares(logits_BV, temperature_B1).numpy()
    lowest_B1 = np.array([row.min_p for row in params], dtype=np.float32)[:, None] * shares_BV.max(
        axis=1, keepdims=True
    )
    top_k_B = np.array([row.top_k if 0 < row.top_k < vocab else vocab for row in params])
    top_p_B1 = np.array([row.top_p for row in params])[:, None]
    if (top_k_B < vocab).any() or (top_p_B1 < 1).any():
        ordered_BV = np.sort(shares_BV, axis=1)[:, ::-1].copy()
        kth_B1 = np.take_along_axis(ordered_BV, top_k_B[:, None] - 1, axis=1)
        ordered_BV *= ordered_BV >= kth_B1
        reached_BV = torch.from_numpy(ordered_BV).cumsum(dim=1, dtype=torch.float64).numpy()
        before_BV = reached_BV - ordered_BV
        num_kept_B = ((before_BV < top_p_B1 * reached_BV[:, -1:]) & (ordered_BV > 0)).sum(axis=1)
        # Rounding must not make top_p = 1 a filter.
        num_kept_B = np.where(top_p_B1[:, 0] < 1, np.maximum(num_kept_B, 1), (ordered_BV > 0).sum(axis=1))
        smallest_B1 = np.take_along_axis(ordered_BV, num_kept_B[:, None] - 1, axis=1)
        kept_BV = shares_BV >= smallest_B1
        surplus_B = kept_BV.sum(axis=1) - num_kept_B
        for row in np.flatnonzero(surplus_B > 0):
            # Of equals the token with the smaller id comes first.
            kept_BV[row, np.flatnonzero(shares_BV[row] == smallest_B1[row])[-surplus_B[row] :]] = False
        shares_BV = shares_BV * kept_BV
    if (lowest_B1 > 0).any():
        shares_BV = shares_BV * (shares_BV >= lowest_B1)
    cumulative_BV = torch.from_numpy(shares_BV).cumsum(dim=1).numpy()
    threshold_B1 = np.array(uniforms, dtype=np.float32)[:, None] * cumulative_BV[:, -1:]
    places: list[int] = np.minimum((cumulative_BV <= threshold_B1).sum(axis=1), vocab - 1).tolist()
    return places


def _draw_row(logits_V: Tensor, params: SamplingParams, uniform: float) -> int:
    logits_V = _finite(logits_V)
    if params.temperature == 0:
        return int(logits_V.numpy().argmax())
    shares = _shares(logits_V, max(params.temperature, SMALLEST_TEMPERATURE)).numpy()
    lowest = np.float32(params.min_p) * shares.max()
    ids: NDArray[np.intp] | None = None
    if 0 < params.top_k < len(shares):
        kth = torch.from_numpy(shares).topk(params.top_k).values[-1].item()
        ids = np.flatnonzero(shares >= kth)
        shares = shares[ids]
    kept = _nucleus(shares, params.top_p) if params.top_p < 1 else None
    if params.min_p > 0:
        kept = shares >= lowest if kept is None else kept & (shares >= lowest)
    if kept is not None and FEW * np.count_nonzero(kept) < len(shares):
        places = np.flatnonzero(kept)
        ids, shares = (places if ids is None else ids[places]), shares[places]
    elif kept is not None:
        shares *= kept
    cumulative = torch.from_numpy(shares).cumsum(0).numpy()
    place = min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(shares) - 1)
    return int(place if ids is None else ids[place])


def _nucleus(shares: FloatArray, top_p: float) -> NDArray[np.bool_]:
    """True for the fewest largest shares that hold ``top_p`` of the sum; of equals the first ones.

    Only the neighbourhood of the smallest share that stays is sorted: what is above the mean, where that holds
    enough already (as for most text), and of it the one bucket of a histogram by size in which the border falls.
    """
    target = top_p * float(shares.sum(dtype=np.float64))
    pool, mass_above, num_above = shares, 0.0, 0
    large = shares[shares >= np.float32(shares.mean(dtype=np.float64))]
    if float(large.sum(dtype=np.float64)) >= target:
        pool = large
    if len(pool) > SORTED_AT_ONCE:
        # The bits of positive floats rise with their value: exponent and three bits of the fraction.
        bucket_of = pool.view(np.int32) >> 20
        masses = np.zeros(NUM_BUCKETS)
        for start in range(0, len(pool), COUNTED_AT_ONCE):
            part = slice(start, start + COUNTED_AT_ONCE)
            masses += np.bincount(bucket_of[part], weights=pool[part], minlength=NUM_BUCKETS)
        reached = masses[::-1].cumsum()
        bucket = NUM_BUCKETS - 1 - min(int(np.searchsorted(reached, target, side="left")), NUM_BUCKETS - 1)
        mass_above, num_above = float(masses[:bucket:-1].sum()), int((bucket_of > bucket).sum())
        pool = pool[bucket_of == bucket]
    ordered = np.sort(pool)[::-1]
    before = mass_above + (ordered.cumsum(dtype=np.float64) - ordered)
    num_kept = max(1, int(np.searchsorted(before, target, side="left")))
    smallest = ordered[num_kept - 1]
    kept = shares >= smallest
    surplus = int(np.count_nonzero(kept)) - num_above - num_kept
    if surplus > 0:
        kept[np.flatnonzero(shares == smallest)[-surplus:]] = False
    return kept


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
