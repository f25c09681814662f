"""What the scripted endpoint writes: a function of the conversation, the seed and its settings, without randomness.

A reasoning is lines of

    mark-1f3a9c02 3 value=7 ...

with a mark that no other rollout has, so a test can find a rollout's tail in later prompts; the answer is the most
frequent value in prompt and reasoning, so answers converge over rounds. Tokens are those of a small byte-level BPE.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS_A_LINE = 28
WORDS = ("carry the digit", "    if total > 9:", "检查每一步", "so far\tthe sum", "retry 🙂 from here", "计算结果")


@dataclass(frozen=True)
class Script:
    """What the endpoint can do, how much it writes, and what goes wrong."""

    model: str = "scripted"
    reasoning: str = "reasoning_content"
    """Where it is: ``reasoning_content``, ``reasoning``, ``inline`` (think tags in the content) or ``none``."""
    opened: bool = False
    """With ``inline``: the prompt holds the opening tag, so only the closing one is written."""
    tokenize: str = "vllm"
    """``vllm``, ``llama`` or ``none``."""
    thinking_field: str = "thinking_token_budget"
    """The request field that closes the reasoning; "" for none."""
    continues: str = "continue_final_message"
    """``continue_final_message``, ``assistant`` (a final assistant message is continued), ``refuse`` or ``none``."""
    completions: bool = True
    honours_seed: bool = True
    n: bool = True
    usage: bool = True
    api_key: str = ""
    reasoning_tokens: int = 120
    """About how long a reasoning is; each is between half and one and a half of it."""
    max_model_len: int = 1_000_000
    latency_s: float = 0.0
    fail: float = 0.0
    """Share of attempts that fail, in one of the ways of ``faults``."""
    faults: str = "500,429,drop,garbage,empty"
    hang: float = 0.0
    """Share of attempts that never answer."""
    fault_seed: int = 0


@lru_cache(maxsize=1)
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 500 tokens; CJK characters are often several tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "\n".join(_line("mark-0123abcd", index, index % 10, "0") for index in range(60))
    trained.train_from_iterator(
        [text, "user assistant system The answer is the value of attempts and tasks\n" * 3], trainer
    )
    return trained


def scripted_tokenizer() -> Any:
    """The same as a transformers tokenizer with a chat template."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(small_tokenizer().to_str()), eos_token="<|im_end|>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def num_tokens(text: str) -> int:
    return len(small_tokenizer().encode(text, add_special_tokens=False).ids)


def cut(text: str, limit: int) -> tuple[str, int]:
    """The first ``limit`` tokens of a text, in whole characters, and how many they are."""
    encoding = small_tokenizer().encode(text, add_special_tokens=False)
    if len(encoding.ids) <= limit:
        return text, len(encoding.ids)
    return text[: encoding.offsets[limit][0]], limit


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _line(mark: str, index: int, value: int, digest: str) -> str:
    return f"{mark} {index} value={value} {WORDS[int(digest[index % len(digest)], 16) % len(WORDS)]}"


def render(messages: list[dict[str, Any]], tools: Any = None) -> str:
    """The conversation as text."""
    turns = [f"<|im_start|>{m['role']}\n{m.get('content') or ''}<|im_end|>\n" for m in messages]
    return (f"<tools>{json.dumps(tools)}</tools>\n" if tools else "") + "".join(turns) + "<|im_start|>assistant\n"


def write(prompt: str, seed: int, script: Script, budget: int | None = None, final: Any = None) -> tuple[str, str]:
    """Reasoning and answer that follow a prompt; a prompt with an open think block is continued inside it."""
    before, _, started = prompt.rpartition("<|im_start|>assistant\n")
    digest = hash_of(prompt, seed)
    mark = f"mark-{digest[:8]}"
    value = _majority(before + started, int(digest[:8], 16) % 10)
    reasoning = ""
    if "</think>" not in started and script.reasoning != "none":
        length = script.reasoning_tokens // 2 + int(digest[8:16], 16) % max(1, script.reasoning_tokens)
        lines = (_line(mark, index, value, digest) for index in range(length // TOKENS_A_LINE + 1))
        reasoning = "\n".join(lines)
        if budget is not None:
            reasoning, _ = cut(reasoning, max(0, budget - num_tokens(started)))
    if counted := re.search(r"(\d+),\s*$", started):
        # Begun for it, a row of numbers is continued.
        row = "".join(f" {int(counted[1]) + step}," for step in (1, 2, 3))
        return ("", row) if "</think>" in started or script.reasoning == "none" else (row, "")
    answer = f'{{"answer": {value}}}' if final else f"The answer is \\boxed{{{value}}}, by {mark}."
    return reasoning, answer


def _majority(text: str, otherwise: int) -> int:
    counts = Counter(int(found) for found in re.findall(r"value=(\d)", text))
    return counts.most_common(1)[0][0] if counts else otherwise


def piece_of(token: int) -> Any:
    """llama.cpp's form: text, or the bytes where they are no whole characters."""
    text = small_tokenizer().id_to_token(token)
    if text in SPECIAL:
        return text
    alphabet = {character: byte for byte, character in _byte_characters().items()}
    raw = bytes(alphabet[character] for character in text)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


@lru_cache(maxsize=1)
def _byte_characters() -> dict[int, str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
