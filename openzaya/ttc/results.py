"""What a run of Markovian RSA gives back, and what it tells while it goes.

Everything here survives JSON: ``to_dict`` is what the journal keeps, the command prints and the view draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from openzaya.ttc.completer import Capabilities, Rollout, Tail, Usage
from openzaya.ttc.config import RSAConfig

Status = Literal["done", "failed", "cancelled"]


@dataclass(frozen=True)
class Candidate:
    """One slot of a round and what became of it."""

    round_index: int
    slot: int
    parents: tuple[int, ...]
    """Slots of the round before whose tails were in its prompt, in the order in which they stood there."""
    status: Status
    seed: int
    rollout: Rollout | None = None
    """None unless ``status`` is ``done``."""
    tail: Tail | None = None
    """What the next round is given; None after the final round."""
    answer: str | None = None
    """Normalised, for comparing; None where the rollout has none."""
    correct: float | None = None
    """Reward of the verifier, where one was given and had a verdict."""
    error: str | None = None
    is_resumed: bool = False
    """Taken from the journal."""


@dataclass(frozen=True)
class Round:
    """One generation of candidates, by slot."""

    index: int
    candidates: tuple[Candidate, ...]
    is_final: bool
    seconds: float
    """Wall-clock time from the first call to the last end; of resumed rounds, what was left of them."""

    @property
    def done(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.status == "done"]

    @property
    def usage(self) -> Usage:
        total = Usage()
        for candidate in self.candidates:
            if candidate.rollout is not None:
                total += candidate.rollout.usage
        return total

    @property
    def carried_tokens(self) -> int:
        """Tokens of the tails that this round hands on."""
        return sum(candidate.tail.num_tokens for candidate in self.candidates if candidate.tail is not None)

    @property
    def truncated(self) -> int:
        """Rollouts that were cut off at their budget."""
        return sum(c.rollout is not None and c.rollout.finish_reason == "length" for c in self.candidates)

    def answers(self) -> dict[str, int]:
        """How many candidates gave each answer, most frequent first, then the earliest."""
        counts: dict[str, int] = {}
        for candidate in self.done:
            if candidate.answer is not None:
                counts[candidate.answer] = counts.get(candidate.answer, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class RSAResult:
    """A finished run."""

    config: RSAConfig
    capabilities: Capabilities
    rounds: tuple[Round, ...]
    selected: tuple[Candidate, ...]
    """One candidate; with ``select="all"`` all of the final round."""
    seconds: float
    selection: Rollout | None = None
    """The call that ``select="aggregate"`` makes; its text is then the answer."""
    stopped_early: str | None = None
    """Why fewer rounds were made than asked: agreement, or the cap on tokens."""
    warnings: tuple[str, ...] = ()

    @property
    def answer(self) -> Rollout:
        """What is returned to whoever asked one question."""
        if self.selection is not None:
            return self.selection
        rollout = self.selected[0].rollout
        assert rollout is not None
        return rollout

    @property
    def usage(self) -> Usage:
        """All tokens of the run. ``completion`` is the report's D(q): prompts and copied tails are not in it."""
        total = self.selection.usage if self.selection is not None else Usage()
        for one in self.rounds:
            total += one.usage
        return total

    @property
    def score(self) -> float | None:
        """Mean reward over the final round's candidates that have one; the report's measure."""
        rewards = [candidate.correct for candidate in self.rounds[-1].done if candidate.correct is not None]
        return sum(rewards) / len(rewards) if rewards else None

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON; tokens, answers and times of each round included."""
        return {
            "config": self.config.model_dump(mode="json"),
            "capabilities": asdict(self.capabilities),
            "rounds": [round_to_dict(one) for one in self.rounds],
            "selected": [candidate.slot for candidate in self.selected],
            "answer": {
                "content": self.answer.content,
                "reasoning": self.answer.reasoning,
                "tool_calls": list(self.answer.tool_calls),
                "normalised": self.selected[0].answer if self.selection is None else None,
            },
            "score": self.score,
            "tokens": asdict(self.usage),
            "seconds": round(self.seconds, 3),
            "stopped_early": self.stopped_early,
            "deviations": self.config.deviations,
            "warnings": list(self.warnings),
        }


def round_to_dict(one: Round) -> dict[str, Any]:
    """A round as JSON."""
    return {
        "round": one.index,
        "is_final": one.is_final,
        "seconds": round(one.seconds, 3),
        "tokens": asdict(one.usage),
        "carried_tokens": one.carried_tokens,
        "truncated": one.truncated,
        "failed": sum(candidate.status == "failed" for candidate in one.candidates),
        "answers": one.answers(),
        "candidates": [asdict(candidate) for candidate in one.candidates],
    }


def candidate_from_dict(values: Mapping[str, Any]) -> Candidate:
    """The inverse of ``asdict`` on a candidate."""
    fields = dict(values)
    if fields.get("rollout") is not None:
        rollout = dict(fields["rollout"])
        rollout["usage"] = Usage(**rollout["usage"])
        rollout["tool_calls"] = tuple(rollout["tool_calls"])
        fields["rollout"] = Rollout(**rollout)
    if fields.get("tail") is not None:
        fields["tail"] = Tail(**fields["tail"])
    fields["parents"] = tuple(fields["parents"])
    return Candidate(**fields)


@dataclass(frozen=True)
class Event:
    """Something that happened; displays and servers live on these."""

    kind: Literal["started", "launched", "candidate", "round", "selected"]
    round_index: int = -1
    slot: int = -1
    parents: tuple[int, ...] = ()
    candidate: Candidate | None = None
    """With ``candidate``."""
    round: Round | None = None
    """With ``round``."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """With ``started``: the settings and the estimate; with ``selected``: the slots."""


OnEvent = Callable[[Event], None]
