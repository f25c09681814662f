"""Environments from a recipe: one specification a kind, told apart by ``kind``.

A specification stands beside the environments that it makes and imports no library before ``make`` is called. A new
kind is one line in ``EnvironmentSpec``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.environments.base import Environment
from openzaya.environments.code import CodeSpec
from openzaya.environments.instructions import ConstraintsSpec, InstructionsSpec
from openzaya.environments.mathematics import MathematicsSpec
from openzaya.environments.names import choose_names
from openzaya.environments.reasoning_gym import ReasoningGymSpec
from openzaya.environments.rlve import RlveSpec
from openzaya.errors import DataError
from openzaya.problems import FAMILIES, TRAINED_FAMILIES


class ProblemsSpec(BaseModel):
    """The built-in families of problems."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["problems"] = "problems"
    families: list[str] = list(TRAINED_FAMILIES)
    """Families; ``*`` and ``?`` stand for any letters."""
    exclude: list[str] = []
    seed: int = 0

    def make(self) -> list[Environment]:
        from openzaya.environments.families import FamilyEnvironment

        chosen = choose_names(self.families, list(FAMILIES), exclude=self.exclude, what="problem family")
        return [FamilyEnvironment(family, seed=self.seed) for family in chosen]


EnvironmentSpec = Annotated[
    ProblemsSpec | ReasoningGymSpec | RlveSpec | MathematicsSpec | CodeSpec | InstructionsSpec | ConstraintsSpec,
    Field(discriminator="kind"),
]
"""Any of the kinds."""


def make_environments(specs: Sequence[EnvironmentSpec]) -> dict[str, Environment]:
    """All environments that the specifications name, by name.

    Raises:
        DataError: two of one name; what a specification cannot make. None stays open then.
    """
    environments: dict[str, Environment] = {}
    try:
        for spec in specs:
            for environment in spec.make():
                if environment.name in environments:
                    environment.close()
                    raise DataError(
                        f"two environments are called '{environment.name}'; name it once, or give one another name"
                    )
                environments[environment.name] = environment
    except BaseException:
        for environment in environments.values():
            environment.close()
        raise
    return environments
