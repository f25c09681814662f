"""Generated preference pairs: problems whose right, tidy solution is preferred to a bad one.

    wrong      a careless solution with a wrong answer
    rambling   the right solution with idle talk between its lines and around its answer
    repeated   the right solution with a line or a passage in a loop; half of them never reach an answer
    untidy     the right solution with its layout, case and punctuation spoilt

Pair = f(seed, index). Problems are those of a split, so held-out pairs share none with training (arXiv 2605.05365
trains a reward model on preference pairs; which pairs it does not say, these are ours for small models).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from openzaya.data.preferences import Conversation, PairExample, make_pair, render_pairs
from openzaya.errors import DataError
from openzaya.problems import Problem, Split, demonstration, get_family, make_problem
from openzaya.problems.verify import normalise_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Fault = Literal["wrong", "rambling", "repeated", "untidy"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
DEFAULT_SHARES: Mapping[Fault, float] = {"wrong": 0.4, "rambling": 0.2, "repeated": 0.2, "untidy": 0.2}

ITEMS_PER_BLOCK = 64
WRONG_TRIES = 6
_IDLE = ("hmm", "wait", "ok so", "let me see", "not sure", "well well", "anyway", "as i said", "what else", "right ?")
_HEDGES = ("i think it is {}", "{} or so", "maybe {} but i am not sure", "well {} i guess", "so {} then ok")

Draft = tuple[str, str]
"""Reasoning and answer."""


def good_and_bad(problem: Problem, fault: Fault, rng: random.Random) -> tuple[Draft, Draft]:
    """The family's own solution, and one with ``fault``; they always differ."""
    solution = get_family(problem.family).solve(problem)
    good = (solution.trace, solution.answer)
    writers = {"wrong": _wrong, "rambling": _rambling, "repeated": _repeated, "untidy": _untidy}
    bad = writers[fault](problem, good, rng)
    return good, bad if bad != good else (good[0], f"{good[1]} {good[1]}")


def _wrong(problem: Problem, good: Draft, rng: random.Random) -> Draft:
    for _ in range(WRONG_TRIES):
        careless = demonstration(problem, rng, 1.0)
        if not careless.correct:
            return careless.trace, careless.answer
    # Some problems forgive every error: then the answer alone is another one's.
    for _ in range(WRONG_TRIES):
        other = make_problem(problem.family, problem.difficulty, rng.getrandbits(32), 0, "train")
        answer = get_family(problem.family).solve(other).answer
        if normalise_answer(answer) != normalise_answer(good[1]):
            return good[0], answer
    return good[0], good[1] + " 1"


def _rambling(problem: Problem, good: Draft, rng: random.Random) -> Draft:
    lines = []
    for line in good[0].split("\n"):
        lines.append(line)
        if rng.random() < 0.5:
            lines.append(" ".join(rng.choices(_IDLE, k=rng.randint(1, 3))))
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(_IDLE))
    return "\n".join(lines), rng.choice(_HEDGES).format(good[1]) if rng.random() < 0.7 else good[1]


def _repeated(problem: Problem, good: Draft, rng: random.Random) -> Draft:
    lines = good[0].split("\n")
    start = rng.randrange(len(lines))
    passage = lines[start : start + rng.randint(1, 3)]
    looped = [*lines[:start], *(passage * rng.randint(3, 8))]
    if rng.random() < 0.5:
        return "\n".join(looped), ""
    return "\n".join([*looped, *lines[start + len(passage) :]]), good[1]


def _untidy(problem: Problem, good: Draft, rng: random.Random) -> Draft:
    trace, answer = good
    spoil_trace = [
        lambda text: text.replace("\n", " "),
        lambda text: text.replace("\n", "\n\n\n"),
        lambda text: "".join(c.upper() if rng.random() < 0.4 else c for c in text),
        lambda text: text.replace(" ", "  "),
        lambda text: text.replace("\n", " ;;\n"),
    ]
    spoil_answer = [
        lambda text: f"{text} {text}",
        lambda text: f"** {text} **",
        lambda text: f"{text} !!!",
        lambda text: f"\n\n- {text}\n-",
        lambda text: f"answer answer : {text} .",
    ]
    for spoil in rng.sample(spoil_trace, rng.randint(0, 2)):
        trace = spoil(trace)
    if trace == good[0] or rng.random() < 0.5:
        answer = rng.choice(spoil_answer)(answer)
    return trace, answer


def as_conversation(prompt: str, draft: Draft) -> Conversation:
    """A problem and a draft of its solution."""
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "reasoning_content": draft[0], "content": draft[1]},
    ]


class ProblemPairSource:
    """Generated pairs by index; ``shares`` are the faults' shares of the pairs, relative to each other.

    Pairs with a conversation longer than ``context_length`` tokens are passed over and counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
        *,
        families: Sequence[str],
        difficulties: tuple[int, int],
        shares: Mapping[Fault, float] = DEFAULT_SHARES,
        seed: int = 0,
        split: Split = "train",
        with_reasoning: bool = True,
        name: str = "problem_pairs",
    ) -> None:
        low, high = difficulties
        if not 0 <= low <= high or not families:
            raise DataError(
                f"{name}: difficulties={difficulties}, {len(families)} families; give 0 <= lowest <= highest, and at "
                "least one family"
            )
        unknown = set(shares) - set(FAULTS)
        if unknown or min(shares.values(), default=0) < 0 or sum(shares.values()) <= 0:
            raise DataError(f"{name}: shares={dict(shares)}; give numbers of 0 or more to {', '.join(FAULTS)}")
        for family in families:
            get_family(family)
        self.name = name
        self._tokenizer, self._context_length, self._with_reasoning = tokenizer, context_length, with_reasoning
        self._families, self._difficulties = list(families), range(low, high + 1)
        self._faults = [fault for fault in FAULTS if shares.get(fault, 0) > 0]
        self._weights = [shares[fault] for fault in self._faults]
        self._seed, self._split = seed, split
        self._index = self._too_long = 0
        self._block: tuple[int, list[PairExample]] | None = None

    def pair(self, index: int) -> tuple[Fault, Conversation, Conversation]:
        """Fault, chosen and rejected conversation of pair ``index``."""
        digest = hashlib.blake2b(f"pairs/{self._seed}/{self._split}/{index}".encode(), digest_size=8).digest()
        rng = random.Random(int.from_bytes(digest, "big"))
        family = self._families[rng.randrange(len(self._families))]
        difficulty = self._difficulties[rng.randrange(len(self._difficulties))]
        problem = make_problem(family, difficulty, self._seed, index, self._split)
        fault = rng.choices(self._faults, self._weights)[0]
        good, bad = good_and_bad(problem, fault, rng)
        return fault, as_conversation(problem.prompt, good), as_conversation(problem.prompt, bad)

    def next_example(self) -> PairExample | None:
        """The next pair; None (and counted) where it exceeds the context length."""
        block, place = divmod(self._index, ITEMS_PER_BLOCK)
        if self._block is None or self._block[0] != block:
            start = block * ITEMS_PER_BLOCK
            pairs = [self.pair(index) for index in range(start, start + ITEMS_PER_BLOCK)]
            rendered = render_pairs([pair[1:] for pair in pairs], self._tokenizer, with_reasoning=self._with_reasoning)
            examples = [
                make_pair(a.tokens, b.tokens, fault) for (fault, *_), (a, b) in zip(pairs, rendered, strict=True)
            ]
            self._block = (block, examples)
        example = self._block[1][place]
        self._index += 1
        if max(map(len, example.conversations)) > self._context_length:
            self._too_long += 1
            return None
        return example

    def state_dict(self) -> dict[str, Any]:
        return {"index": self._index, "too_long": self._too_long}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._index, self._too_long = state["index"], state["too_long"]

    def report(self) -> dict[str, Any]:
        return {"items": self._index, "too_long": self._too_long}
