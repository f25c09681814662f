"""``openzaya serve``: from the command line's options to a server that runs, in an order that fails early.

Options are checked and the port is taken first, then the plan is printed, then the checkpoint is fetched, quantised
and loaded. The address is printed on standard output when requests are taken; everything else goes to the error
stream.
"""

from __future__ import annotations

import importlib.util
import math
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from openzaya.config import parse_assignment
from openzaya.errors import ConfigError
from openzaya.serve.settings import Effort
from openzaya.ttc.config import from_proxy_names, make_config

if TYPE_CHECKING:
    from openzaya.serve.service import BaseService
    from openzaya.serve.settings import ServerSettings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
ENGINE_PACKAGES = ("llguidance",)
PROXY_PACKAGES = ("httpx", "tenacity")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class RSAOptions:
    """What ``openzaya serve`` was told about Markovian RSA."""

    for_effort: bool = False
    beta: int | None = None
    tau: int | None = None
    changes: tuple[str, ...] = ()
    """``name=value``."""
    max_rollouts: int = 512
    max_tokens: int = 16_000_000
    max_running: int = 16
    concurrency: int = 64
    timeout: float = 14_400.0
    journal: Path | None = None

    def defaults(self) -> dict[str, Any]:
        """Settings where a request says nothing. Raises ``ConfigError`` for those that RSA does not have."""
        values: dict[str, Any] = {"beta": self.beta, "tau": self.tau}
        values = {name: value for name, value in values.items() if value is not None}
        for change in self.changes:
            name, value = parse_assignment(change)
            group, _, entry = name.rpartition(".")
            if group:
                values.setdefault(group, {})[entry] = value
            else:
                values[name] = value
        make_config("default", values)
        return from_proxy_names(values)


@dataclass(frozen=True)
class ServeOptions:
    """What ``openzaya serve`` was told; the defaults are in cli.py."""

    model: str | None
    """A checkpoint; None with ``proxy``."""
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
    rsa: RSAOptions
    proxy: str | None = None
    """URL of the endpoint that answers instead of a model of our own."""
    upstream_key: str | None = None
    upstream_model: str | None = None
    tokenizer: str | None = None


def check_options(options: ServeOptions) -> None:
    """Raise ``ConfigError`` for what can be seen to be wrong before anything is loaded."""
    needed = PACKAGES + (ENGINE_PACKAGES if options.proxy is None else PROXY_PACKAGES)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
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
    if options.proxy is not None and options.served_names:
        raise ConfigError(
            "--served-name: requests are passed on with the upstream's names; name its model with --model"
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
    if options.model is None:
        return (options.upstream_model or "upstream",)
    directory = Path(options.model).expanduser()
    # Not its path: clients need not know where things lie on the server.
    return (directory.resolve().name or "model",) if directory.is_dir() else (options.model,)


def server_settings(options: ServeOptions, context: int | None) -> ServerSettings:
    """Limits and access of the server. Raises ``ConfigError``."""
    from pydantic import SecretStr

    from openzaya.serve.launch import is_loopback
    from openzaya.serve.settings import ServerSettings

    guarded = options.api_key is None and is_loopback(options.host)
    return ServerSettings(
        model_names=model_names(options),
        api_key=None if options.api_key is None else SecretStr(options.api_key),
        allowed_hosts=(*LOOPBACK_NAMES, options.host, *options.allowed_hosts) if guarded else None,
        cors_origins=options.cors,
        context=context,
        max_tokens_limit=options.max_tokens_limit,
        max_body_bytes=max(1024, int(options.max_body_mb * 1e6)),
        effort=options.effort,
        effort_rsa=options.rsa.for_effort,
        rsa_defaults=options.rsa.defaults(),
        rsa_max_rollouts=options.rsa.max_rollouts,
        rsa_max_tokens=options.rsa.max_tokens,
        rsa_max_running=options.rsa.max_running,
        rsa_concurrency=options.rsa.concurrency,
        rsa_timeout_s=options.rsa.timeout,
        request_timeout_s=options.request_timeout,
        drain_s=options.drain_timeout,
        log_prompts=options.log_prompts,
    )


def serve_model(options: ServeOptions, progress: object = None) -> None:
    """Run the server until it is told to stop. Raises ``OpenZayaError`` with what stands in the way."""
    check_options(options)
    from openzaya.machine.sizes import parse_tokens
    from openzaya.serve.launch import is_loopback, open_socket

    context = None if options.context is None else parse_tokens(options.context)
    if context is not None and context < 2:
        raise ConfigError(f"context={context}, expected at least 2: one token of prompt and one of answer; raise it")
    settings = server_settings(options, context)
    with open_socket(options.host, options.port) as listener:
        if options.api_key is None and not is_loopback(options.host):
            _say("warning: anyone who reaches this machine can use the server")
        if options.proxy is None:
            _serve_engine(options, settings, listener, progress)
        else:
            _serve_proxy(options, settings, listener)


def _serve_engine(options: ServeOptions, settings: ServerSettings, listener: socket.socket, progress: object) -> None:
    from openzaya.infer.engine import Engine
    from openzaya.serve.launch import run_server, url_of
    from openzaya.serve.prepare import prepare
    from openzaya.serve.server import create_app

    assert options.model is not None
    _say(_plan(options, options.model, settings.context))
    path = prepare(options.model, options.quantize, progress)  # type: ignore[arg-type]
    engine = Engine(
        path,
        dtype=options.dtype,
        device=options.device,
        cache_dtype=options.cache_dtype,  # type: ignore[arg-type]  # checked before
        cache_bytes=None if options.cache_gb is None else int(options.cache_gb * 1e9),
        max_running=options.max_running,
        max_waiting=options.max_waiting,
    )
    with engine:
        app = create_app(engine, settings)
        _open_journal(app.state.service, options)
        run_server(app, listener, lambda: _announce(settings.model_name, url_of(listener)))


def _serve_proxy(options: ServeOptions, settings: ServerSettings, listener: socket.socket) -> None:
    from openzaya.serve.launch import run_server, url_of
    from openzaya.serve.proxy import ProxyService, create_proxy

    assert options.proxy is not None
    service = ProxyService(
        options.proxy,
        settings,
        api_key=options.upstream_key,
        model=options.upstream_model,
        tokenizer=options.tokenizer,
    )
    _say(f"upstream: {service.upstream.url}")
    _open_journal(service, options)
    app = create_proxy(service)
    run_server(app, listener, lambda: _announce(settings.model_name, url_of(listener)))


def _open_journal(service: BaseService, options: ServeOptions) -> None:
    """The service closes it."""
    if options.rsa.journal is not None:
        from openzaya.ttc.journal import Journal

        service.journal = Journal.open(options.rsa.journal)


def _announce(name: str, url: str) -> None:
    print(f"serving {name} at {url}", flush=True)


def _plan(options: ServeOptions, model: str, context: int | None) -> str:
    """What the model will take on this machine. Loads nothing."""
    from openzaya.machine.facts import look
    from openzaya.machine.plan import find_model, make_plan, plan_text

    source = find_model(model)
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
