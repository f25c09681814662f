"""All families by name, those that training draws from, and the one it never sees.

``NEVER_TRAINED`` is kept out of every recipe: it measures what carries over to another kind of task.
"""

from __future__ import annotations

import difflib

from openzaya.errors import DataError
from openzaya.problems.addition import Addition
from openzaya.problems.arithmetic_chain import ArithmeticChain
from openzaya.problems.base import Family
from openzaya.problems.base_conversion import BaseConversion
from openzaya.problems.counting import Counting
from openzaya.problems.largest_run import LargestRun
from openzaya.problems.logic import Logic
from openzaya.problems.modular import Modular
from openzaya.problems.program import Program
from openzaya.problems.sorting import Sorting
from openzaya.problems.string_edits import StringEdits

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ArithmeticChain(),
        Modular(),
        BaseConversion(),
        Sorting(),
        Counting(),
        StringEdits(),
        Logic(),
        Program(),
        Addition(),
        LargestRun(),
    )
}
NEVER_TRAINED: str = LargestRun.name
TRAINED_FAMILIES: tuple[str, ...] = tuple(name for name in FAMILIES if name != NEVER_TRAINED)


def get_family(name: str) -> Family:
    """The family called ``name``; an unknown name raises :class:`DataError` with the nearest known one."""
    family = FAMILIES.get(name)
    if family is None:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of: {', '.join(FAMILIES)}"
        raise DataError(f"unknown problem family '{name}'; {hint}")
    return family
