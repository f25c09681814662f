"""Orders, rollouts and groups: what is asked of the engine, and what comes back judged.

    Order    task, G rollouts wanted, a seed            made by the learner's side, plain data
    Rollout  tokens with the engine's own log probabilities, the chosen experts, versions, a verdict
    Group    all rollouts of an order; advantages need all of them, so a group moves as one

An order's number and seed decide its rollouts as long as the weights stay the same; a group that was lost is made
again from its order. Versions are learner steps: that whose weights sampled the token.

Shape suffixes: P prompt tokens, T tokens of a rollout, L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from openzaya.environments.base import Environment, Task
from openzaya.infer.outputs import Completion, TokenLogprob
from openzaya.infer.sampling import SamplingParams
from openzaya.problems.base import Verdict
from openzaya.rl.canaries import repetition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Form = Literal["plain", "tails", "answers"]
"""How a task is asked: as it is, with tails of earlier rollouts (Markovian RSA), with their answers (PaCoRe)."""


class RolloutConfig(BaseModel):
    """How rollouts are made. They are sampled at temperature 1 from the whole distribution: the trainer's
    probabilities are then the sampler's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(16, ge=2)
    """G, rollouts a prompt."""
    max_new_tokens: int = Field(256, ge=1)
    max_running: int = Field(256, ge=1)
    """Rollouts that an engine runs together."""
    replay_experts: bool = True
    """The trainer takes the experts that the engine chose, prompt tokens included."""
    canary: Literal["off", "report", "both"] = "report"
    """Which verbatim loops take a rollout's reward: those that the report's canary sees, or longer ones too."""


@dataclass(frozen=True, slots=True)
class Order:
    """One prompt to be rolled out ``num_rollouts`` times."""

    number: int
    """Unique in a run."""
    source: str
    """The recipe's source of prompts that it belongs to."""
    form: Form
    task: Task
    """As it is asked: an aggregation prompt's messages hold the candidates."""
    num_rollouts: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        fields = ("number", "source", "form", "num_rollouts", "seed")
        return {name: getattr(self, name) for name in fields} | {"task": self.task.to_json()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Order:
        """The order that :meth:`to_json` described."""
        return Order(**{**values, "task": Task.from_json(values["task"])})


@dataclass(frozen=True)
class Rollout:
    """One response, as the engine sampled it."""

    tokens: np.ndarray
    """int32 (T), the end of turn included where the policy chose it."""
    logprobs: np.ndarray
    """float32 (T), the engine's own, natural log."""
    versions: np.ndarray
    """int32 (T), learner steps."""
    experts: np.ndarray | None
    """uint8 (P + T - 1, L): the classes of every token that was run, prompt first."""
    text: str
    is_truncated: bool
    verdict: float | None
    """The verifier's: 1 or 0, None without a verdict."""
    reward: float | None
    """What is trained on: the verdict, or the behavioural stage's score; 0 where the canary fired."""
    reason: str = ""
    is_short_loop: bool = False
    is_long_loop: bool = False


@dataclass(frozen=True)
class Group:
    """The rollouts of one order."""

    order: Order
    prompt_tokens: np.ndarray
    """int32 (P)"""
    rollouts: list[Rollout]
    seconds: float = 0.0
    """From the order's start to its last verdict."""

    @property
    def rewards(self) -> list[float]:
        """Of the rollouts that have one."""
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]

    @property
    def verdicts(self) -> list[float]:
        """Of the rollouts that have one."""
        return [rollout.verdict for rollout in self.rollouts if rollout.verdict is not None]

    @property
    def solve_rate(self) -> float:
        """Mean verdict; 0 where there is none."""
        return float(np.mean(self.verdicts)) if self.verdicts else 0.0

    @property
    def oldest_version(self) -> int:
        return min((int(rollout.versions.min()) for rollout in self.rollouts if len(rollout.versions)), default=0)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return sum(len(rollout.tokens) for rollout in self.rollouts)


@dataclass
class VersionLog:
    """Which learner step an engine's count of weight changes stands for."""

    steps: list[int] = field(default_factory=lambda: [0])

    def add(self, engine_version: int, step: int) -> None:
        """The weights of ``step`` have become the engine's version ``engine_version``."""
        self.steps += [self.steps[-1]] * (engine_version + 1 - len(self.steps))
        self.steps[engine_version] = step

    def of(self, engine_versions: Sequence[int]) -> np.ndarray:
        return np.asarray(self.steps, dtype=np.int32)[np.asarray(engine_versions, dtype=np.int64)]


def order_seed(run_seed: int, number: int) -> int:
    """The seed of a run's order ``number``: far from its neighbours', whose candidates draw from seed + i."""
    digest = hashlib.blake2b(f"{run_seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 16


def sampling_params(order: Order, config: RolloutConfig) -> SamplingParams:
    """The engine's settings for an order."""
    return SamplingParams(
        temperature=1,
        top_p=1,
        max_new_tokens=config.max_new_tokens,
        seed=order.seed,
        logprobs=0,
        return_experts=config.replay_experts,
    )


def prompt_of(task: Task, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The task's conversation as tokens, up to where the assistant begins."""
    from openzaya.data.chat import render

    return render([dict(message) for message in task.messages], tokenizer, add_generation_prompt=True).tokens


Environments = Mapping[str, Mapping[str, Environment]]
"""Source -> name -> environment: two sources may each have an environment of one name, with settings of its own."""


class GroupReward(Protocol):
    """What rewards a group's responses where the verdict alone does not (behaviour.py)."""

    def score_group(self, task: Task, responses: Sequence[str], verdicts: Sequence[float | None]) -> list[float | None]:
        """A reward for each response, None without one; ``verdicts`` are the environment's."""


def make_rollout(
    completion: Completion,
    versions: VersionLog,
    verdict: Verdict,
    reward: float | None,
    canary: Literal["off", "report", "both"],
) -> Rollout:
    """A rollout of what the engine gave back with the settings of :func:`sampling_params`."""
    chosen: list[TokenLogprob] = list(completion.logprobs or [])
    engine_versions = list(completion.versions)
    if completion.end_token is not None:
        chosen.append(completion.end_token)
        engine_versions.append(completion.end_version)
    tokens = np.array([entry.token for entry in chosen], dtype=np.int32)
    loop = repetition(tokens)
    is_loop = (canary != "off" and loop.is_short_loop) or (canary == "both" and loop.is_long_loop)
    loses_reward = is_loop and reward is not None
    return Rollout(
        tokens=tokens,
        logprobs=np.array([entry.logprob for entry in chosen], dtype=np.float32),
        versions=versions.of(engine_versions),
        experts=completion.experts,
        text=completion.text,
        is_truncated=completion.finish_reason == "length",
        verdict=verdict.reward,
        reward=0.0 if loses_reward else reward,
        reason="verbatim loop" if loses_reward else verdict.reason,
        is_short_loop=loop.is_short_loop,
        is_long_loop=loop.is_long_loop,
    )
