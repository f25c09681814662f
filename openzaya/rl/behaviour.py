"""The reward of the behavioural stage (arXiv 2605.05365): how good a response is, where it obeys.

    chat                   sigmoid(z) * 1[has an answer]       z: normalised score, clipped to +-3
    instruction following  sigmoid(z) * 1[all checkers pass]   above 0 only for what obeys

z comes from a reward model (reward_model.py) or a judge (judge.py). 0 is the lowest reward everywhere: a verbatim loop
gets it too. A checker or scorer without a verdict gives none, and the rollout is left out. Rewards are given a
group at a time, for a judge compares; they go to GRPO's advantages, for which only differences inside a group count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import BaseModel, ConfigDict, model_validator

from openzaya.environments.base import Task
from openzaya.errors import DataError
from openzaya.problems.verify import split_response
from openzaya.rl.judge import JudgeConfig
from openzaya.rl.rollout import Environments

LARGEST_SCORE = 3.0
"""Beyond it a score says more of the scorer than of the response."""


class Scorer(Protocol):
    """A reward model or a judge."""

    def score_group(self, messages: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> list[float | None]:
        """A score of about zero mean and unit size for each response to one conversation; None without a verdict."""


class BehaviourConfig(BaseModel):
    """What scores, and which environments only set prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reward_model: str | None = None
    """An earlier stage's directory name, or a directory."""
    judge: JudgeConfig | None = None
    chat: list[str] = []
    """Environments whose own verdict is not looked at; all others are gates."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.reward_model is None) == (self.judge is None):
            raise ValueError("give either reward_model or judge")
        return self


class BehaviourReward:
    """Rewards groups of responses.

    Args:
        scorer: gives z.
        environments: names of those whose tasks will be scored.
        chat: names of those that have no say: z alone counts.

    Raises:
        DataError: a name in ``chat`` that is no environment's.
    """

    def __init__(self, scorer: Scorer, environments: Collection[str], *, chat: Collection[str] = ()) -> None:
        unknown = sorted(set(chat) - set(environments))
        if unknown:
            raise DataError(
                f"chat names {', '.join(unknown)}, no environments of this run; choose from: {', '.join(environments)}"
            )
        self._scorer, self._environments, self._chat = scorer, list(environments), frozenset(chat)

    def score_group(self, task: Task, responses: Sequence[str], verdicts: Sequence[float | None]) -> list[float | None]:
        """The reward of each response to ``task``, None where there is no verdict.

        Args:
            task: one of an environment that was given.
            responses: whole texts, ``<think>reasoning</think>answer``.
            verdicts: the environment's rewards of them.

        Raises:
            DataError: a task of another environment; another number of verdicts than of responses.
        """
        if task.environment not in self._environments:
            raise DataError(
                f"a task is of environment '{task.environment}'; this reward knows: {', '.join(self._environments)}"
            )
        if len(verdicts) != len(responses):
            raise DataError(f"{len(verdicts)} verdicts for {len(responses)} responses; give one each")
        if task.environment in self._chat:
            verdicts = [float(bool(split_response(response)[1])) for response in responses]
        obeys = [place for place, verdict in enumerate(verdicts) if verdict == 1.0]
        rewards: list[float | None] = [None if verdict is None else 0.0 for verdict in verdicts]
        for place, score in zip(obeys, self._scores(task, [responses[place] for place in obeys]), strict=True):
            rewards[place] = None if score is None else positive(score)
        return rewards

    def _scores(self, task: Task, responses: Sequence[str]) -> list[float | None]:
        if not responses:
            return []
        return [_clipped(score) for score in self._scorer.score_group(task.messages, responses)]


def positive(score: float) -> float:
    """A score as a number in (0, 1), in the same order."""
    return 1 / (1 + math.exp(-score))


def _clipped(score: float | None) -> float | None:
    if score is None or not math.isfinite(score):
        return None
    return min(max(score, -LARGEST_SCORE), LARGEST_SCORE)


def make_scorer(
    config: BehaviourConfig, stages: Path, device: str = "cpu", on_wait: Callable[[], None] = lambda: None
) -> Scorer:
    """The scorer that ``config`` names.

    Args:
        stages: where earlier stages' directories lie.
        device: a reward model's.
        on_wait: called again and again while a judge is being asked or a reward model scores.
    """
    if config.judge is not None:
        from openzaya.rl.judge import Judge

        return Judge(config.judge, on_wait=on_wait)
    from openzaya.rl.reward_model import RewardModel
    from openzaya.train.loop import stage_path

    return RewardModel.load(stage_path(str(config.reward_model), stages, "model"), device=device, on_forward=on_wait)


def make_reward(
    config: BehaviourConfig | None,
    environments: Environments,
    stages: Path,
    device: str = "cpu",
    on_wait: Callable[[], None] = lambda: None,
) -> BehaviourReward | None:
    """What rewards the groups of a run with these environments; None where the verifiers' verdicts do.

    The rest as :func:`make_scorer` has it.
    """
    if config is None:
        return None
    names = dict.fromkeys(name for of_source in environments.values() for name in of_source)
    return BehaviourReward(make_scorer(config, stages, device, on_wait), names, chat=config.chat)
