"""The verb ``serve``: its options, over openzaya/serve/command.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openzaya.commands.options import Device, Dtype, quantising


def serve(
    model: Annotated[str | None, typer.Argument(help="A checkpoint directory or a hub id; none with --proxy.")] = None,
    proxy: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible endpoint to stand in front of.")] = (
        None
    ),
    upstream_key: Annotated[
        str | None, typer.Option(envvar="OPENZAYA_UPSTREAM_KEY", help="Key of that endpoint; clients never see it.")
    ] = None,
    upstream_model: Annotated[
        str | None, typer.Option("--model", help="With --proxy: the endpoint's model; by default its first.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With --proxy: the model's tokenizer, for tails of exact length.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="OPENZAYA_API_KEY", help="What clients must send.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8, int4 or a mixture; the copy is kept.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    cache_dtype: Annotated[str, typer.Option(help="Keys and values: auto, float32, bfloat16 or int8.")] = "auto",
    cache_gb: Annotated[float | None, typer.Option(min=0.0, help="Memory for keys and values, in GB.")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Answers that are made together.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue; more get 429.")] = 256,
    max_tokens_limit: Annotated[int | None, typer.Option(min=1, help="Most tokens of one answer.")] = None,
    context: Annotated[str | None, typer.Option(help="Most tokens of prompt and answer, such as 32k.")] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in MB.")] = 8.0,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one request may take.")] = 1800.0,
    drain_timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to finish in, after the stop signal.")] = 120.0,
    cors: Annotated[list[str] | None, typer.Option(help="Origin whose pages may call; repeat it for more.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Another name that this server answers to.")] = None,
    served_name: Annotated[list[str] | None, typer.Option(help="Name of the model; by default its own.")] = None,
    effort: Annotated[str, typer.Option(help="Thinking: none, minimal, low, medium or high.")] = "high",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write messages and prompts to the log.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let anyone in the network in, without a key.")] = False,
    effort_rsa: Annotated[
        bool, typer.Option("--effort-rsa", help="Answer reasoning_effort with Markovian RSA of that width and depth.")
    ] = False,
    rsa_beta: Annotated[
        int | None, typer.Option(min=1, help="Budget of a rollout, where requests say nothing.")
    ] = None,
    rsa_tau: Annotated[int | None, typer.Option(min=0, help="Length of a tail, unless requests say.")] = None,
    rsa_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another setting of RSA, such as prompt_style=short; repeat it."),
    ] = None,
    rsa_max_rollouts: Annotated[int, typer.Option(min=1, help="Most rollouts of one request.")] = 512,
    rsa_max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that one request may generate.")] = 16_000_000,
    rsa_max_running: Annotated[int, typer.Option(min=1, help="RSA requests at a time; more get 429.")] = 16,
    rsa_concurrency: Annotated[int, typer.Option(min=1, help="Rollouts at a time; with --proxy of all requests.")] = 64,
    rsa_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one RSA request may take.")] = 14_400.0,
    rsa_journal: Annotated[
        Path | None, typer.Option(help="File that keeps all rollouts; a request with the same seed goes on from there.")
    ] = None,
) -> None:
    """Serve a model to OpenAI clients and browsers, or Markovian RSA in front of another server."""
    if (model is None) == (proxy is None):
        raise typer.BadParameter("give a MODEL, or --proxy URL to stand in front of another server; one of the two")
    from openzaya.serve.command import RSAOptions, ServeOptions, serve_model

    serve_model(
        ServeOptions(
            model=model,
            host=host,
            port=port,
            api_key=api_key,
            quantize=quantize,
            dtype=dtype,
            device=device,
            cache_dtype=cache_dtype,
            cache_gb=cache_gb,
            max_running=max_running,
            max_waiting=max_waiting,
            max_tokens_limit=max_tokens_limit,
            context=context,
            max_body_mb=max_body_mb,
            request_timeout=request_timeout,
            drain_timeout=drain_timeout,
            cors=tuple(cors or ()),
            allowed_hosts=tuple(allowed_host or ()),
            served_names=tuple(served_name or ()),
            effort=effort,
            log_prompts=log_prompts,
            insecure=insecure,
            rsa=RSAOptions(
                for_effort=effort_rsa,
                beta=rsa_beta,
                tau=rsa_tau,
                changes=tuple(rsa_set or ()),
                max_rollouts=rsa_max_rollouts,
                max_tokens=rsa_max_tokens,
                max_running=rsa_max_running,
                concurrency=rsa_concurrency,
                timeout=rsa_timeout,
                journal=rsa_journal,
            ),
            proxy=proxy,
            upstream_key=upstream_key,
            upstream_model=upstream_model,
            tokenizer=tokenizer,
        ),
        progress=quantising,
    )
