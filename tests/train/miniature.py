"""A phase small enough to train many times in a test: model, tokenizer, text and recipe, all deterministic."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from openzaya.config import Resolved, load_recipe
from openzaya.data.tokenizer import save_tokenizer, train_tokenizer
from openzaya.model import hf
from openzaya.model.config import ZayaConfig, preset
from openzaya.model.transformer import Zaya
from openzaya.problems import get_family, make_problem
from openzaya.train.recipe import TrainConfig
from tests.model.reference import perturb

VOCAB_SIZE = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "router_hidden_size": 16,
    "max_position_embeddings": 512,
}
"""Changes to the smoke preset."""

EXCLUDED_FROM_METRICS = ("time_unix_s", "time/step_s", "time/tokens_per_s")
"""Clock readings: all that two equal runs may differ in."""


def config(**changes: Any) -> ZayaConfig:
    return preset("smoke").with_changes(**(SHAPE | changes))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Nearly one token a byte; trained in a fraction of a second."""
    texts = []
    for index in range(60):
        problem = make_problem("sorting", index % 4, 0, index, "train")
        solution = get_family("sorting").solve(problem)
        texts.append(f"{problem.prompt}\n{solution.trace}\n{solution.answer}")
    return train_tokenizer(texts, VOCAB_SIZE)


def write_tokenizer(stages: Path) -> None:
    """The tokenizer as the finished stage ``01-tokenizer`` would leave it."""
    directory = stages / "01-tokenizer" / "tokenizer"
    directory.mkdir(parents=True)
    save_tokenizer(tokenizer(), directory)


def write_babbling_model(directory: Path) -> Path:
    """A checkpoint whose random weights give varied text, with its tokenizer."""
    model = Zaya(config(max_position_embeddings=1024), seed=0)
    perturb(model, torch.Generator().manual_seed(0))
    hf.save(model, directory, layout="native", tokenizer=tokenizer())
    return directory


def write_texts(directory: Path, num_files: int = 6) -> None:
    """Plain text of several lengths, some longer than a window."""
    directory.mkdir(parents=True)
    generator = random.Random(3)
    for index in range(num_files):
        words = ["".join(generator.choices("abcdeorst", k=generator.randint(1, 7))) for _ in range(20 + 15 * index)]
        (directory / f"{index}.txt").write_text(" ".join(words))


def recipe_text(texts: Path, *, steps: int = 12, accumulation: int = 2, extra: str = "") -> str:
    """A training recipe of two sources: text, all supervised, and chats about problems, partly supervised."""
    shape = ", ".join(f"{key} = {json.dumps(value)}" for key, value in SHAPE.items())
    return f"""
kind = "train"
phase = "pretrain"
tokenizer = "01-tokenizer"
context_length = 128
windows_per_batch = 2
accumulation = {accumulation}
steps = {steps}
checkpoint_every = 1000
{extra}

[model]
preset = "smoke"
changes = {{ {shape} }}

[optimizer]
warmup_steps = 4
decay_steps = 5

[data]
shard_examples = 10
[[data.sources]]
kind = "text"
paths = [{json.dumps(str(texts))}]
[[data.sources]]
kind = "problems"
families = ["sorting", "counting"]
difficulties = [0, 1]
wrong_share = 0.3
"""


def write_phase(stages: Path, name: str = "02-pretrain", **settings: Any) -> Path:
    """Tokenizer, texts and recipe below ``stages``; returns the recipe's path."""
    if not (stages / "01-tokenizer").exists():
        write_tokenizer(stages)
        write_texts(stages / "texts")
    path = stages / f"{name}.toml"
    path.write_text(recipe_text(stages / "texts", **settings))
    return path


def resolve(recipe: Path, *overrides: str) -> Resolved[TrainConfig]:
    return load_recipe(recipe, TrainConfig, overrides)


def metrics_without_clock(stage: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in EXCLUDED_FROM_METRICS} for record in records]


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """Where two nested states differ in a bit; empty where nowhere. Clock readings are left out."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = (left.keys() | right.keys()) - {"seconds", *EXCLUDED_FROM_METRICS}
        if missing := [f"{place}.{key} on one side only" for key in keys if (key in left) != (key in right)]:
            return missing
        return [found for key in keys for found in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{place}: lengths {len(left)} and {len(right)}"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{place}.{index}")]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    else:
        same = type(left) is type(right) and left == right
    return [] if same else [place]
