"""Sources made of generated problems: worked solutions, and aggregation examples.

Item = f(seed, index): a family and a difficulty are drawn, then a problem of the training split, then
a demonstration, which is wrong with probability ``wrong_share`` (mixed quality leaves reinforcement
learning something to select). Aggregation examples (arXiv 2605.05365, TTC data) put tails of some
candidate solutions of mixed quality into a prompt; the target is always a perfect worked solution.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from openzaya.data.aggregation import PromptStyle, TaskKind, aggregation_prompt, tail_texts
from openzaya.data.chat import render_many
from openzaya.data.mixture import Example
from openzaya.errors import DataError
from openzaya.problems import Problem, Solution, Split, candidate_solutions, demonstration, get_family, make_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ITEMS_PER_BLOCK = 256

Conversation = list[dict[str, Any]]


class _GeneratedSource(ABC):
    """Random access by index, generated in blocks; shared by the two sources below."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        families: Sequence[str],
        difficulties: tuple[int, int],
        *,
        seed: int,
        name: str,
        split: Split,
        wrong_share: float | Sequence[float],
        difficulty_weights: Sequence[float] | None,
        context_length: int | None,
        all_supervised: bool,
    ) -> None:
        low, high = difficulties
        if not 0 <= low <= high:
            raise DataError(f"{name}: difficulties={difficulties}; give (lowest, highest) with 0 <= lowest <= highest")
        if not families:
            raise DataError(f"{name}: families is empty; give at least one")
        for family in families:
            get_family(family)
        self.name = name
        self.seed = seed
        self._tokenizer = tokenizer
        self._families = list(families)
        self._difficulties = range(low, high + 1)
        self._split = split
        self._wrong_shares = self._per_difficulty("wrong_share", wrong_share)
        if any(not 0 <= share <= 1 for share in self._wrong_shares):
            raise DataError(f"{name}: wrong_share={wrong_share}; give shares between 0 and 1")
        weights = [1.0] * len(self._difficulties) if difficulty_weights is None else difficulty_weights
        self._difficulty_weights = self._per_difficulty("difficulty_weights", weights)
        if min(self._difficulty_weights) < 0 or sum(self._difficulty_weights) <= 0:
            raise DataError(f"{name}: difficulty_weights={weights} must be 0 or more, and not all 0")
        self._context_length = context_length
        self._all_supervised = all_supervised
        self._index = 0
        self._too_long = 0
        self._block: tuple[int, list[Example]] | None = None

    def _per_difficulty(self, what: str, value: float | Sequence[float]) -> list[float]:
        if isinstance(value, (int, float)):
            return [float(value)] * len(self._difficulties)
        if len(value) != len(self._difficulties):
            raise DataError(
                f"{self.name}: {what} has {len(value)} entries for {len(self._difficulties)} difficulties "
                f"({self._difficulties[0]} to {self._difficulties[-1]}); give one each, or one number"
            )
        return [float(item) for item in value]

    @abstractmethod
    def _conversations(self, indices: range) -> list[Conversation]: ...

    def _problem(self, index: int) -> tuple[Problem, float, random.Random]:
        """The problem of an item, its share of wrong solutions, and the generator for the rest of it."""
        digest = hashlib.blake2b(f"{type(self).__name__}/{self.seed}/{index}".encode(), digest_size=8).digest()
        rng = random.Random(int.from_bytes(digest, "big"))
        family = self._families[rng.randrange(len(self._families))]
        place = rng.choices(range(len(self._difficulties)), self._difficulty_weights)[0]
        problem = make_problem(family, self._difficulties[place], self.seed, index, self._split)
        return problem, self._wrong_shares[place], rng

    def example(self, index: int) -> Example | None:
        """Item ``index``; None where it exceeds the context length."""
        block, place = divmod(index, ITEMS_PER_BLOCK)
        if self._block is None or self._block[0] != block:
            indices = range(block * ITEMS_PER_BLOCK, (block + 1) * ITEMS_PER_BLOCK)
            examples = []
            for rendered in render_many(self._conversations(indices), self._tokenizer):
                mask = [True] * len(rendered.tokens) if self._all_supervised else rendered.loss_mask
                mask[0] = False
                examples.append(Example(rendered.tokens, mask))
            self._block = (block, examples)
        example = self._block[1][place]
        if self._context_length is not None and len(example.tokens) > self._context_length:
            return None
        return example

    def next_example(self) -> Example | None:
        """The item at the cursor; None (and counted) where it exceeds the context length."""
        example = self.example(self._index)
        self._index += 1
        self._too_long += example is None
        return example

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._index, "too_long": self._too_long}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._index, self._too_long = state["index"], state["too_long"]

    def report(self) -> dict[str, Any]:
        return {"items": self._index, "too_long": self._too_long}


class ProblemSource(_GeneratedSource):
    """Problems with worked solutions.

    ``difficulties`` is (lowest, highest), both included. ``wrong_share`` and ``difficulty_weights`` are
    one number, or one for each difficulty. ``style="chat"`` supervises what the assistant writes,
    ``"text"`` (pretraining) the whole rendering but BOS. Items longer than ``context_length`` (None: no
    limit) are skipped and counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        families: Sequence[str],
        difficulties: tuple[int, int],
        *,
        seed: int,
        split: Split = "train",
        wrong_share: float | Sequence[float] = 0.0,
        difficulty_weights: Sequence[float] | None = None,
        style: Literal["chat", "text"] = "chat",
        context_length: int | None = None,
        name: str = "problems",
    ) -> None:
        if style not in ("chat", "text"):
            raise DataError(f"{name}: unknown style '{style}'; use chat or text")
        super().__init__(
            tokenizer,
            families,
            difficulties,
            seed=seed,
            name=name,
            split=split,
            wrong_share=wrong_share,
            difficulty_weights=difficulty_weights,
            context_length=context_length,
            all_supervised=style == "text",
        )

    def _conversations(self, indices: range) -> list[Conversation]:
        conversations = []
        for index in indices:
            problem, wrong_share, rng = self._problem(index)
            conversations.append(_conversation(problem.prompt, demonstration(problem, rng, wrong_share)))
        return conversations


class AggregationSource(_GeneratedSource):
    """Aggregation examples: a problem, tails of ``num_candidates`` solutions, and a perfect solution as target.

    A pool of ``pool_size`` solutions a problem is written by annotators of mixed quality
    (``wrong_share``), ``num_candidates`` of them are drawn, and the last ``tau`` tokens of each trace go
    into the prompt (``openzaya.data.aggregation``).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        families: Sequence[str],
        difficulties: tuple[int, int],
        *,
        seed: int,
        num_candidates: int = 3,
        pool_size: int = 8,
        tau: int = 64,
        split: Split = "train",
        wrong_share: float | Sequence[float] = 0.5,
        difficulty_weights: Sequence[float] | None = None,
        task: TaskKind = "general",
        prompt_style: PromptStyle = "short",
        style: Literal["chat", "text"] = "chat",
        context_length: int | None = None,
        name: str = "aggregation",
    ) -> None:
        if not 1 <= num_candidates <= pool_size:
            raise DataError(
                f"{name}: num_candidates={num_candidates} must be between 1 and pool_size={pool_size}; change one"
            )
        if tau < 1:
            raise DataError(f"{name}: tau={tau} tokens; give at least 1")
        if style not in ("chat", "text"):
            raise DataError(f"{name}: unknown style '{style}'; use chat or text")
        super().__init__(
            tokenizer,
            families,
            difficulties,
            seed=seed,
            name=name,
            split=split,
            wrong_share=wrong_share,
            difficulty_weights=difficulty_weights,
            context_length=context_length,
            all_supervised=style == "text",
        )
        self._num_candidates = num_candidates
        self._pool_size = pool_size
        self._tau = tau
        self._task: TaskKind = task
        self._prompt_style: PromptStyle = prompt_style

    def _conversations(self, indices: range) -> list[Conversation]:
        problems = []
        traces: list[str] = []
        for index in indices:
            problem, wrong_share, rng = self._problem(index)
            pool = candidate_solutions(problem, rng, self._pool_size, wrong_share)
            problems.append(problem)
            traces += [solution.trace for solution in rng.sample(pool, self._num_candidates)]
        candidates = tail_texts(traces, self._tau, self._tokenizer)
        conversations = []
        for i, problem in enumerate(problems):
            chosen = candidates[i * self._num_candidates : (i + 1) * self._num_candidates]
            prompt = aggregation_prompt(problem.prompt, chosen, self._task, style=self._prompt_style)
            conversations.append(_conversation(prompt, get_family(problem.family).solve(problem)))
        return conversations


def _conversation(prompt: str, solution: Solution) -> Conversation:
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "reasoning_content": solution.trace, "content": solution.answer},
    ]
