"""RLVE-Gym as environments ``rlve/NAME``, from a checkout of its repository (arXiv 2511.07317).

A checkout is a folder that holds the package ``Gym``; it is named in the recipe or by RLVE_GYM_PATH. Difficulty d is d
updates of an environment's parameter controller, and the task's number chooses among the controller's parameters. The
reward is ``accuracy``, 1 or 0; the graded ``reward`` of the library is not used. Its generators set the seeds of all
global generators, so they run in a worker process. An answer stands between ``<answer>`` and ``</answer>``, once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from openzaya.environments.base import Environment
from openzaya.environments.generated import GeneratedEnvironment, GeneratedService, names_alternatives
from openzaya.environments.names import choose_names
from openzaya.environments.worker import Worker, WorkerFailure
from openzaya.errors import DataError

PREFIX = "rlve"
PATH_VARIABLE = "RLVE_GYM_PATH"
MARKERS = ("<answer>", "</answer>")
_GENERATOR_TIMEOUT_S = 50


class RlveSpec(BaseModel):
    """Recipe entry of environments of an RLVE-Gym checkout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rlve"] = "rlve"
    path: str = ""
    """The checkout; empty: what RLVE_GYM_PATH says."""
    names: list[str] = ["*"]
    """Environments; ``*`` and ``?`` stand for any letters."""
    exclude: list[str] = []
    seed: int = 0

    def make(self) -> list[Environment]:
        return rlve_environments(self.path, self.names, exclude=self.exclude, seed=self.seed)


class RlveEnvironment(GeneratedEnvironment):
    """One environment of RLVE-Gym."""

    def malformed(self, answer: str) -> str | None:
        if any(answer.count(marker) != 1 for marker in MARKERS):
            return f"not one answer between {MARKERS[0]} and {MARKERS[1]}"
        return None


def rlve_environments(
    path: str = "", names: Sequence[str] = ("*",), *, exclude: Sequence[str] = (), seed: int = 0
) -> list[Environment]:
    """The environments of the checkout at ``path`` that ``names`` name; they share one worker process.

    Raises:
        DataError: no checkout there, one that does not import, or no such environment.
    """
    path = path or os.environ.get(PATH_VARIABLE, "")
    if not path or not (Path(path) / "Gym" / "environments" / "__init__.py").is_file():
        found = f"'{path}' holds no folder Gym/environments" if path else f"neither path nor {PATH_VARIABLE} is set"
        raise DataError(
            f"environments of kind 'rlve' need a checkout of RLVE-Gym: {found}; clone it and name the clone"
        )
    worker = Worker("openzaya.environments.rlve:Service", {"seed": seed, "path": str(Path(path).resolve())})
    try:
        known = worker.call("names", timeout_s=1.0)
        chosen = choose_names(names, known, exclude=exclude, what="environment of RLVE-Gym")
        return [RlveEnvironment(PREFIX, name, worker) for name in chosen]
    except WorkerFailure as failure:
        raise DataError(
            f"the RLVE-Gym checkout '{path}' does not run: {failure}; update it or install what it needs"
        ) from None
    finally:
        worker.close()


class Service(GeneratedService):
    """Runs in the worker process."""

    def __init__(self, seed: int, path: str) -> None:
        super().__init__(seed)
        sys.path.insert(0, path)
        from Gym.environments import identifier2environment
        from Gym.parameter_controllers import identifier2controller

        self._environments, self._controllers = identifier2environment, identifier2controller

    def names(self) -> list[str]:
        return [name for name in self._environments if name in self._controllers]

    def _make(self, name: str, difficulty: int, number: int) -> tuple[str, Any]:
        controller = self._controllers[name]()
        for _ in range(difficulty):
            controller.update()
        parameters = controller.get_parameter_list()
        environment = self._environments[name](answer_markers=MARKERS)
        seed = self.seed_of(name, difficulty, number)
        if not environment.generator(seed, parameters[number % len(parameters)], _GENERATOR_TIMEOUT_S):
            raise RuntimeError("its generator failed or took too long")
        return environment.prompt_generator(), environment

    def _score(self, name: str, made: Any, answer: str) -> float:
        if names_alternatives(answer, str(made.parameter.get("reference_answer", "or"))):
            return 0.0
        return float(made.verifier(answer)["accuracy"])

    def gold(self, name: str, difficulty: int, number: int) -> str | None:
        """The library's own answer between its markers; None where it has none."""
        parameter = self._find(name, difficulty, number)[1].parameter
        gold = parameter.get("reference_answer")
        return None if gold is None else f"{MARKERS[0]}{gold}{MARKERS[1]}"
