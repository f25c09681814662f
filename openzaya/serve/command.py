"""``openzaya serve``: from the command line's options to a server that runs, in an order that fails early.

Options are checked and the port is taken first, then the plan is printed, then the checkpoint is fetched, quantised
and loaded. The address is printed on standard output when requests are taken; everything else goes to the error
stream.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from openzaya.errors import ConfigError
from openzaya.serve.settings import Effort

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """What ``openzaya serve`` was told; the defaults are in cli.py."""

    model: str
    host: str
    port: int
    api_key: str | None
    quantize: str | None
    dtype: str
    device: str
    cache_dtype: str
    cache_gb: float | None
    max_running: int
    max_waiting: int
    max_tokens_limit: int | None
    context: str | None
    max_body_mb: float
    request_timeout: float
    drain_timeout: float
    cors: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    served_names: tuple[str, ...]
    effort: str
    log_prompts: bool
    insecure: bool


def check_options(options: ServeOptions) -> None:
    """Raise ``ConfigError`` for what can be seen to be wrong before anything is loaded."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}; install with: pip install 'openzaya[serve]'")
    from openzaya.serve.launch import is_loopback

    if options.api_key is not None and (not options.api_key.strip() or not options.api_key.isascii()):
        raise ConfigError("the API key is empty or not ASCII; give another, or none")
    if options.api_key is None and not is_loopback(options.host) and not options.insecure:
        raise ConfigError(
            f"host {options.host} is reached from other machines and there is no API key; give --api-key (or "
            "OPENZAYA_API_KEY), listen on 127.0.0.1, or say --insecure"
        )
    if options.effort not in get_args(Effort):
        raise ConfigError(f"effort '{options.effort}' is unknown; choose one of: {', '.join(get_args(Effort))}")
    if options.cache_dtype not in ("auto", "float32", "bfloat16", "int8"):
        raise ConfigError(f"cache_dtype '{options.cache_dtype}' is unknown; choose auto, float32, bfloat16 or int8")
    for name, value in (("cache-gb", options.cache_gb), ("max-body-mb", options.max_body_mb)):
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{name} is {value}, expected a finite number; give another, or leave it out")


def model_names(options: ServeOptions) -> tuple[str, ...]:
    """The names that requests may give: those chosen, else the directory's own, or the hub id."""
    if options.served_names:
        return options.served_names
    directory = Path(options.model).expanduser()
    # Not its path: clients need not know where things lie on the server.
    return (directory.resolve().name or "model",) if directory.is_dir() else (options.model,)


def serve_model(options: ServeOptions, progress: object = None) -> None:
    """Run the server until it is told to stop. Raises ``OpenZayaError`` with what stands in the way."""
    check_options(options)
    from pydantic import SecretStr

    from openzaya.infer.engine import Engine
    from openzaya.machine.sizes import parse_tokens
    from openzaya.serve.launch import is_loopback, open_socket, run_server, url_of
    from openzaya.serve.prepare import prepare
    from openzaya.serve.settings import ServerSettings

    context = None if options.context is None else parse_tokens(options.context)
    if context is not None and context < 2:
        raise ConfigError(f"context={context}, expected at least 2: one token of prompt and one of answer; raise it")
    guarded = options.api_key is None and is_loopback(options.host)
    settings = ServerSettings(
        model_names=model_names(options),
        api_key=None if options.api_key is None else SecretStr(options.api_key),
        allowed_hosts=(*LOOPBACK_NAMES, options.host, *options.allowed_hosts) if guarded else None,
        cors_origins=options.cors,
        context=context,
        max_tokens_limit=options.max_tokens_limit,
        max_body_bytes=max(1024, int(options.max_body_mb * 1e6)),
        effort=options.effort,
        request_timeout_s=options.request_timeout,
        drain_s=options.drain_timeout,
        log_prompts=options.log_prompts,
    )
    listener = open_socket(options.host, options.port)
    with listener:
        _say(_plan(options, context))
        path = prepare(options.model, options.quantize, progress)  # type: ignore[arg-type]
        engine = Engine(
            path,
            dtype=options.dtype,
            device=options.device,
            cache_dtype=options.cache_dtype,  # type: ignore[arg-type]  # checked above
            cache_bytes=None if options.cache_gb is None else int(options.cache_gb * 1e9),
            max_running=options.max_running,
            max_waiting=options.max_waiting,
        )
        with engine:
            if not is_loopback(options.host) and options.api_key is None:
                _say("warning: anyone who reaches this machine can use the server")

            def announce() -> None:
                print(f"serving {settings.model_name} at {url_of(listener)}", flush=True)

            run_server(engine, settings, listener, announce)


def _plan(options: ServeOptions, context: int | None) -> str:
    """What the model will take on this machine. Loads nothing."""
    from openzaya.machine.facts import look
    from openzaya.machine.plan import find_model, make_plan, plan_text

    source = find_model(options.model)
    limit = source.config.max_position_embeddings
    plan = make_plan(
        source,
        look(),
        quantise=options.quantize,
        context=None if context is None else min(context, limit),
        batch=1,
        cache_dtype=options.cache_dtype,
    )
    return plan_text(plan)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
