"""Reward models: a ZAYA model with one vector that turns the last token's hidden state into a score.

    score = w . RMSNorm(x_last)            normalised = (score - mean) / deviation, both of held-out conversations

The conversation is rendered as for training the policy; its last token has seen all of it. A reward model is saved in
our own layout with the vector and the statistics as a tensor group that must not be left out, so it cannot be loaded
as a language model by mistake, nor a language model as this. It is trained by openzaya/rl/reward_training.py
(arXiv 2605.05365, behavioural stage).

Shape suffixes: B windows, T tokens a window, C conversations, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openzaya.data.chat import render_many
from openzaya.data.packing import assign
from openzaya.data.preferences import Conversation, pack_conversations, scored_form
from openzaya.data.tokenizer import load_tokenizer
from openzaya.errors import CheckpointError, DataError
from openzaya.model import hf
from openzaya.problems.verify import split_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from openzaya.model.transformer import Zaya

GROUP = "reward_head"
SMALLEST_DEVIATION = 1e-6
WINDOW_TOKENS = 512
"""Shortest window that conversations are packed into."""
TOKENS_PER_FORWARD = 8192


@dataclass(frozen=True)
class ScoreStatistics:
    """Of the raw scores of held-out conversations, chosen and rejected ones."""

    mean: float = 0.0
    deviation: float = 1.0

    @staticmethod
    def of(scores: Tensor) -> ScoreStatistics:
        """Mean and standard deviation of ``scores``; equal scores count as of deviation 1."""
        deviation = float(scores.double().std(correction=0))
        return ScoreStatistics(float(scores.double().mean()), deviation if deviation > SMALLEST_DEVIATION else 1.0)


class RewardModel:
    """Scores conversations; higher is better.

    Args:
        model: the trunk.
        tokenizer: the trunk's own, with its chat template.
        head_D: the vector, fp32 (D,).
        statistics: that normalise scores.
        with_reasoning: whether reasoning is part of what is scored, as in training.
        on_forward: called after each forward pass; a group of long responses takes many.
    """

    def __init__(
        self,
        model: Zaya,
        tokenizer: PreTrainedTokenizerFast,
        head_D: Tensor,
        *,
        statistics: ScoreStatistics | None = None,
        with_reasoning: bool = True,
        on_forward: Callable[[], None] = lambda: None,
    ) -> None:
        if head_D.shape != (model.config.hidden_size,):
            raise CheckpointError(
                f"the reward head has shape {tuple(head_D.shape)}, the model hidden_size={model.config.hidden_size}; "
                "take head and model from the same checkpoint"
            )
        self.model, self.tokenizer = model, tokenizer
        self.head_D = head_D.detach().float().to(model.device)
        self.statistics = statistics or ScoreStatistics()
        self.with_reasoning, self._on_forward = with_reasoning, on_forward

    @staticmethod
    def load(
        path: str | Path, *, device: str | torch.device = "cpu", on_forward: Callable[[], None] = lambda: None
    ) -> RewardModel:
        """The reward model in a checkpoint directory.

        Raises:
            CheckpointError: it holds no reward head, or is broken.
        """
        tensors = hf.load_group(path, GROUP)
        expected = {"weight", "mean", "deviation", "with_reasoning"}
        if tensors.keys() != expected:
            raise CheckpointError(
                f"{path}: the reward head holds {sorted(tensors)}, expected {sorted(expected)}; train it again, or use "
                "the version that wrote it"
            )
        statistics = ScoreStatistics(float(tensors["mean"]), float(tensors["deviation"]))
        return RewardModel(
            hf.load(path, device=device, known_groups=(GROUP,)),
            load_tokenizer(path),
            tensors["weight"],
            statistics=statistics,
            with_reasoning=bool(tensors["with_reasoning"]),
            on_forward=on_forward,
        )

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint in our own layout; one that is there is replaced."""
        tensors = {
            "weight": self.head_D.cpu(),
            "mean": torch.tensor([self.statistics.mean]),
            "deviation": torch.tensor([self.statistics.deviation]),
            "with_reasoning": torch.tensor([self.with_reasoning]),
        }
        groups = {GROUP: hf.TensorGroup(tensors, required=True)}
        return hf.save(self.model, Path(path), layout="openzaya", tokenizer=self.tokenizer, groups=groups)

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, normalised: bool = True) -> list[float]:
        """The score of each conversation, which ends with an assistant's message.

        Raises:
            DataError: a broken conversation, or one longer than the model's max_position_embeddings.
        """
        if not conversations:
            return []
        forms = [scored_form(messages, with_reasoning=self.with_reasoning) for messages in conversations]
        rendered = [one.tokens for one in render_many(forms, self.tokenizer)]
        longest, limit = max(map(len, rendered)), self.model.config.max_position_embeddings
        if longest > limit:
            raise DataError(
                f"a conversation has {longest} tokens, the reward model takes {limit}; leave it out or shorten it"
            )
        scores_C = score_tokens(self.model, self.head_D, rendered, self._on_forward)
        if normalised:
            scores_C = (scores_C - self.statistics.mean) / self.statistics.deviation
        return scores_C.tolist()

    def score_group(self, messages: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> list[float | None]:
        """Normalised scores of several responses to one conversation, as :meth:`score`.

        A response without an answer, and one that is too long or cannot be rendered, has None.
        """
        scores: list[float | None] = [None] * len(responses)
        places, conversations = [], []
        for place, response in enumerate(responses):
            conversation = with_response(messages, response)
            if conversation is not None:
                places.append(place)
                conversations.append(conversation)
        try:
            found: list[float | None] = list(self.score(conversations))
        except DataError:
            found = [self._score_alone(conversation) for conversation in conversations]
        for place, score in zip(places, found, strict=True):
            scores[place] = score
        return scores

    def _score_alone(self, conversation: Conversation) -> float | None:
        try:
            return self.score([conversation])[0]
        except DataError:
            return None


def with_response(messages: Sequence[Mapping[str, Any]], response: str) -> Conversation | None:
    """The conversation that ``response``, the whole text of a rollout, ends; None where it has no answer."""
    reasoning, answer = split_response(response)
    if not answer:
        return None
    final = {"role": "assistant", "content": answer, "reasoning_content": reasoning or ""}
    return [*(dict(message) for message in messages), final]


@torch.no_grad()
def score_tokens(
    model: Zaya,
    head_D: Tensor,
    conversations: Sequence[Sequence[int]],
    on_forward: Callable[[], None] = lambda: None,
) -> Tensor:
    """Raw scores, fp32 (C,) on the CPU, of conversations in tokens; packed, some windows at a time.

    ``on_forward`` is called after each forward pass.
    """
    lengths = [len(tokens) for tokens in conversations]
    window_length = max(WINDOW_TOKENS, *lengths) if lengths else WINDOW_TOKENS
    rows = max(1, TOKENS_PER_FORWARD // window_length)
    groups = assign(lengths, window_length)
    scores_C = torch.empty(len(lengths))
    for start in range(0, len(groups), rows):
        chosen: list[int] = []
        local_groups: list[list[int]] = []
        for group in groups[start : start + rows]:
            local_groups.append(list(range(len(chosen), len(chosen) + len(group))))
            chosen += group
        batch, last = pack_conversations([conversations[i] for i in chosen], window_length, local_groups)
        hidden_BTD = model.hidden_states(
            batch.tokens.to(model.device),
            document_ids=batch.document_ids.to(model.device),
            positions=batch.positions.to(model.device),
        )
        scores_C[chosen] = (hidden_BTD.flatten(0, 1)[last.to(model.device)].float() @ head_D).cpu()
        on_forward()
    return scores_C
