"""Who lies: everybody either always tells the truth or always lies.

One person is known; each statement joins a person already judged with a new one, in either role, and a
line judges that person, ``c lies``. The last line names the liars from a to z. Difficulty d has d + 7
people, at least two of them liars. The careless annotator believes every statement.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names


class Liars(Family):
    """Data: the known person and whether honest; statements as (speaker, person, whether called honest)."""

    name: ClassVar[str] = "liars"
    title: ClassVar[str] = "who lies"
    habit: ClassVar[str] = "believes every statement"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        people = draw_names(rng, difficulty + 7)
        honest = [rng.random() < 0.5 for _ in people]
        for place in rng.sample(range(len(people)), 2):
            honest[place] = False
        statements = []
        for new in range(1, len(people)):
            speaker, about = (new, rng.randrange(new)) if rng.random() < 0.4 else (rng.randrange(new), new)
            statements.append((people[speaker], people[about], honest[speaker] == honest[about]))
        told = [f"{people[0]} {_word(honest[0])}"]
        told += [f"{speaker} says {about} {_word(claim)}" for speaker, about, claim in statements]
        canonical = ", ".join([told[0], *sorted(told[1:])])
        return f"Who lies: {', '.join(told)}", canonical, ((people[0], honest[0]), tuple(statements))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        (first, is_honest), statements = data
        honest = {first: is_honest}
        lines = []
        for speaker, about, claim in statements:
            new = about if speaker in honest else speaker
            if annotator is not None and annotator.habit:
                verdict = claim if new == about else True
            else:
                # A speaker is honest exactly when the statement holds.
                verdict = (honest[speaker] == claim) if new == about else (honest[about] == claim)
            if annotator is not None and annotator.slips():
                verdict = not verdict
            honest[new] = verdict
            lines.append(f"{new} {_word(verdict)}")
        answer = " ".join(sorted(person for person, verdict in honest.items() if not verdict)) or "nobody"
        return "\n".join([*lines, answer]), answer


def _word(is_honest: bool) -> str:
    return "honest" if is_honest else "lies"
