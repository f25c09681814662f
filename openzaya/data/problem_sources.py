"""Sources made of generated problems: worked solutions, and aggregation examples.

Item = f(seed, index): a family and a difficulty are drawn, then a problem of the training split, then
a demonstration, which is wrong with probability ``wrong_share`` (mixed quality leaves reinforcement
learning something to select). Aggregation examples (arXiv 2605.05365, TTC data) put tails of some
candidate solutions of mixed quality into a prompt, some of them cut off as a token budget does; the
target is a perfect worked solution. Where a prompt's tails say nothing about the problem (empty, or
another problem's), the target is a demonstration like any other: it is what the tails hold that the
model learns to work from, not the form of the prompt.
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
from openzaya.data.tokenizer import batch_offsets
from openzaya.errors import DataError
from openzaya.problems import (
    HABIT_SHARE,
    Problem,
    Solution,
    Split,
    candidate_solutions,
    demonstration,
    get_family,
    make_problem,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ITEMS_PER_BLOCK = 256

Conversation = list[dict[str, Any]]


class GeneratedSource(ABC):
    """Random access by index, generated in blocks; what sources of generated problems share."""

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
        habit_share: float,
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
        self._check_share("habit_share", habit_share)
        self._habit_share = habit_share
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

    def _check_share(self, what: str, value: float) -> None:
        if not 0 <= value <= 1:
            raise DataError(f"{self.name}: {what}={value}; give a share between 0 and 1")

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


class ProblemSource(GeneratedSource):
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
        habit_share: float = HABIT_SHARE,
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
            habit_share=habit_share,
            difficulty_weights=difficulty_weights,
            context_length=context_length,
            all_supervised=style == "text",
        )

    def _conversations(self, indices: range) -> list[Conversation]:
        conversations = []
        for index in indices:
            problem, wrong_share, rng = self._problem(index)
            solution = demonstration(problem, rng, wrong_share, habit_share=self._habit_share)
            conversations.append(conversation(problem.prompt, solution))
        return conversations


class AggregationSource(GeneratedSource):
    """Aggregation examples: a problem, tails of some candidate solutions, and a perfect solution as target.

    A pool of ``pool_size`` solutions a problem is written by annotators of mixed quality
    (``wrong_share``, ``habit_share``), ``num_candidates`` (a number, or the lowest and the highest, both
    included) are drawn from it with replacement, for after a round of aggregation candidates repeat
    each other, and the last ``tau`` tokens of each trace go into the prompt
    (``openzaya.data.aggregation``). ``cut_share`` of the candidates stop at a random token.
    ``useless_share`` of the prompts hold empty tails or, in turn, those of another problem; the target
    is then a demonstration of the same mixed quality.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        families: Sequence[str],
        difficulties: tuple[int, int],
        *,
        seed: int,
        num_candidates: int | tuple[int, int] = 3,
        pool_size: int = 8,
        tau: int = 64,
        cut_share: float = 0.0,
        useless_share: float = 0.0,
        split: Split = "train",
        wrong_share: float | Sequence[float] = 0.5,
        habit_share: float = HABIT_SHARE,
        difficulty_weights: Sequence[float] | None = None,
        task: TaskKind = "general",
        prompt_style: PromptStyle = "short",
        style: Literal["chat", "text"] = "chat",
        context_length: int | None = None,
        name: str = "aggregation",
    ) -> None:
        fewest, most = (num_candidates,) * 2 if isinstance(num_candidates, int) else num_candidates
        if not 1 <= fewest <= most:
            raise DataError(f"{name}: num_candidates={num_candidates}; give 1 or more, of two numbers the lower first")
        if pool_size < 1:
            raise DataError(f"{name}: pool_size={pool_size}; give at least 1")
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
            habit_share=habit_share,
            difficulty_weights=difficulty_weights,
            context_length=context_length,
            all_supervised=style == "text",
        )
        self._check_share("cut_share", cut_share)
        self._check_share("useless_share", useless_share)
        self._num_candidates = range(fewest, most + 1)
        self._pool_size = pool_size
        self._tau = tau
        self._cut_share = cut_share
        self._useless_share = useless_share
        self._task: TaskKind = task
        self._prompt_style: PromptStyle = prompt_style

    def _conversations(self, indices: range) -> list[Conversation]:
        items: list[tuple[Problem, Solution, int]] = []
        traces: list[str] = []
        stops: list[float] = []
        for index in indices:
            problem, wrong_share, rng = self._problem(index)
            num = rng.choice(self._num_candidates)
            target = get_family(problem.family).solve(problem)
            shown: Problem | None = problem
            if rng.random() < self._useless_share:
                shown = None if rng.random() < 0.5 else self._another_problem(rng)
                target = demonstration(problem, rng, wrong_share, habit_share=self._habit_share)
            candidates = [""] * num
            if shown is not None:
                pool = candidate_solutions(shown, rng, self._pool_size, wrong_share, habit_share=self._habit_share)
                candidates = [solution.trace for solution in rng.choices(pool, k=num)]
            items.append((problem, target, num))
            traces += candidates
            stops += [rng.random() if rng.random() < self._cut_share else 1.0 for _ in candidates]
        candidate_tails = iter(tail_texts(self._stopped(traces, stops), self._tau, self._tokenizer))
        conversations = []
        for problem, target, num in items:
            chosen = [next(candidate_tails) for _ in range(num)]
            prompt = aggregation_prompt(problem.prompt, chosen, self._task, style=self._prompt_style)
            conversations.append(conversation(prompt, target))
        return conversations

    def _another_problem(self, rng: random.Random) -> Problem:
        family = self._families[rng.randrange(len(self._families))]
        difficulty = self._difficulties[rng.randrange(len(self._difficulties))]
        return make_problem(family, difficulty, self.seed, rng.getrandbits(48), self._split)

    def _stopped(self, traces: list[str], stops: Sequence[float]) -> list[str]:
        """Each trace up to the token at its share of the way, at least one token; 1.0 leaves it whole."""
        texts = []
        for trace, stop, offsets in zip(traces, stops, batch_offsets(self._tokenizer, traces), strict=True):
            kept = 1 + int(stop * (len(offsets) - 1)) if offsets and stop < 1.0 else len(offsets)
            texts.append(trace if kept == len(offsets) else trace[: offsets[kept][0]])
        return texts


def conversation(prompt: str, solution: Solution) -> Conversation:
    """A question and its worked solution as chat messages."""
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "reasoning_content": solution.trace, "content": solution.answer},
    ]
