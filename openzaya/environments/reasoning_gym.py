"""The data sets of reasoning-gym as environments ``reasoning-gym/NAME`` (package ``reasoning-gym``, arXiv 2505.24760).

Difficulty d sets every attribute of a data set's curriculum to level min(d, its highest); a data set without a
curriculum sets the same tasks at any difficulty. Many of its scorers give points for any text, so a reward is 1 only
for a full score. The answer is all text after ``</think>``. Of some data sets few answers are possible, and guessing
pays: ``guessable = false`` leaves them out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from openzaya.environments.base import Environment
from openzaya.environments.generated import GeneratedEnvironment, GeneratedService, names_alternatives
from openzaya.environments.names import choose_names
from openzaya.environments.worker import Worker, WorkerFailure
from openzaya.errors import DataError

PREFIX = "reasoning-gym"
WITHOUT_TASKS = ("composite",)
"""Mixes other data sets, and has no tasks without being told which."""
GUESSABLE = (
    *("acre", "aiw", "binary_alternation", "calendar_arithmetic", "circuit_logic", "coin_flip", "count_bits"),
    *("course_schedule", "family_relationships", "game_of_life_halting", "gcd", "isomorphic_strings", "largest_island"),
    *("leg_counting", "letter_counting", "mahjong_puzzle", "maze", "modulo_grid", "n_queens", "number_sequence"),
    *("polynomial_equations", "products", "ransom_note", "rectangle_count", "rotten_oranges", "self_reference"),
    *("shortest_path", "syllogism", "time_intervals", "tower_of_hanoi", "tsumego"),
)
"""Their easiest tasks have one answer in more than an eighth of all cases (the first 64 of seed 0)."""
_SIZES = (2_000, 50)
_NUM_SETS = 256
_COMMAS_MATTER = ("polynomial_equations",)
_COMPARED_HERE = ("game_of_life_halting",)
"""Their scorers take any text for right: the answer must be the library's own, up to case and blanks."""


class ReasoningGymSpec(BaseModel):
    """Recipe entry of data sets of reasoning-gym."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    names: list[str] = ["*"]
    """Data sets; ``*`` and ``?`` stand for any letters."""
    exclude: list[str] = []
    guessable: bool = True
    """False leaves the data sets of ``GUESSABLE`` out: lucky guesses among wrong answers mislead the policy."""
    seed: int = 0

    def make(self) -> list[Environment]:
        exclude = [*self.exclude, *(() if self.guessable else GUESSABLE)]
        return reasoning_gym_environments(self.names, exclude=exclude, seed=self.seed)


def reasoning_gym_environments(
    names: Sequence[str] = ("*",), *, exclude: Sequence[str] = (), seed: int = 0
) -> list[Environment]:
    """The data sets that ``names`` name and ``exclude`` does not; they share one worker process.

    Raises:
        DataError: reasoning-gym is not installed, or has no such data set.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(
            "environments of kind 'reasoning_gym' need the package reasoning-gym, which is not installed; "
            "install the extra: pip install 'openzaya[environments]'"
        )
    worker = Worker("openzaya.environments.reasoning_gym:Service", {"seed": seed})
    try:
        known = worker.call("names", timeout_s=1.0)
        chosen = choose_names(names, known, exclude=exclude, what="data set of reasoning-gym")
        return [GeneratedEnvironment(PREFIX, name, worker) for name in chosen]
    except WorkerFailure as failure:
        raise DataError(f"reasoning-gym does not run: {failure}; install it again") from None
    finally:
        worker.close()


class Service(GeneratedService):
    """Runs in the worker process."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        import reasoning_gym.factory

        self._names = [name for name in reasoning_gym.factory.DATASETS if name not in WITHOUT_TASKS]
        self._sets: dict[tuple[str, int, int], Any] = {}

    def names(self) -> list[str]:
        return self._names

    def _entry(self, name: str, level: int, number: int) -> tuple[Any, dict[str, Any]]:
        """A data set of a level (-1: its default configuration) and the entry that is task ``number``."""
        failure: Exception | None = None
        # Some data sets take time or memory by their size, a few refuse to be large: tasks come from many small ones.
        for size in _SIZES:
            block, place = divmod(number, size)
            try:
                if (name, level, block) not in self._sets:
                    options = {"seed": self.seed_of(name, level, block), "size": size}
                    self._sets[name, level, block] = self._data_set(name, level, options)
                data_set = self._sets[name, level, block]
                while len(self._sets) > _NUM_SETS:
                    self._sets.pop(next(iter(self._sets)))
                return data_set, data_set[place]
            except (AssertionError, ValueError, IndexError) as error:
                failure = error
                self._sets.pop((name, level, block), None)
        raise failure or ValueError(name)

    @staticmethod
    def _data_set(name: str, level: int, options: dict[str, Any]) -> Any:
        from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
        from reasoning_gym.factory import DATASETS, create_curriculum

        data_set, configuration = DATASETS[name]
        if level < 0:
            made = configuration(**options)
        else:
            curriculum = create_curriculum(name)
            curriculum.set_global_level(level)
            context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
            made = curriculum.generate_configuration(options, context)
        if hasattr(made, "validate"):
            made.validate()
        return data_set(made)

    def _make(self, name: str, difficulty: int, number: int) -> tuple[str, Any]:
        from reasoning_gym.factory import CURRICULA

        highest = -1
        if name in CURRICULA:
            attributes = CURRICULA[name]().attributes.values()
            highest = min(difficulty, max(len(attribute.levels) for attribute in attributes) - 1)
        # Some curricula have levels that their own data sets refuse or cannot fill: then the next lower one is set.
        for level in range(highest, -2, -1):
            try:
                data_set, entry = self._entry(name, level, number)
            except (AssertionError, ValueError, IndexError):
                if level < 0:
                    raise
                continue
            return entry["question"], (data_set, entry)
        raise AssertionError(name)

    def _score(self, name: str, made: Any, answer: str) -> float:
        data_set, entry = made
        gold = entry["answer"]
        if isinstance(gold, str) and _offers_several(answer, gold, name in _COMMAS_MATTER):
            return 0.0
        if name in _COMPARED_HERE:
            return float(answer.casefold().split() == gold.casefold().split())
        try:
            return data_set.score_answer(answer, entry)
        except Exception:
            # A scorer that cannot read this answer, and can read the right one, has judged it.
            if isinstance(gold, str) and data_set.score_answer(gold, entry) == 1.0:
                return 0.0
            raise

    def gold(self, name: str, difficulty: int, number: int) -> str | None:
        """The library's own answer; None where it has none."""
        return self._find(name, difficulty, number)[1][1]["answer"]


def _offers_several(answer: str, gold: str, commas_matter: bool) -> bool:
    """Whether an answer holds more than the right one: some scorers pick the best, or stop reading early."""
    gold = gold.strip()
    if ("\n" in answer and "\n" not in gold) or (commas_matter and answer.count(",") > gold.count(",")):
        return True
    if names_alternatives(answer, gold):
        return True
    words, wanted = (" ".join(word.strip(".,;:!?") for word in text.split()) for text in (answer, gold))
    return wanted != words and f" {wanted} " in f" {words} "
