"""From a request to what the engine takes: prompt tokens, sampling settings, and how the answer is to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from openzaya.data.chat import render
from openzaya.data.tokenizer import encode_plain
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.toolgrammar import tool_grammar
from openzaya.serve.errors import bad_request, from_validation
from openzaya.serve.jobs import Service
from openzaya.serve.schemas import NamedTool, ResponseFormat, Sampling, Tool, ToolChoice
from openzaya.serve.service import fresh_seed
from openzaya.serve.settings import EFFORT_BUDGETS, Effort

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAIL_TOKENS = 16
"""So many tokens at the end of a prompt tell whether it opens or closes a think block."""
SMALLEST_TOP_P = 1e-9


@dataclass(frozen=True)
class Thinking:
    """Whether the model may reason, and for how many tokens at most."""

    enabled: bool
    budget: int | None


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation."""

    tokens: list[int]
    tail: str
    """The prompt's last characters."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """The functions that the answer may call."""


def thinking(service: Service, *, enabled: bool | None, effort: Effort | None, budget: int | None) -> Thinking:
    """An explicit switch or budget wins over the effort, and the request's effort over the server's."""
    effort = effort or service.settings.effort
    if enabled is None:
        enabled = effort != "none" or bool(budget)
    if budget is None:
        # Thinking that was switched on by itself is not cut by an effort of "none".
        budget = None if effort == "none" else EFFORT_BUDGETS[effort]
    return Thinking(enabled, budget if enabled else None)


async def chat_prompt(
    service: Service, messages: list[dict[str, Any]], tools: Sequence[Tool], choice: ToolChoice, thinks: bool
) -> Prompt:
    """Render a conversation up to the point where the model goes on.

    With ``choice`` "none" the model is not shown the tools, and nothing in its answer is taken for a call.
    """
    service.check_length(sum(len(message["content"] or "") for message in messages))
    shown = [] if choice == "none" else [tool.model_dump(exclude_none=True) for tool in tools]

    def rendered() -> Prompt:
        tokens = render(
            messages, service.tokenizer, tools=shown or None, add_generation_prompt=True, enable_thinking=thinks
        ).tokens
        tail = service.tokenizer.decode(tokens[-TAIL_TOKENS:], skip_special_tokens=False)
        return Prompt(tokens, str(tail), shown)

    prompt: Prompt = await service.in_worker(rendered)
    return prompt


async def text_prompts(service: Service, texts: Sequence[str]) -> list[list[int]]:
    """Texts to continue, each beginning with BOS where the tokenizer has one; control strings are plain text."""
    for text in texts:
        service.check_length(len(text))
    bos = service.tokenizer.bos_token_id
    encoded = await service.in_worker(encode_plain, service.tokenizer, list(texts))
    return [([] if bos is None else [bos]) + tokens for tokens in encoded]


def sampling_params(
    service: Service, request: Sampling, num_prompt_tokens: int, wanted: int | None, **more: Any
) -> SamplingParams:
    """The engine's settings for a request; ``more`` are those that only one endpoint has."""
    if wanted == 0:
        raise bad_request("max_tokens is 0; ask for at least 1 token", "max_tokens")
    room = service.room(num_prompt_tokens, wanted)
    stop = request.stop
    vocabulary = service.engine.config.vocab_size
    for token in request.stop_token_ids or ():
        if token >= vocabulary:
            raise bad_request(f"stop_token_ids: {token} is beyond the vocabulary of {vocabulary}", "stop_token_ids")
    values: dict[str, Any] = {
        "max_new_tokens": room,
        "temperature": request.temperature,
        # The smallest share keeps the most likely token, which is what 0 means.
        "top_p": None if request.top_p is None else max(request.top_p, SMALLEST_TOP_P),
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": _biases(request.logit_bias, vocabulary),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "include_stop": request.include_stop_str_in_output,
        "ignore_eos": request.ignore_eos,
        "min_new_tokens": None if request.min_tokens is None else min(request.min_tokens, room),
        "seed": fresh_seed() if request.seed is None else request.seed,
        "return_experts": request.return_experts,
    }
    try:
        return SamplingParams(**{key: value for key, value in (values | more).items() if value is not None})
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from None


def _biases(given: Mapping[str, float] | None, vocabulary: int) -> dict[int, float] | None:
    if given is None:
        return None
    biases = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10) or int(key) >= vocabulary:
            raise bad_request(
                f"logit_bias: '{key[:40]}' is no token id; give ids from 0 to {vocabulary - 1}", "logit_bias"
            )
        biases[int(key)] = value
    return biases


def format_constraint(response_format: ResponseFormat | None) -> dict[str, Any]:
    """The sampling settings that hold the answer to a ``response_format``."""
    if response_format is None or response_format.type == "text":
        return {}
    if response_format.type == "json_object":
        return {"json_schema": True}
    if response_format.json_schema is None:
        raise bad_request("response_format.json_schema is missing; give {'name', 'schema'}", "response_format")
    return schema_constraint(response_format.json_schema.schema_)


def schema_constraint(schema: dict[str, Any] | bool) -> dict[str, Any]:
    if schema is False:
        raise bad_request("the JSON schema is false, which nothing satisfies; leave it out", "response_format")
    # An empty schema allows any value.
    return {"json_schema": schema}


def tool_constraint(
    tools: Sequence[dict[str, Any]], choice: ToolChoice, tokenizer: PreTrainedTokenizerFast, parallel: bool
) -> dict[str, Any]:
    """The grammar that forces a call; none for "auto" and "none". Raises ``DataError`` for tools it cannot hold to."""
    if choice in ("none", "auto"):
        return {}
    if not tools:
        raise bad_request("tool_choice asks for a call and there are no tools; give some", "tool_choice")
    name = choice.function.name if isinstance(choice, NamedTool) else None
    return {"grammar": tool_grammar(tools, name, tokenizer=tokenizer, parallel=parallel)}
