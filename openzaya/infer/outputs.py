"""What a request gives back: whole completions, or pieces of them as they are made.

Shape suffixes: T generated tokens, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "cancelled"]
"""``stop``: end of turn, a stop string or id, or a finished grammar. ``length``: out of tokens or positions."""


class TokenLogprob(NamedTuple):
    """Natural log of the model's own probability of a token (temperature 1, before filters and penalties)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their logprobs, best first; as many as were asked for."""


@dataclass
class Completion:
    """One candidate answer. The token that ended it (end of turn, stop id) is not part of it."""

    index: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """Without the stop string that ended it, unless ``include_stop``; "" for an engine without tokenizer."""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or token id that ended it."""
    logprobs: list[TokenLogprob] | None = None
    """One entry a token, where ``SamplingParams.logprobs`` asked for them."""
    experts: np.ndarray | None = None
    """uint8 (P + T, L), where asked for: the classes of every token that was run, prompt first. One row less after
    ``length``: nothing came behind the last token, so it was not run. From the prefix cache: those recorded then."""
    versions: list[int] = field(default_factory=list)
    """The weights' version that each token was sampled with."""
    end_token: TokenLogprob | None = None
    """The token that ended it and is not part of it; training needs it, for the policy chose it too."""
    end_version: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """All candidates of one prompt."""

    prompt_tokens: list[int]
    completions: list[Completion]
    num_cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""


@dataclass(frozen=True)
class Delta:
    """A piece of candidate ``index`` of a streaming request: what is new since the last piece."""

    index: int
    tokens: list[int]
    text: str
    """Final text: never ends inside a character, never holds part of a possible stop string."""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    """Set on the last piece of the candidate."""
    num_cached_tokens: int = 0
    versions: list[int] = field(default_factory=list)
    completion: Completion | None = None
    """The whole candidate, on its last piece."""
