"""What ``openzaya rsa`` was told, and what follows from it alone: settings, problems, prices, the model to ask."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openzaya.config import parse_assignment
from openzaya.errors import ConfigError
from openzaya.ttc.completer import Completer
from openzaya.ttc.config import PRESETS, RSAConfig, from_proxy_names, make_config
from openzaya.ttc.cost import Price
from openzaya.ttc.dataset import QuestionRecord, question_of, read_questions

ENGINE_CONCURRENCY = 64
ENDPOINT_CONCURRENCY = 16
MAX_QUESTION_BYTES = 64 << 20


@dataclass(frozen=True)
class RSAOptions:
    """What ``openzaya rsa`` was told; commands/rsa.py describes each option."""

    problem: str | None
    data: Path | None
    model: str | None
    endpoint: str | None
    preset: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings with an option of their own, those that were given."""
    assignments: tuple[str, ...] = ()
    """The others, as ``name=value``."""
    system: str = ""
    journal: Path | None = None
    keep_journal: bool = True
    resume: bool = False
    as_json: bool = False
    concurrency: int | None = None
    max_tokens_total: int | None = None
    price_in: float | None = None
    price_out: float | None = None
    yes: bool = False
    html: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    quantize: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def most_calls(self) -> int:
        """Rollouts at a time, over all problems."""
        return self.concurrency or (ENDPOINT_CONCURRENCY if self.endpoint is not None else ENGINE_CONCURRENCY)


def settings_of(options: RSAOptions) -> tuple[RSAConfig, frozenset[str]]:
    """The preset with all changes, and the names of the settings that were chosen by hand."""
    if options.preset not in PRESETS:
        make_config(options.preset)
    base = PRESETS[options.preset]
    changes: dict[str, Any] = dict(options.settings)
    for text in options.assignments:
        name, value = parse_assignment(text)
        changes[name] = None if value == "none" else value
    nested: dict[str, dict[str, Any]] = {"sampling": {}, "final_sampling": {}}
    for name in [name for name in changes if "." in name]:
        group, _, entry = name.partition(".")
        if group not in nested:
            raise ConfigError(f"'{name}' is no RSA setting; only {' and '.join(nested)} have settings inside")
        nested[group][entry] = changes.pop(name)
    sampling = base.sampling.model_dump() | nested["sampling"]
    if nested["sampling"]:
        changes["sampling"] = sampling
    if nested["final_sampling"]:
        given = sampling if base.final_sampling is None else base.final_sampling.model_dump()
        changes["final_sampling"] = given | nested["final_sampling"]
    return make_config(base, changes), frozenset(from_proxy_names(changes))


async def open_completer(options: RSAOptions, stack: AsyncExitStack) -> Completer:
    """The model that was asked for; ``stack`` closes it."""
    if options.endpoint is not None:
        from openzaya.ttc.endpoint import EndpointCompleter

        completer = EndpointCompleter(
            options.endpoint,
            options.model,
            api_key=options.api_key,
            tokenizer=options.tokenizer,
            concurrency=options.most_calls,
        )
        stack.push_async_callback(completer.close)
        return completer
    from openzaya.data.tokenizer import load_tokenizer
    from openzaya.infer.engine import Engine
    from openzaya.model.hub import resolve
    from openzaya.ttc.engine_completer import EngineCompleter

    assert options.model is not None
    directory = resolve(options.model)
    engine = Engine(
        directory,
        load_tokenizer(options.tokenizer or directory),
        quantize=options.quantize,
        dtype=options.dtype,
        device=options.device,
        max_running=options.most_calls,
    )
    stack.enter_context(engine)
    scheme = f" ({options.quantize})" if options.quantize else ""
    return EngineCompleter(engine, model=f"{directory.resolve().name}{scheme}")


def questions_of(options: RSAOptions) -> list[QuestionRecord]:
    if options.data is not None:
        return read_questions(options.data, system=options.system)
    text = options.problem or ""
    if options.problem == "-":
        text = _standard_input()
    return [question_of(text, system=options.system)]


def _standard_input() -> str:
    try:
        text = sys.stdin.read(MAX_QUESTION_BYTES + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the input is not {error.encoding} text (byte {error.start}); give text") from None
    if len(text) > MAX_QUESTION_BYTES:
        raise ConfigError(f"the input has more than {MAX_QUESTION_BYTES >> 20} M characters; give a shorter problem")
    return text


def price_of(options: RSAOptions) -> Price | None:
    if options.price_in is None and options.price_out is None:
        return None
    return Price(options.price_in or 0.0, options.price_out or 0.0)
