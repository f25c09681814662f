"""What an environment is: it sets tasks of any difficulty and judges responses (arXiv 2605.05365, stage 2).

    task    = environment.task(difficulty, number)       a pure function of its arguments and the environment
    verdict = environment.verify(task, response)         reward 1 or 0, or None: no verdict

Difficulty is an integer from 0 without an upper end; an environment that has no harder tasks sets its hardest ones.
Tasks are plain data: they cross process borders and lie in checkpoints, the environment that set one can be made again
from its settings and judges it the same. A verifier that fails, or takes too long, gives no verdict: the rollout is
left out and counted, never taken for wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openzaya.errors import DataError
from openzaya.problems.base import Verdict

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """One task."""

    environment: str
    """The name of the environment that judges answers to it."""
    difficulty: int
    number: int
    messages: Sequence[Message]
    """The conversation that the policy is to continue, as ``openzaya.data.chat.render`` takes it."""
    data: Any
    """What the environment needs to judge: JSON."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints and queues."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Task:
        """The task that :meth:`to_json` described."""
        return Task(**values)


class Environment(ABC):
    """Sets tasks and judges responses. Used by one thread at a time."""

    name: str
    """Unique in a run, such as ``addition`` or ``reasoning-gym/chain_sum``."""

    @abstractmethod
    def task(self, difficulty: int, number: int) -> Task:
        """Task ``number`` of a difficulty, 0 or more.

        Raises:
            DataError: a negative difficulty; an environment that cannot set this task.
        """

    @abstractmethod
    def verify(self, task: Task, response: str) -> Verdict:
        """Judge the whole text of a response, ``<think>reasoning</think>answer`` or a bare answer; never raises."""

    def close(self) -> None:
        """End processes that belong to it."""
        return


def check_difficulty(difficulty: int) -> None:
    """Raise :class:`DataError` for a difficulty below 0."""
    if difficulty < 0:
        raise DataError(f"difficulty={difficulty} is below 0, the easiest; give 0 or more")
