"""The data section of a reward model's recipe: training pairs, and held-out ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.data.mixture import Mixture, Source
from openzaya.data.preference_problems import DEFAULT_SHARES, Fault, ProblemPairSource
from openzaya.data.preferences import HELD_OUT_SHARE, PairExample, PairFileSource
from openzaya.errors import DataError
from openzaya.problems import TRAINED_FAMILIES, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DRAWS_A_HELD_OUT_PAIR = 4
"""Small files are gone through more than once until enough different pairs are found."""


class _PairSourceConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    """Of the source in reports; by default its kind."""
    weight: float = Field(1.0, ge=0)
    """Share of the tokens, relative to the other sources."""
    seed: int = 0


class PairFilesConfig(_PairSourceConfig):
    """Pairs from JSONL or parquet files, see ``PairFileSource``."""

    kind: Literal["pairs"]
    paths: list[str]
    held_out_share: float = Field(HELD_OUT_SHARE, gt=0, lt=1)
    """Of the prompts, kept from training."""


class ProblemPairsConfig(_PairSourceConfig):
    """Generated problems with a good and a bad solution."""

    kind: Literal["problem_pairs"]
    families: list[str] = list(TRAINED_FAMILIES)
    difficulties: tuple[int, int] = (0, 7)
    """Lowest and highest, both included."""
    shares: dict[Fault, float] = dict(DEFAULT_SHARES)
    """What is wrong with the bad solutions, and how often."""


PairSourceConfig = Annotated[PairFilesConfig | ProblemPairsConfig, Field(discriminator="kind")]


class PreferenceConfig(BaseModel):
    """A mixture of sources of pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: list[PairSourceConfig] = Field(min_length=1)
    seed: int = 0
    with_reasoning: bool = True
    """Whether the model sees the reasoning before an answer, in training and ever after."""
    held_out_pairs: int = Field(256, ge=2)
    """Kept from training: they measure accuracy, and the scores' mean and deviation."""


def build_pair_mixture(
    config: PreferenceConfig, tokenizer: PreTrainedTokenizerFast, context_length: int, split: Split = "train"
) -> Mixture:
    """The mixture of one split that ``config`` describes."""
    sources = [_build_source(source, config, tokenizer, context_length, split) for source in config.sources]
    return Mixture(sources, [source.weight for source in config.sources], config.seed)


def held_out_pairs(
    config: PreferenceConfig, tokenizer: PreTrainedTokenizerFast, context_length: int
) -> list[PairExample]:
    """Up to ``config.held_out_pairs`` different held-out pairs; ``DataError`` for fewer than 2."""
    mixture = build_pair_mixture(config, tokenizer, context_length, "heldout")
    found: dict[tuple[int, ...], PairExample] = {}
    for _ in range(config.held_out_pairs * DRAWS_A_HELD_OUT_PAIR):
        pair = mixture.next_example()
        assert isinstance(pair, PairExample)
        found[tuple(pair.tokens)] = pair
        if len(found) == config.held_out_pairs:
            break
    if len(found) < 2:
        raise DataError(f"only {len(found)} pair is held out; give more pairs, or raise held_out_share")
    return list(found.values())


def _build_source(
    config: PairSourceConfig,
    data: PreferenceConfig,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    split: Split,
) -> Source:
    name = config.name or config.kind
    if isinstance(config, PairFilesConfig):
        return PairFileSource(
            tokenizer,
            context_length,
            paths=config.paths,
            seed=config.seed,
            split=split,
            held_out_share=config.held_out_share,
            with_reasoning=data.with_reasoning,
            name=name,
        )
    return ProblemPairSource(
        tokenizer,
        context_length,
        families=config.families,
        difficulties=config.difficulties,
        shares=config.shares,
        seed=config.seed,
        split=split,
        with_reasoning=data.with_reasoning,
        name=name,
    )
