"""The data section of a recipe, and the mixture that it describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.data.instruction_source import InstructionSource
from openzaya.data.mixture import Mixture, Source
from openzaya.data.problem_sources import AggregationSource, ProblemSource
from openzaya.data.sources import PYTHON_STDLIB, ConversationSource, TextSource
from openzaya.problems import HABIT_SHARE, TRAINED_FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _SourceConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    """Of the source in reports; by default its kind."""
    weight: float = Field(1.0, ge=0)
    """Share of the tokens, relative to the other sources."""
    seed: int = 0


class TextConfig(_SourceConfig):
    """Plain text: files or folders; by default the Python standard library's source code."""

    kind: Literal["text"]
    paths: list[str] = [PYTHON_STDLIB]
    text_field: str = "text"


class ConversationConfig(_SourceConfig):
    """Chats from JSONL or parquet files, trimmed to the phase's context length."""

    kind: Literal["conversations"]
    paths: list[str]
    messages_field: str = "messages"


class _GeneratedConfig(_SourceConfig):
    families: list[str] = list(TRAINED_FAMILIES)
    difficulties: tuple[int, int] = (0, 7)
    """Lowest and highest, both included."""
    difficulty_weights: list[float] | None = None
    wrong_share: float | list[float] = 0.0
    """Share of careless solutions: one number, or one a difficulty."""
    habit_share: float = Field(HABIT_SHARE, ge=0, le=1)
    """Share of the careless solutions that follow the family's wrong habit; the others slip."""
    style: Literal["chat", "text"] = "chat"
    """``chat`` supervises what the assistant writes, ``text`` everything."""


class ProblemsConfig(_GeneratedConfig):
    """Generated problems with worked solutions."""

    kind: Literal["problems"]


class AggregationConfig(_GeneratedConfig):
    """Aggregation examples: tails of candidate solutions in the prompt, a perfect solution as target.

    Where the tails are useless the target is a demonstration of mixed quality (``wrong_share``).
    """

    kind: Literal["aggregation"]
    wrong_share: float | list[float] = 0.5
    num_candidates: int | tuple[int, int] = 3
    """One number, or the lowest and the highest, both included."""
    pool_size: int = Field(8, ge=1)
    tau: int = Field(64, ge=1)
    """Tokens of each tail."""
    cut_share: float = Field(0.0, ge=0, le=1)
    """Share of the candidates that stop at a random token."""
    useless_share: float = Field(0.0, ge=0, le=1)
    """Share of the prompts with empty tails, or those of another problem."""
    prompt_style: Literal["short", "full"] = "short"


class InstructionsConfig(_GeneratedConfig):
    """Generated problems whose answer is to take given forms; some solutions leave forms out."""

    kind: Literal["instructions"]
    difficulties: tuple[int, int] = (0, 2)
    num_forms: int | tuple[int, int] = (1, 3)
    """One number, or the lowest and the highest, both included."""
    forms: list[str] = []
    """Names of forms; all where it is empty."""
    ignore_share: float = Field(0.5, ge=0, le=1)
    """Share of the solutions that leave out some or all of the forms."""


SourceConfig = Annotated[
    TextConfig | ConversationConfig | ProblemsConfig | AggregationConfig | InstructionsConfig,
    Field(discriminator="kind"),
]


class DataConfig(BaseModel):
    """A mixture of sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: list[SourceConfig] = Field(min_length=1)
    seed: int = 0
    shard_examples: int = Field(1024, ge=1)
    """Examples that are packed together."""


def build_mixture(config: DataConfig, tokenizer: PreTrainedTokenizerFast, context_length: int) -> Mixture:
    """The mixture that ``config`` describes, for windows of ``context_length`` tokens."""
    sources = [_build_source(source, tokenizer, context_length) for source in config.sources]
    return Mixture(sources, [source.weight for source in config.sources], config.seed)


def _build_source(config: SourceConfig, tokenizer: PreTrainedTokenizerFast, context_length: int) -> Source:
    name = config.name or config.kind
    if isinstance(config, TextConfig):
        return TextSource(
            tokenizer, context_length, paths=config.paths, seed=config.seed, text_field=config.text_field, name=name
        )
    if isinstance(config, ConversationConfig):
        return ConversationSource(
            tokenizer,
            context_length,
            paths=config.paths,
            seed=config.seed,
            messages_field=config.messages_field,
            name=name,
        )
    # The settings of generated sources are called as the sources' own arguments are.
    settings = config.model_dump(exclude={"kind", "name", "weight", "families", "difficulties"})
    source = {"problems": ProblemSource, "aggregation": AggregationSource, "instructions": InstructionSource}[
        config.kind
    ]
    return source(tokenizer, config.families, config.difficulties, context_length=context_length, name=name, **settings)
