"""All constraint types by name, constraints from files, and draws of several that go together."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from openzaya.errors import DataError
from openzaya.problems.instructions import (
    hard_layout,
    hard_sentences,
    hard_words,
    ifeval_content,
    ifeval_layout,
    ifeval_whole,
)
from openzaya.problems.instructions.base import EVERYTHING, Constraint


def _types(*modules: Any) -> dict[str, type[Constraint]]:
    found = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Constraint) and "kind" in vars(value)
    ]
    return {constraint.kind: constraint for constraint in found}


IFEVAL_CONSTRAINTS: dict[str, type[Constraint]] = _types(ifeval_content, ifeval_layout, ifeval_whole)
"""The 25 types of IFEval (arXiv 2311.07911), under its names."""
HARD_CONSTRAINTS: dict[str, type[Constraint]] = _types(hard_words, hard_sentences, hard_layout)
CONSTRAINTS: dict[str, type[Constraint]] = IFEVAL_CONSTRAINTS | HARD_CONSTRAINTS
NEEDS_LANGDETECT = frozenset({"language:response_language"})


def get_constraint(kind: str) -> type[Constraint]:
    """The type called ``kind``; an unknown name raises :class:`DataError` with the nearest known one."""
    constraint = CONSTRAINTS.get(kind)
    if constraint is None:
        near = difflib.get_close_matches(str(kind), CONSTRAINTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of: {', '.join(CONSTRAINTS)}"
        raise DataError(f"unknown constraint '{kind}'; {hint}")
    return constraint


def make_constraint(kind: str, arguments: Mapping[str, Any] | None = None) -> Constraint:
    """The constraint of a data file; arguments that are null count as not given.

    Raises:
        DataError: an unknown kind, an unknown or missing argument, or a value that does not fit.
    """
    constraint = get_constraint(kind)
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    known = {field.name: field for field in fields(constraint)}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise DataError(f"{kind}: unknown arguments {unknown}; it takes {sorted(known) or 'none'}")
    missing = sorted(name for name, field in known.items() if field.default is MISSING and name not in given)
    if missing:
        raise DataError(f"{kind}: arguments {missing} are missing")
    return constraint(**given)


def draw_constraints(rng: random.Random, num: int, kinds: Sequence[str] = ()) -> list[Constraint]:
    """``num`` constraints that can hold together, of ``kinds`` (empty: all that need no extra package).

    No two share an aspect of the text. Fewer come back where not so many go together.
    """
    if num < 1:
        raise DataError(f"num={num} constraints; give at least 1")
    pool = [get_constraint(kind) for kind in kinds] or [
        constraint for kind, constraint in CONSTRAINTS.items() if kind not in NEEDS_LANGDETECT
    ]
    drawn: list[Constraint] = []
    taken: set[str] = set()
    for constraint in rng.sample(pool, len(pool)):
        if taken & constraint.aspects or (taken and EVERYTHING in constraint.aspects) or EVERYTHING in taken:
            continue
        drawn.append(constraint.draw(rng))
        taken |= constraint.aspects
        if len(drawn) == num:
            break
    return drawn
