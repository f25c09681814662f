"""Which prompt comes next: sources by weight, environments least-sampled-first, difficulty by curriculum.

    fixed    a level drawn evenly from the source's range, less those that the starting policy solves too often
    online   the environment's one difficulty, which goes up and down with the policy (curriculum.py)

A share of a source's prompts may be aggregation prompts over rollouts that the policy has made before: their tails
(Markovian RSA) or their answers (PaCoRe). Order n is drawn by a generator of its own, seeded by n, so the stream's
state is counts, difficulties and the remembered groups.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from openzaya.data.aggregation import aggregation_prompt, tail_texts
from openzaya.environments.base import Environment, Task
from openzaya.environments.registry import make_environments
from openzaya.errors import DataError
from openzaya.problems.verify import split_response
from openzaya.rl.curriculum import LeastSampledFirst, OnlineDifficulty
from openzaya.rl.recipe import PromptSource
from openzaya.rl.rollout import Environments, Form, Group, Order, order_seed, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Levels = Mapping[str, Sequence[int]]
"""Environment -> levels that are asked, with the fixed curriculum."""


class PromptStream:
    """Makes orders and learns from finished groups; ``state_dict`` is part of a checkpoint.

    Args:
        max_prompt_tokens: where a prompt is longer, or an environment cannot set the task (a generator that fails or
            takes too long), an easier task of the same environment takes its place.
    """

    def __init__(
        self,
        sources: Sequence[PromptSource],
        tokenizer: PreTrainedTokenizerFast,
        *,
        group_size: int,
        max_prompt_tokens: int,
        seed: int,
    ) -> None:
        self.sources = {source.name: _SourceState(source) for source in sources}
        self._weights = [source.weight for source in sources]
        if not sum(self._weights):
            raise DataError("every source has weight 0; give one of them more")
        self._tokenizer, self._group_size, self._max_prompt_tokens = tokenizer, group_size, max_prompt_tokens
        self._seed = seed
        self.num_orders = 0
        self.num_eased = 0
        """Tasks that were replaced by easier ones, because their prompts were too long or could not be made."""

    @property
    def environments(self) -> Environments:
        """Of all sources."""
        return {source: state.environments for source, state in self.sources.items()}

    def next(self) -> Order:
        """The next order."""
        number = self.num_orders
        self.num_orders += 1
        seed = order_seed(self._seed, number)
        rng = random.Random(seed)
        name = rng.choices(list(self.sources), self._weights)[0]
        state = self.sources[name]
        form, task = self._aggregation(state, rng) or ("plain", self._plain(state, rng))
        return Order(number, name, form, task, self._group_size, seed)

    def task(self, source: str, environment: str, difficulty: int, number: int) -> Task | None:
        """A task to measure with, outside the stream; None where its prompt is too long or cannot be made."""
        return self._task(self.sources[source].environments[environment], difficulty, number)[0]

    def _task(self, environment: Environment, difficulty: int, number: int) -> tuple[Task | None, str]:
        """A task that can be asked, or why there is none."""
        try:
            task = environment.task(difficulty, number)
        except DataError as error:
            return None, str(error)
        if self._fits(task):
            return task, ""
        return None, (
            f"{environment.name}: a prompt of difficulty {difficulty} is longer than {self._max_prompt_tokens} tokens, "
            "what window_tokens and rollout.max_new_tokens leave; raise window_tokens or drop the environment"
        )

    def _fits(self, task: Task) -> bool:
        return len(prompt_of(task, self._tokenizer)) <= self._max_prompt_tokens

    def finished(self, group: Group) -> None:
        """Take a finished group into account."""
        if group.order.form != "plain" or not group.verdicts:
            return
        self.sources[group.order.source].finished(group)

    def close(self) -> None:
        """Close all environments."""
        for state in self.sources.values():
            for environment in state.environments.values():
                environment.close()

    def state_dict(self) -> dict[str, Any]:
        sources = {name: state.state_dict() for name, state in self.sources.items()}
        return {"num_orders": self.num_orders, "num_eased": self.num_eased, "sources": sources}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_orders, self.num_eased = state["num_orders"], state["num_eased"]
        for name, values in state["sources"].items():
            self.sources[name].load_state_dict(values)

    def _plain(self, state: _SourceState, rng: random.Random) -> Task:
        environment, wanted = state.draw(rng)
        trouble = ""
        for difficulty in range(wanted, -1, -1):
            task, trouble = self._task(environment, difficulty, state.next_number(environment.name, difficulty))
            if task is not None:
                if difficulty < wanted:
                    self.num_eased += 1
                    # With the online curriculum, groups of another level than the environment's own do not count: it
                    # would never come down again. With the fixed one nothing asks for this.
                    state.online[environment.name].difficulty = difficulty
                return task
        raise DataError(trouble)

    def _aggregation(self, state: _SourceState, rng: random.Random) -> tuple[Form, Task] | None:
        """An aggregation prompt, where one is due and can be made."""
        forms, point = state.config.aggregation, rng.random()
        if point >= forms.tails_share + forms.answers_share or not state.memory:
            return None
        form: Form = "tails" if point < forms.tails_share else "answers"
        # Shown once: a policy that meets the same few tasks again and again learns their answers, not to compare.
        place = rng.randrange(len(state.memory))
        task, responses = state.memory[place]
        del state.memory[place]
        num = min(rng.randint(*forms.num_candidates), len(responses))
        chosen = [split_response(text) for text in rng.sample(responses, num)]
        if form == "tails":
            traces = [reasoning if reasoning is not None else (answer or "") for reasoning, answer in chosen]
            texts = tail_texts(traces, forms.tau, self._tokenizer)
        else:
            texts = [answer or "" for _, answer in chosen]
        question = str(task.messages[-1]["content"])
        while texts:
            prompt = aggregation_prompt(question, texts, style=forms.prompt_style)
            asked = replace(task, messages=[*task.messages[:-1], {"role": "user", "content": prompt}])
            if self._fits(asked):
                return form, asked
            texts = texts[:-1]
        return None


class _SourceState:
    """A source's environments, how often each was asked, how hard it is now, and what was answered."""

    def __init__(self, config: PromptSource) -> None:
        self.config = config
        self.environments = make_environments(config.environments)
        if not self.environments:
            raise DataError(f"source {config.name} has no environment; name at least one")
        self._turns = LeastSampledFirst(self.environments)
        start = config.start if isinstance(config.start, int) else 0
        self.online = {name: OnlineDifficulty(start) for name in self.environments}
        low, high = config.difficulties
        self.levels: dict[str, list[int]] = {name: list(range(low, high + 1)) for name in self.environments}
        self._numbers: Counter[str] = Counter()
        self.memory: deque[tuple[Task, list[str]]] = deque(maxlen=config.aggregation.remembered_groups)

    def draw(self, rng: random.Random) -> tuple[Environment, int]:
        name = self._turns.next(rng)
        if self.config.curriculum == "fixed":
            return self.environments[name], rng.choice(self.levels[name])
        return self.environments[name], self.online[name].difficulty

    def next_number(self, environment: str, difficulty: int) -> int:
        key = f"{environment}/{difficulty}"
        self._numbers[key] += 1
        return self._numbers[key] - 1

    def finished(self, group: Group) -> None:
        task, rate = group.order.task, group.solve_rate
        if self.config.curriculum == "online":
            online = self.online[task.environment]
            online.update(task.difficulty, rate)
            if self.config.max_difficulty is not None:
                online.difficulty = min(online.difficulty, self.config.max_difficulty)
        low, high = self.config.aggregation.solve_rates
        wants = self.config.aggregation.tails_share + self.config.aggregation.answers_share > 0
        if wants and low <= rate <= high:
            self.memory.append((task, [rollout.text for rollout in group.rollouts]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "turns": self._turns.state_dict(),
            "online": {name: online.state_dict() for name, online in self.online.items()},
            "levels": self.levels,
            "numbers": dict(self._numbers),
            "memory": [{"task": task.to_json(), "responses": responses} for task, responses in self.memory],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._turns.load_state_dict(state["turns"])
        for name, values in state["online"].items():
            self.online[name].load_state_dict(values)
        self.levels = {name: list(levels) for name, levels in state["levels"].items()}
        self._numbers = Counter(state["numbers"])
        self.memory.clear()
        self.memory.extend((Task.from_json(entry["task"]), list(entry["responses"])) for entry in state["memory"])
