"""Fresh checkpoints: a preset's shape, drawn weights, and a tokenizer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from openzaya.config import describe_validation_error
from openzaya.errors import ConfigError

SMALL_VOCABULARY = 65_536
"""Up to here a tokenizer of ours is trained on the spot; larger vocabularies bring their own."""

SchemaT = TypeVar("SchemaT", bound=BaseModel)


def initialize_checkpoint(
    preset_name: str,
    directory: Path,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    tokenizer: str | None = None,
    layout: str | None = None,
    dtype: str = "float32",
) -> str:
    """Write a checkpoint with fresh weights to ``directory``; returns a line that says what was written.

    ``overrides`` are ``field=value`` of the model configuration. Without ``tokenizer`` a small byte-pair encoding is
    trained on the Python standard library and generated problems.

    Raises:
        ConfigError: an unknown preset or field, a dtype other than float32 and bfloat16, or a large vocabulary
            without a tokenizer.
    """
    import torch

    from openzaya.config import parse_assignment
    from openzaya.data.tokenizer import load_tokenizer
    from openzaya.model import hf
    from openzaya.model.config import preset
    from openzaya.model.transformer import Zaya
    from openzaya.stages import TokenizerConfig, make_tokenizer

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ConfigError(f"dtype '{dtype}' is not known; choose one of: {', '.join(dtypes)}")
    config = preset(preset_name).with_changes(**dict(parse_assignment(override) for override in overrides))
    if tokenizer is not None:
        chosen = load_tokenizer(tokenizer)
        if len(chosen) > config.vocab_size:
            raise ConfigError(
                f"the tokenizer of {tokenizer} has {len(chosen)} tokens, the model's vocabulary {config.vocab_size}; "
                f"add vocab_size={len(chosen)}"
            )
        ids = {
            name: value
            for name, value in (("bos_token_id", chosen.bos_token_id), ("eos_token_id", chosen.eos_token_id))
            if value is not None
        }
        config = config.with_changes(**ids)
    elif config.vocab_size <= SMALL_VOCABULARY:
        chosen = make_tokenizer(validated(TokenizerConfig, {"vocab_size": config.vocab_size}))
    else:
        raise ConfigError(
            f"preset '{preset_name}' has a vocabulary of {config.vocab_size:,} tokens, which needs its own tokenizer; "
            f"name one with --tokenizer, or lower it with vocab_size=4096"
        )
    with torch.device("meta"):
        empty = Zaya(config)
    model = empty.to(dtypes[dtype]).to_empty(device="cpu")
    model.initialize(seed)
    if layout is None:
        layout = "native" if config.is_released_architecture else "openzaya"
    hf.save(model, directory, layout=layout, tokenizer=chosen)  # type: ignore[arg-type]  # checked there
    return f"{directory}: {config.num_parameters():,} parameters, {layout} layout, {dtype}, seed {seed}"


def validated(schema: type[SchemaT], values: dict[str, Any]) -> SchemaT:
    """``values`` as ``schema``; what it refuses becomes one :class:`ConfigError`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, schema, "settings")) from None
