"""All families by name, those that recipes train on unless told otherwise, the further ones, and the one never seen.

``TRAINED_FAMILIES`` and ``NEVER_TRAINED`` are what the nano recipes use; ``NEVER_TRAINED`` is kept out of every
recipe: it measures what carries over to another kind of task. ``FURTHER_FAMILIES`` are there to be chosen, for
reinforcement learning above all.
"""

from __future__ import annotations

import difflib

from openzaya.errors import DataError
from openzaya.problems.addition import Addition
from openzaya.problems.arithmetic_chain import ArithmeticChain
from openzaya.problems.automaton import Automaton
from openzaya.problems.base import Family
from openzaya.problems.base_conversion import BaseConversion
from openzaya.problems.bitwise import Bitwise
from openzaya.problems.blocks import Blocks
from openzaya.problems.brackets import Brackets
from openzaya.problems.caesar import Caesar
from openzaya.problems.code_falsification import CodeFalsification
from openzaya.problems.code_input import CodeInput
from openzaya.problems.code_output import CodeOutput
from openzaya.problems.colouring import Colouring
from openzaya.problems.counting import Counting
from openzaya.problems.dates import Calendar, Clock
from openzaya.problems.differences import Differences
from openzaya.problems.equation import Equation
from openzaya.problems.family_tree import FamilyTree
from openzaya.problems.fractions_sum import FractionsSum
from openzaya.problems.gcd import Gcd
from openzaya.problems.graphs import Reachability, ShortestPath
from openzaya.problems.largest_run import LargestRun
from openzaya.problems.letter_sets import LetterSets
from openzaya.problems.letter_values import LetterValues
from openzaya.problems.liars import Liars
from openzaya.problems.logic import Logic
from openzaya.problems.matrix import Matrix
from openzaya.problems.modular import Modular
from openzaya.problems.polynomial import Polynomial
from openzaya.problems.prime_factors import PrimeFactors
from openzaya.problems.program import Program
from openzaya.problems.run_length import RunLength
from openzaya.problems.sorting import Sorting
from openzaya.problems.stack_machine import StackMachine
from openzaya.problems.string_edits import StringEdits
from openzaya.problems.subset_sum import SubsetSum
from openzaya.problems.target_number import TargetNumber
from openzaya.problems.task_order import TaskOrder
from openzaya.problems.turtle import Turtle
from openzaya.problems.units import Units
from openzaya.problems.versions import Versions

TRAINED_FAMILIES: tuple[str, ...] = (
    ArithmeticChain.name,
    Modular.name,
    BaseConversion.name,
    Sorting.name,
    Counting.name,
    StringEdits.name,
    Logic.name,
    Program.name,
    Addition.name,
)
NEVER_TRAINED: str = LargestRun.name
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
        Gcd(),
        PrimeFactors(),
        FractionsSum(),
        Bitwise(),
        Units(),
        Matrix(),
        Polynomial(),
        Equation(),
        Differences(),
        Clock(),
        Calendar(),
        Versions(),
        RunLength(),
        Caesar(),
        Brackets(),
        LetterSets(),
        StackMachine(),
        Blocks(),
        Turtle(),
        Automaton(),
        LetterValues(),
        Liars(),
        FamilyTree(),
        Reachability(),
        ShortestPath(),
        TaskOrder(),
        SubsetSum(),
        TargetNumber(),
        Colouring(),
        CodeOutput(),
        CodeInput(),
        CodeFalsification(),
    )
}
FURTHER_FAMILIES: tuple[str, ...] = tuple(
    name for name in FAMILIES if name not in TRAINED_FAMILIES and name != NEVER_TRAINED
)


def get_family(name: str) -> Family:
    """The family called ``name``; an unknown name raises :class:`DataError` with the nearest known one."""
    family = FAMILIES.get(name)
    if family is None:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of: {', '.join(FAMILIES)}"
        raise DataError(f"unknown problem family '{name}'; {hint}")
    return family
