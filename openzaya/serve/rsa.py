"""From a chat request to the settings of a run of Markovian RSA (arXiv 2605.05365, section VI), or to none.

What decides, the first that speaks:

    rsa                 false: a plain answer; true, a preset's name, or an object of settings
    model               "name:rsa" or "name:rsa-PRESET"
    reasoning_effort    width and depth, on servers that say so (``effort_rsa``)

Settings come from the request's ``rsa``, then from its ordinary fields (``max_tokens``, ``temperature``, ``seed``),
then from the server's ``rsa_defaults``, then from the preset. Budgets that do not fit the context are scaled down, with
a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openzaya.errors import ConfigError, RSAError
from openzaya.serve.errors import bad_request
from openzaya.serve.schemas import ChatRequest
from openzaya.serve.service import fresh_seed
from openzaya.serve.settings import EFFORT_WIDTHS, ServerSettings
from openzaya.ttc.completer import Completer
from openzaya.ttc.config import PRESETS, RSAConfig, from_proxy_names, make_config
from openzaya.ttc.cost import estimate
from openzaya.ttc.fitting import SHORT_PROMPT_CONTEXT, fit_context
from openzaya.ttc.rounds import Question

_SUFFIX = re.compile(r"(.+):rsa(?:-(.+))?", re.DOTALL)


@dataclass(frozen=True)
class Wish:
    """That a request asks for RSA, and how."""

    config: RSAConfig
    model: str | None
    """As the request names it, without the suffix."""
    wants_events: bool
    """Chunks of a stream tell what happens to each candidate."""
    chosen: frozenset[str]
    """Names of settings that do not come from the preset."""


def wish_of(body: ChatRequest, settings: ServerSettings) -> Wish | None:
    """What a request asks for; None for a plain answer. Raises ``ApiError`` (400) for settings that cannot be used."""
    if body.rsa is False:
        return None
    model, preset = split_name(body.model, settings)
    changes: dict[str, Any] = {}
    if body.rsa is None and preset is None:
        width = EFFORT_WIDTHS[body.reasoning_effort] if settings.effort_rsa and body.reasoning_effort else None
        # By its effort alone nobody asked for RSA: a request that it cannot serve is answered plainly.
        if width is None or _unavailable(body) or (body.n or 1) > 1:
            return None
        changes = dict(width)
    if isinstance(body.rsa, str):
        preset = body.rsa
    elif isinstance(body.rsa, Mapping):
        changes = dict(body.rsa)
        preset = changes.pop("preset", preset)
    wants_events = changes.pop("events", None)
    if wants_events not in (None, True, False):
        raise bad_request("rsa.events: give true or false", "rsa.events")
    if wants_events is None:
        wants_events = bool(body.stream_options and body.stream_options.include_rsa)
    if preset is not None and not isinstance(preset, str):
        raise bad_request(f"rsa.preset: give a name, one of {', '.join(PRESETS)}", "rsa.preset")
    refused = _unavailable(body)
    if refused:
        raise bad_request(f"{refused} is not available with rsa; leave it out", refused)
    try:
        values = _changes(body, settings, changes)
        config = make_config(preset or "default", values)
    except ConfigError as error:
        raise bad_request(str(error), "rsa") from None
    if config.select == "verifier":
        raise bad_request("rsa.select: a server has no verifier; choose majority, aggregate, random or all", "rsa")
    return Wish(_with_choices(config, body.n, changes), model, wants_events, frozenset(values))


def split_name(name: str | None, settings: ServerSettings) -> tuple[str | None, str | None]:
    """A model's name and the preset that follows it: ``name:rsa-light`` is (name, light)."""
    found = None if name is None or name in settings.model_names else _SUFFIX.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2] or "default")


def _changes(body: ChatRequest, settings: ServerSettings, explicit: Mapping[str, Any]) -> dict[str, Any]:
    given = from_proxy_names(explicit)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if wanted == 0:
        raise bad_request("max_tokens is 0; ask for at least 1 token", "max_tokens")
    sampling: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, 1e-9),
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "min_p": body.min_p,
    }
    fields: dict[str, Any] = {
        "final_budget": wanted,
        "seed": fresh_seed() if body.seed is None else body.seed,
        "sampling": {name: value for name, value in sampling.items() if value is not None} or None,
    }
    changes = settings.rsa_defaults | {name: value for name, value in fields.items() if value is not None} | given
    parts = (settings.rsa_defaults.get("sampling"), fields["sampling"], given.get("sampling"))
    if len([part for part in parts if part]) > 1 and all(isinstance(part, Mapping) for part in parts if part):
        changes["sampling"] = {name: value for part in parts if part for name, value in part.items()}
    return changes


def _with_choices(config: RSAConfig, n: int | None, explicit: Mapping[str, Any]) -> RSAConfig:
    """``n`` choices are n rollouts of the final round, all of them returned."""
    if n in (None, 1):
        return config
    if config.select != "all":
        raise bad_request(f"n={n}: RSA selects one answer; leave n out, or set rsa.select to 'all'", "n")
    if config.width(config.t) != n and ("final_n" in explicit or config.widths):
        raise bad_request(f"n={n}, and the final round has {config.width(config.t)} rollouts; give one of them", "n")
    return config.model_copy(update={"final_n": n})


def _unavailable(body: ChatRequest) -> str | None:
    """The first field of a request that a run of many rollouts has no use for."""
    asked = {
        "logprobs": body.logprobs,
        "return_token_ids": body.return_token_ids,
        "return_experts": body.return_experts,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty not in (None, 1),
        "logit_bias": body.logit_bias,
        "stop": body.stop,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
        "thinking_budget": body.thinking_budget is not None,
        "thinking_token_budget": body.thinking_token_budget is not None,
        "enable_thinking": body.enable_thinking is False,
    }
    return next((name for name, value in asked.items() if value), None)


# --- limits -------------------------------------------------------------------------------------------


def final_of(body: ChatRequest) -> dict[str, Any]:
    """What holds for the final call alone, as the request has it."""
    given = body.model_dump(exclude_none=True, by_alias=True)
    names = ("response_format", "tool_choice", "parallel_tool_calls")
    return {name: given[name] for name in names if name in given}


async def fitted(
    wish: Wish, question: Question, completer: Completer, settings: ServerSettings
) -> tuple[RSAConfig, list[str]]:
    """Settings that fit the model and the server's limits, and what was changed.

    Raises ``ApiError`` (400) for a question that leaves no room, or more work than one request may ask for.
    """
    config, warnings = wish.config, []
    capabilities = await completer.capabilities()
    limit = settings.max_tokens_limit
    if limit is not None and max(config.beta, config.final_budget) > limit:
        budgets = {"beta": min(config.beta, limit), "final_budget": min(config.final_budget, limit)}
        config = config.model_copy(update=budgets)
        warnings.append(f"this server's answers have at most {limit} tokens: beta and final_budget are cut to it")
    contexts = [one for one in (capabilities.context, settings.context) if one is not None]
    if contexts:
        if capabilities.kind == "engine" and "prompt_style" not in wish.chosen and config.t:
            style = "short" if min(contexts) <= SHORT_PROMPT_CONTEXT else config.prompt_style
            config = config.model_copy(update={"prompt_style": style})
        num_prompt = await completer.count(question.messages, question.tools)
        config, note = _in_context(config, min(contexts), num_prompt, wish.chosen)
        warnings += [note] if note else []
    _check_work(config, settings)
    return config, warnings


def _in_context(
    config: RSAConfig, context: int, num_prompt: int, chosen: frozenset[str]
) -> tuple[RSAConfig, str | None]:
    """Budgets that were asked for are kept where they fit; ``max_tokens`` is an upper bound in any case."""
    error: RSAError | None = None
    for kept in (chosen, chosen - {"final_budget"}, frozenset[str]()):
        try:
            return fit_context(config, context, num_prompt, kept)
        except RSAError as refusal:
            error = refusal
    raise bad_request(str(error), "messages", code="context_length_exceeded")


def _check_work(config: RSAConfig, settings: ServerSettings) -> None:
    work = estimate(config, 0)
    if work.num_rollouts > settings.rsa_max_rollouts:
        raise bad_request(
            f"rsa: {work.num_rollouts} rollouts are above this server's limit of {settings.rsa_max_rollouts} a "
            "request; lower n, t or final_n",
            "rsa",
        )
    if work.completion_tokens > settings.rsa_max_tokens:
        raise bad_request(
            f"rsa: up to {work.completion_tokens} generated tokens are above this server's limit of "
            f"{settings.rsa_max_tokens} a request; lower n, t, beta or final_budget",
            "rsa",
        )


def question_of(messages: list[dict[str, Any]], body: ChatRequest) -> Question:
    """The conversation as RSA asks it. Raises ``ApiError`` (400)."""
    tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    try:
        return Question.of(messages, tools, final_of(body))
    except RSAError as error:
        raise bad_request(str(error), "messages") from None
