"""Tails and aggregation prompts: one form for SFT data, RL and test-time compute.

Markovian RSA (arXiv 2605.05365, section VI) keeps of each rollout only its tail, the last tau TOKENS
of the reasoning, and asks the model for one better solution given several tails. Tails are exact:
counted in the model's tokens, and the text between is the candidate's own, layout included.

``aggregation_prompt`` has a full wording a task kind, and a short one for small models, in which the
scaffold costs few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from openzaya.data.tokenizer import batch_offsets, control_pattern, split_control_strings
from openzaya.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TaskKind = Literal["general", "math", "code", "multiple_choice"]
PromptStyle = Literal["full", "short"]

_CLOSING: dict[str, str] = {
    "general": "Then give one improved answer to the task, complete in itself.",
    "math": "Then solve the problem and end with the final answer, in the form the problem asks for.",
    "code": "Then write one complete, correct program, in the language and form the task asks for.",
    "multiple_choice": "Then choose one option and end with its letter.",
}


def tails(tokens: Sequence[int], tau: int) -> list[int]:
    """The last ``tau`` tokens (all of them where there are fewer)."""
    _check_tau(tau)
    return list(tokens[max(0, len(tokens) - tau) :])


def tail_text(text: str, tau: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The end of ``text`` that its last ``tau`` tokens spell, cut out of the text itself.

    Where the first of these tokens begins inside a character (byte-level BPE), the tail begins with
    the next whole character. Control strings count as the ordinary text they are.
    """
    return tail_texts([text], tau, tokenizer)[0]


def tail_texts(texts: Sequence[str], tau: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """``tail_text`` of each text, encoded in one batch."""
    _check_tau(tau)
    return [_tail_from(text, starts, tau) for text, starts in zip(texts, _token_starts(texts, tokenizer), strict=True)]


def head_texts(texts: Sequence[str], num_tokens: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The beginning of each text that its first ``num_tokens`` tokens spell, whole characters only."""
    _check_tau(num_tokens)
    return [
        text if len(starts) <= num_tokens else text[: starts[num_tokens]]
        for text, starts in zip(texts, _token_starts(texts, tokenizer), strict=True)
    ]


def _token_starts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """For each text the character at which each of its tokens begins."""
    pattern = control_pattern(tokenizer)
    pieces = [split_control_strings(text, pattern) for text in texts]
    offsets = iter(batch_offsets(tokenizer, [piece for group in pieces for piece in group]))
    results = []
    for group in pieces:
        starts: list[int] = []
        origin = 0
        for piece in group:
            starts += [origin + start for start, _ in next(offsets)]
            origin += len(piece)
        results.append(starts)
    return results


def _tail_from(text: str, starts: list[int], tau: int) -> str:
    if len(starts) <= tau:
        return text
    if tau == 0:
        return ""
    first = starts[-tau]
    # Tokens of one character share its offset: not at its first token, the character is incomplete.
    return text[first + 1 :] if starts[-tau - 1] == first else text[first:]


def aggregation_prompt(
    question: str, candidate_texts: Sequence[str], task: TaskKind = "general", *, style: PromptStyle = "full"
) -> str:
    """The user message that asks for one better solution, given candidates' tails.

    ``candidate_texts`` are put in unchanged, in the order given. ``style="short"`` is the same for
    every ``task``. Raises ``DataError`` without candidates or for an unknown task or style.
    """
    if not candidate_texts:
        raise DataError("aggregation_prompt got 0 candidates; give at least 1")
    if task not in _CLOSING:
        raise DataError(f"unknown task kind '{task}'; use one of: {', '.join(_CLOSING)}")
    if style == "short":
        tries = "".join(f"#{i}\n{text}\n" for i, text in enumerate(candidate_texts, 1))
        return f"{question}\n{tries}#?"
    if style != "full":
        raise DataError(f"unknown prompt style '{style}'; use full or short")
    num = len(candidate_texts)
    if num == 1:
        opening = (
            "Below is the end of an earlier attempt at this task. It may stop before its conclusion, or be wrong. "
            "Check it, keep what holds, and carry on from there."
        )
    else:
        opening = (
            f"Below are the ends of {num} earlier attempts at this task. Each may stop before its conclusion, or be "
            "wrong, and agreement between them is no proof. Check them against each other, keep what holds, and "
            "repair or replace the rest."
        )
    parts = [f"--- attempt {i} ---\n{text}\n" for i, text in enumerate(candidate_texts, 1)]
    return f"{question}\n\n{opening} {_CLOSING[task]}\n\n{''.join(parts)}--- end of attempts ---"


def _check_tau(tau: int) -> None:
    if tau < 0:
        raise DataError(f"tau={tau} tokens is negative; give 0 or more")
