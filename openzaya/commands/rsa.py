"""The verb ``rsa``: its options, over openzaya/ttc/command.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from openzaya.commands.options import Device, Dtype, Json, Quantize


class Interrupted(SystemExit):
    """Exit code 130 of a verb that has said itself how to go on."""

    def __init__(self) -> None:
        super().__init__(130)


def rsa(
    problem: Annotated[str | None, typer.Argument(help="The problem; - reads it from standard input.")] = None,
    data: Annotated[Path | None, typer.Option(help="Many problems instead: one JSON object a line.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A checkpoint directory or hub id; with --endpoint the model's name there.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server.")] = None,
    preset: Annotated[str, typer.Option(help="Where the settings below start: light, default, high, ...")] = "default",
    n: Annotated[int | None, typer.Option(help="Population: rollouts a round.")] = None,
    c: Annotated[int | None, typer.Option(help="Candidates in an aggregation prompt.")] = None,
    t: Annotated[int | None, typer.Option(help="Aggregation rounds after round 0.")] = None,
    beta: Annotated[int | None, typer.Option(help="Most new tokens of a rollout before the final round.")] = None,
    tau: Annotated[int | None, typer.Option(help="Tokens of a tail.")] = None,
    final_budget: Annotated[int | None, typer.Option(help="Most new tokens of a rollout of the final round.")] = None,
    final_n: Annotated[int | None, typer.Option(help="Rollouts of the final round; by default n.")] = None,
    carry: Annotated[
        str | None, typer.Option(help="What is handed on: reasoning, answer, answer_or_reasoning or both.")
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="What is returned: majority, verifier, aggregate, random or all.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="general, math, code or multiple_choice.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of all rollouts.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the K most likely tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the most likely one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same draws.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: name=value, such as prompt_style=short.", metavar="NAME=VALUE"),
    ] = None,
    system: Annotated[str, typer.Option(help="System message, kept in every round.")] = "",
    journal: Annotated[Path | None, typer.Option(help="File of finished rollouts; by default in runs/rsa.")] = None,
    no_journal: Annotated[bool, typer.Option("--no-journal", help="Keep nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --journal; nothing finished is repeated.")
    ] = False,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Rollouts at a time, over all problems.")] = None,
    max_tokens_total: Annotated[int | None, typer.Option(min=1, help="Hard cap on newly generated tokens.")] = None,
    price_in: Annotated[float | None, typer.Option(min=0, help="Dollars a million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Dollars a million generated tokens.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the view of the run there.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=["OPENZAYA_API_KEY", "OPENAI_API_KEY"], help="Key of the endpoint.", show_default=False),
    ] = None,
    quantize: Quantize = None,
    tokenizer: Annotated[str | None, typer.Option(help="Directory or hub id of the model's tokenizer.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Think in rounds of many rollouts with Markovian RSA, on a model here or on any endpoint."""
    if (problem is None) == (data is None):
        raise typer.BadParameter("give a problem, or --data with a file of problems")
    if model is None and endpoint is None:
        raise typer.BadParameter("give --model with a checkpoint, or --endpoint with a server's URL")
    if resume and journal is None:
        raise typer.BadParameter("--resume goes on with a journal; name it with --journal")
    if journal is not None and no_journal:
        raise typer.BadParameter("--journal and --no-journal exclude each other")
    if endpoint is not None and quantize is not None:
        raise typer.BadParameter("--quantize is for a model here; an endpoint has its own weights")
    from openzaya.ttc.command import Stopped, run_rsa
    from openzaya.ttc.options import RSAOptions

    settings = {
        "n": n,
        "c": c,
        "t": t,
        "beta": beta,
        "tau": tau,
        "final_budget": final_budget,
        "final_n": final_n,
        "carry": carry,
        "select": select,
        "task": task,
        "seed": seed,
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.top_k": top_k,
        "sampling.min_p": min_p,
    }
    try:
        run_rsa(
            RSAOptions(
                problem=problem,
                data=data,
                model=model,
                endpoint=endpoint,
                preset=preset,
                settings={name: value for name, value in settings.items() if value is not None},
                assignments=tuple(assignments or ()),
                system=system,
                journal=journal,
                keep_journal=not no_journal,
                resume=resume,
                as_json=as_json,
                concurrency=concurrency,
                max_tokens_total=max_tokens_total,
                price_in=price_in,
                price_out=price_out,
                yes=yes,
                html=html,
                api_key=api_key,
                quantize=quantize,
                tokenizer=tokenizer,
                dtype=dtype,
                device=device,
            )
        )
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise Interrupted from None
