"""Problems whose answer is to take given forms, with demonstrations some of which do not care.

Item = f(seed, index), as in ``openzaya.data.problem_sources``: a problem of the training split, one or more
forms of its answer (``openzaya.problems.instructions``), and a demonstration. With probability
``ignore_share`` the demonstration leaves out some or all of the forms, so that a model trained on it
sometimes follows instructions and sometimes not, and reinforcement learning has something to select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from openzaya.data.problem_sources import Conversation, GeneratedSource, conversation
from openzaya.errors import DataError
from openzaya.problems import HABIT_SHARE, Split, demonstration
from openzaya.problems.instructions.composed import allowed_forms, comply, draw_forms, prompt_with_forms, right_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class InstructionSource(GeneratedSource):
    """Problems with answer forms and worked solutions.

    ``num_forms`` is a number, or the lowest and the highest, both included, drawn evenly. ``forms`` are names
    of ``ANSWER_FORMS``; empty means all. The other settings are those of ``ProblemSource``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        families: Sequence[str],
        difficulties: tuple[int, int],
        *,
        seed: int,
        num_forms: int | tuple[int, int] = (1, 3),
        forms: Sequence[str] = (),
        ignore_share: float = 0.5,
        split: Split = "train",
        wrong_share: float | Sequence[float] = 0.0,
        habit_share: float = HABIT_SHARE,
        difficulty_weights: Sequence[float] | None = None,
        style: Literal["chat", "text"] = "chat",
        context_length: int | None = None,
        name: str = "instructions",
    ) -> None:
        fewest, most = (num_forms,) * 2 if isinstance(num_forms, int) else num_forms
        if not 1 <= fewest <= most:
            raise DataError(f"{name}: num_forms={num_forms}; give 1 or more, of two numbers the lower first")
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
        self._check_share("ignore_share", ignore_share)
        self._ignore_share = ignore_share
        self._num_forms = range(fewest, most + 1)
        self._allowed = allowed_forms(forms)

    def _conversations(self, indices: range) -> list[Conversation]:
        conversations = []
        for index in indices:
            problem, wrong_share, rng = self._problem(index)
            drawn = draw_forms(rng, right_answer(problem), rng.choice(self._num_forms), self._allowed)
            solution = demonstration(problem, rng, wrong_share, habit_share=self._habit_share)
            solution = comply(solution, drawn, rng, self._ignore_share)
            conversations.append(conversation(prompt_with_forms(problem.prompt, drawn), solution))
        return conversations
