"""What a stage of RL leaves for reading, beside its metrics: one JSON object a line.

groups.jsonl     a line a step: the groups that were drawn for it, dropped ones too, and whether each was trained on
rollouts.jsonl   some good and some bad rollouts of every few steps
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openzaya.rl.rollout import Group
from openzaya.runlog import write_text_atomically

KEPT_EACH = 2
"""Right and wrong rollouts, and those without a verdict, that are kept of a step."""


class StepLines:
    """Appends objects with a ``step``; what a process that was cut off wrote behind ``last_step`` is removed first."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [entry for entry in read_lines(path) if entry["step"] <= last_step]
        write_text_atomically(path, "".join(_line(entry) for entry in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append and flush."""
        self._file.write("".join(map(_line, entries)))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects, oldest first; a half-written last line is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def describe_groups(step: int, drawn: Sequence[Group], trained: Sequence[Group]) -> dict[str, Any]:
    """The line of ``groups.jsonl`` for a step."""
    numbers = {group.order.number for group in trained}
    groups = [
        {
            "number": group.order.number,
            "source": group.order.source,
            "environment": group.order.task.environment,
            "difficulty": group.order.task.difficulty,
            "form": group.order.form,
            "solve_rate": group.solve_rate,
            "no_verdict": sum(rollout.verdict is None for rollout in group.rollouts),
            "mean_tokens": group.num_tokens / max(1, len(group.rollouts)),
            "oldest_version": group.oldest_version,
            "seconds": round(group.seconds, 3),
            "trained": group.order.number in numbers,
        }
        for group in drawn
    ]
    return {"step": step, "groups": groups}


def choose_samples(step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A few rollouts of ``step`` for ``rollouts.jsonl``: the first of each kind, each from another group."""
    left = {1.0: KEPT_EACH, 0.0: KEPT_EACH, None: KEPT_EACH}
    entries = []
    for group in groups:
        rollout = next((rollout for rollout in group.rollouts if left.get(rollout.verdict, 0) > 0), None)
        if rollout is None:
            continue
        left[rollout.verdict] -= 1
        entries.append(
            {
                "step": step,
                "environment": group.order.task.environment,
                "difficulty": group.order.task.difficulty,
                "form": group.order.form,
                "solve_rate": group.solve_rate,
                "verdict": rollout.verdict,
                "reward": rollout.reward,
                "reason": rollout.reason,
                "num_tokens": len(rollout.tokens),
                "is_truncated": rollout.is_truncated,
                "prompt": group.order.task.messages[-1]["content"],
                "response": rollout.text,
            }
        )
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
