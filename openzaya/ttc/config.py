"""Settings of Markovian RSA (arXiv 2605.05365, section VI) and its presets.

One algorithm with these settings is also its special cases:

    t = 0                        N parallel samples; with a selector best-of-N
    c = 1                        Markovian thinking: each candidate continues its own tail (``continuation``)
    tau = beta                   full-chain RSA (or ``compaction="full"``)
    carry = "answer"             PaCoRe: candidates' answers instead of their reasoning
    carry = "answer_or_reasoning"  the hybrid: the answer where there is one, else the tail

``t`` counts aggregation rounds after round 0, as the report does: t = 2 is three generations. Code that counts all
rounds calls the same run 3; see :func:`from_proxy_names` for the names of Zyphra's example proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openzaya.data.aggregation import PromptStyle, TaskKind
from openzaya.errors import ConfigError

Carry = Literal["reasoning", "answer", "answer_or_reasoning", "both"]
Compaction = Literal["tail", "full"]
Continuation = Literal["refine", "prefill"]
Select = Literal["majority", "verifier", "aggregate", "random", "all"]
FailurePolicy = Literal["refill", "continue"]

MAX_WIDTH = 4096
MAX_ROUNDS = 64


class RSASampling(BaseModel):
    """How rollouts are sampled. The defaults are those of the report's evaluations; None: the endpoint's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)


class RSAConfig(BaseModel):
    """What a run of Markovian RSA does. All budgets are in tokens of the model that runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(16, ge=1, le=MAX_WIDTH)
    """Population: rollouts a round."""
    c: int = Field(4, ge=1, le=MAX_WIDTH)
    """Candidates in an aggregation prompt; of a smaller population, all."""
    t: int = Field(2, ge=0, le=MAX_ROUNDS)
    """Aggregation rounds after round 0."""
    beta: int = Field(16_384, ge=1)
    """Most new tokens of a rollout before the final round. One that is cut off is carried all the same."""
    tau: int = Field(4096, ge=0)
    """Length of a tail: the last tokens of a candidate's reasoning."""
    final_budget: int = Field(40_960, ge=1)
    """Most new tokens of a rollout of the final round, answer included."""
    answer_budget: int = Field(4096, ge=1)
    """What the final round keeps of its budget for the answer: reasoning is closed when only so much is left; at
    most half of ``final_budget`` is kept."""
    final_n: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Rollouts of the final round; None: ``n``."""
    widths: tuple[int, ...] = Field((), max_length=MAX_ROUNDS + 1)
    """Rollouts of each round 0 .. t, instead of ``n`` and ``final_n`` (PaCoRe narrows its rounds)."""

    carry: Carry = "reasoning"
    """What a candidate hands on: its reasoning, its answer, the answer where there is one, or both."""
    compaction: Compaction = "tail"
    """``full`` hands on all of it, whatever ``tau``."""
    continuation: Continuation = "refine"
    """For c = 1: ask for a better solution of the tail, or write on inside the reasoning, as Delethink does."""
    kept_head: int = Field(0, ge=0)
    """With ``prefill``: so many of the reasoning's first tokens stay before the tail."""
    select: Select = "majority"
    """Which of the final round is returned; the score is the mean over the final round in any case."""
    task: TaskKind = "general"
    prompt_style: PromptStyle = "full"
    """``short`` is the form that small models are trained with."""
    sampling: RSASampling = RSASampling()
    final_sampling: RSASampling | None = None
    """None: as ``sampling``."""
    seed: int = 0

    on_failure: FailurePolicy = "refill"
    """A rollout that failed after all retries is drawn again (``max_refills`` times), or the round goes on without."""
    max_refills: int = Field(2, ge=0)

    early_stop: float | None = Field(None, gt=0, le=1)
    """Deviation: a round in which this share of the answers agrees is the last one."""
    quorum: float | None = Field(None, gt=0, le=1)
    """Deviation: a round ends when this share of its rollouts is done; the others are cancelled."""
    asynchronous: bool = False
    """Deviation in time, not in what is drawn: a rollout begins when its own candidates are there."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.widths and len(self.widths) != self.t + 1:
            raise ValueError(f"widths={self.widths} are {len(self.widths)} rounds, t={self.t} makes {self.t + 1}")
        if any(not 1 <= width <= MAX_WIDTH for width in self.widths):
            raise ValueError(f"widths={self.widths}: a round has 1 to {MAX_WIDTH} rollouts")
        if self.continuation == "prefill" and self.c != 1:
            raise ValueError(f"continuation='prefill' writes on one tail, c={self.c}; set c=1 or continuation='refine'")
        if self.asynchronous and (self.quorum is not None or self.early_stop is not None):
            raise ValueError("asynchronous rounds have no common end; leave out quorum and early_stop")
        return self

    def width(self, round_index: int) -> int:
        """Rollouts of a round, 0 .. t."""
        if self.widths:
            return self.widths[round_index]
        return self.final_n or self.n if round_index == self.t else self.n

    def round_sampling(self, round_index: int) -> RSASampling:
        is_final = round_index == self.t
        return self.final_sampling if is_final and self.final_sampling is not None else self.sampling

    @property
    def final_thinking(self) -> int:
        """Most tokens of reasoning in the final round."""
        return self.final_budget - min(self.answer_budget, self.final_budget // 2)

    @property
    def num_rollouts(self) -> int:
        return sum(self.width(round_index) for round_index in range(self.t + 1))

    @property
    def deviations(self) -> list[str]:
        """The settings with which a run is not the report's algorithm."""
        names = ("early_stop", "quorum", "asynchronous")
        return [name for name in names if getattr(self, name)]

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant."""
        found = []
        if self.t and self.compaction == "tail" and self.carry == "reasoning" and self.tau > self.beta:
            found.append(f"tau={self.tau} is above beta={self.beta}: tails are whole rollouts (full-chain RSA)")
        if self.t and self.c > self.width(0):
            found.append(f"c={self.c} is above the population of {self.width(0)}: all of it is aggregated")
        if self.t and self.tau == 0 and self.compaction == "tail" and self.carry != "answer":
            found.append("tau=0 carries no reasoning from round to round")
        return found


def _preset(**values: Any) -> RSAConfig:
    return RSAConfig(**values)


PRESETS: dict[str, RSAConfig] = {
    "light": _preset(n=8, beta=8192),
    "default": _preset(),
    "high": _preset(beta=40_960),
    "extra-high": _preset(n=32, t=8, beta=32_768),
    "8k-4k": _preset(beta=8192),
    "16k-4k": _preset(),
    "40k-4k": _preset(beta=40_960),
    "40k-8k": _preset(beta=40_960, tau=8192),
    "markovian": _preset(c=1, t=4, beta=8192),
    "apex-light": _preset(beta=8192),
    "apex-high": _preset(t=8),
    "apex-extra-high": _preset(n=32, t=8, beta=32_768),
    "delethink": _preset(c=1, t=4, beta=8192, continuation="prefill", kept_head=100),
    "full-chain": _preset(compaction="full"),
    "pacore": _preset(widths=(32, 4, 1), c=32, carry="answer"),
    "hybrid": _preset(beta=40_960, carry="answer_or_reasoning"),
    "parallel": _preset(t=0),
}
"""By name: the report's rows, those for everyday use, and the special cases."""

_PROXY_NAMES = {
    "rsa_n": "n",
    "rsa_k": "c",
    "rsa_t": "t",
    "short_resp_len": "beta",
    "tail_window_len": "tau",
    "rsa_tail_window_len": "tau",
    "rsa_final_n": "final_n",
    "final_aggregation_prompts": "final_n",
}


def from_proxy_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names of Zyphra's example proxy, under ours; others stay as they are.

    There ``rsa_final_n=0`` means N, and ``use_pacore`` is the hybrid.
    """
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        if name == "use_pacore":
            renamed["carry"] = "answer_or_reasoning" if value else "reasoning"
            continue
        own = _PROXY_NAMES.get(name, name)
        if own in renamed or (own != name and own in values):
            raise ConfigError(f"'{name}' and another setting both give {own}; leave one out")
        renamed[own] = None if own == "final_n" and value == 0 else value
    return renamed


def make_config(preset: str | RSAConfig = "default", changes: Mapping[str, Any] | None = None) -> RSAConfig:
    """A preset with changes; both our names and the example proxy's are understood.

    Raises ``ConfigError`` for an unknown preset or setting, or a value out of range.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ConfigError(f"RSA preset '{preset}' is unknown; choose one of: {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    values = preset.model_dump() | from_proxy_names(changes or {})
    if changes and "widths" not in changes and isinstance(values["t"], int):
        values["widths"] = values["widths"] if len(values["widths"]) == values["t"] + 1 else ()
    try:
        return RSAConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"RSA has no setting '{where}'; it has: {', '.join(RSAConfig.model_fields)}") from None
        raise ConfigError(f"RSA settings: {where + ': ' if where else ''}{first['msg']}") from None
