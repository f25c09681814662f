"""The command line. Each verb is a few lines over a function of the library.

Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted with everything saved.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openzaya.commands.options import (
    Device,
    Dtype,
    Json,
    MaxTokens,
    MinP,
    Model,
    Overrides,
    Quantize,
    Seed,
    Temperature,
    TopK,
    TopP,
    quantising,
)
from openzaya.commands.rl import calibrate, rl
from openzaya.commands.rsa import Interrupted, rsa
from openzaya.commands.serve import serve
from openzaya.errors import ConfigError, DataError, OpenZayaError

if TYPE_CHECKING:
    from openzaya.infer.sampling import SamplingParams

app = typer.Typer(
    name="openzaya",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, convert, evaluate and run ZAYA models. Independent of Zyphra.\n\n"
    "Start with: openzaya run recipes/smoke",
)


def main() -> None:
    """Entry point: runs a verb and turns errors into messages and exit codes."""
    # Read by OpenMP when torch is imported: waiting threads spin for microseconds, then sleep (docs/lab-notes.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        # A model may write any character; a terminal that cannot show it must not end the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except OpenZayaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        # Disk and permissions: a matter between the user and the machine.
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}; check the path, its permissions and the disk", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as leaving:
        # Typer turns Ctrl-C into this code without a word.
        if leaving.code == 130 and not isinstance(leaving, Interrupted):
            print("interrupted; the same command goes on from the last checkpoint of a run", file=sys.stderr)
        raise


# --- training ---------------------------------------------------------------------------------------


@app.command(epilog="Example: openzaya run recipes/smoke --out runs/smoke 02-pretrain.steps=20")
def run(
    recipes: Annotated[Path, typer.Argument(help="A folder of numbered recipe files.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/NAME.")] = None,
) -> None:
    """Run a folder of numbered stages; finished ones are skipped, an interrupted one goes on."""
    from openzaya.stages import run_pipeline

    report_path = run_pipeline(recipes, out or Path("runs") / recipes.resolve().name, overrides or [])
    print(f"report: {report_path}")


@app.command(epilog="Example: openzaya train recipes/smoke/02-pretrain.toml --out runs/smoke/02-pretrain steps=50")
def train(
    recipe: Annotated[Path, typer.Argument(help="A training recipe (TOML).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Stage directory; by default runs/NAME.")] = None,
) -> None:
    """Run one training phase, or go on with it; names of earlier stages are looked up beside --out."""
    from openzaya.eval.report import write_report
    from openzaya.stages import run_stage

    directory = out or Path("runs") / recipe.stem
    run_stage(recipe, directory, overrides or [], kind="train")
    print(f"model: {directory / 'model'}\nreport: {write_report(directory).html}")


app.command(epilog="Example: openzaya rl recipes/nano/05-warmup.toml --out runs/nano/05-warmup steps=20")(rl)
app.command(epilog="Example: openzaya calibrate recipes/nano/06-curriculum.toml --out runs/nano/calibration")(calibrate)


@app.command(epilog="Example: openzaya config recipes/nano/02-pretrain.toml optimizer.weight_decay=0")
def config(
    recipe: Annotated[Path, typer.Argument(help="Any recipe (TOML).")],
    overrides: Overrides = None,
) -> None:
    """Show every value of a recipe and where it came from."""
    from openzaya.config import load_recipe
    from openzaya.stages import stage_schema

    print(load_recipe(recipe, stage_schema(recipe), overrides or []).describe())


# --- checkpoints ------------------------------------------------------------------------------------


@app.command(epilog="Example: openzaya init smoke /tmp/fresh --seed 1 num_hidden_layers=3")
def init(
    preset: Annotated[str, typer.Argument(help="zaya1-8b, zaya1-74b-preview, nano or smoke.")],
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    overrides: Overrides = None,
    seed: Seed = 0,
    tokenizer: Annotated[str | None, typer.Option(help="A directory or hub id to take the tokenizer from.")] = None,
    layout: Annotated[str | None, typer.Option(help="native, legacy or openzaya; by default what holds it.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write a checkpoint with fresh weights and a tokenizer."""
    from openzaya.initialize import initialize_checkpoint

    written = initialize_checkpoint(
        preset, directory, overrides or [], seed=seed, tokenizer=tokenizer, layout=layout, dtype=dtype
    )
    print(written)


@app.command(epilog="Example: openzaya convert runs/smoke/02-pretrain/model /tmp/small --quantize int4")
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="Where to write; replaced only by a whole checkpoint.")],
    to: Annotated[str | None, typer.Option(help="native, legacy or openzaya.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8, or int4 (experts in 4 bits, attention and head in 8); with exceptions for gate_up, down, "
            "attention, head: int4,head=float."
        ),
    ] = None,
) -> None:
    """Rewrite a checkpoint in another layout, byte for byte, or quantise its matrices to 8 or 4 bits."""
    from openzaya.model import hf

    if to is None and quantize is None:
        raise typer.BadParameter("nothing to convert to; give --to native|legacy|openzaya or --quantize int8|int4")
    found = hf.convert(source, destination, to=to, quantize=quantize, progress=quantising)  # type: ignore[arg-type]
    print(found.to_text())


@app.command(epilog="Example: openzaya inspect runs/smoke/02-pretrain/model")
def inspect(path: Model, as_json: Json = False) -> None:
    """Say what a checkpoint is: layout, sizes, dtype, and every missing or unexpected key. Exit code 1 on problems."""
    from openzaya.model import hf

    found = hf.inspect(path)
    print(json.dumps(found.to_dict()) if as_json else found.to_text())
    if not found.ok:
        raise typer.Exit(1)


# --- use --------------------------------------------------------------------------------------------


@app.command(epilog='Example: openzaya generate runs/smoke/04-sft/model "Add: 24+52" --chat --temperature 0')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or the user's message with --chat; - reads stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user instead of continuing text.")] = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Continue a text, or answer one message; tokens are printed as they are made."""
    params = _sampling(temperature, top_p, top_k, min_p, max_tokens, seed)
    text = _from_stdin(sys.stdin.read) if prompt == "-" else prompt
    message = [{"role": "user", "content": text}]
    with _session(model, dtype, device, quantize) as session:
        for piece in session.reply(message, params) if chat else session.go_on(text, params):
            print(piece, end="", flush=True)
    print()


@app.command(epilog="Example: openzaya chat runs/smoke/04-sft/model --temperature 0.6")
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    thinking: Annotated[bool, typer.Option(help="Let the model reason before it answers.")] = True,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    max_tokens: MaxTokens = 1024,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
) -> None:
    """Talk with a model; an empty line or the end of the input ends the chat."""
    from openzaya.problems.verify import split_response

    params = _sampling(temperature, top_p, top_k, min_p, max_tokens, seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with _session(model, dtype, device, quantize) as session:
        while True:
            try:
                text = _from_stdin(lambda: input("> " if sys.stdin.isatty() else ""))
            except (EOFError, KeyboardInterrupt):
                break
            if not text.strip():
                break
            messages.append({"role": "user", "content": text})
            answer = ""
            try:
                for piece in session.reply(messages, params, enable_thinking=thinking):
                    answer += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                # Ctrl-C ends the answer, not the chat.
                pass
            print()
            # Reasoning stays out of the history, as the model was trained; it may also not have come to an end.
            messages.append({"role": "assistant", "content": split_response(answer)[1] or "..."})


app.command(epilog='Example: openzaya rsa "Add: 24+52" --model runs/nano/04-sft/model --n 8 --beta 128 --tau 64')(rsa)


@app.command(epilog="Example: openzaya eval runs/smoke/04-sft/model --k 2 --per-cell 2 --json")
def eval(
    model: Model,
    k: Annotated[int, typer.Option(min=1, help="Samples a problem.")] = 8,
    per_cell: Annotated[int, typer.Option(min=1, help="Problems a family and difficulty.")] = 12,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the samples; the greedy answer is always asked.")] = 1,
    families: Annotated[str, typer.Option(help="Families, separated by commas; by default all.")] = "",
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for eval.json, samples.jsonl and the report.")] = None,
    as_json: Json = False,
) -> None:
    """avg@k, greedy, pass@k and majority@k on held-out problems, with intervals and the truncation rate."""
    from openzaya.data.tokenizer import load_tokenizer
    from openzaya.eval.benchmarks import EvalConfig, evaluate
    from openzaya.eval.report import write_report
    from openzaya.initialize import validated
    from openzaya.model import hf
    from openzaya.model.hub import resolve
    from openzaya.stages import print_progress, write_evaluation

    chosen = {"families": families.split(",")} if families else {}
    settings = validated(
        EvalConfig,
        {"model": model, "k": k, "per_cell": per_cell, "temperature": temperature, "max_new_tokens": max_tokens}
        | {"seed": seed}
        | chosen,
    )
    path = resolve(model)
    result, samples = evaluate(hf.load(path), load_tokenizer(path), settings, progress=print_progress)
    if out is not None:
        write_evaluation(out, result, samples)
        print(f"report: {write_report(out).html}")
    print(json.dumps(result) if as_json else _evaluation_text(result))


@app.command(epilog="Example: openzaya quality runs/smoke/04-sft/model int4 --tokens 2000")
def quality(
    original: Annotated[str, typer.Argument(help="The float checkpoint: a directory or a hub id.")],
    quantised: Annotated[str, typer.Argument(help="Its quantised form: a directory, or a scheme such as int4.")],
    text: Annotated[Path | None, typer.Option(help="A text file; by default held-out problems with solutions.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to compare on.")] = 4000,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate in search of loops; 0 for none.")] = 4000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What quantisation costs: errors by layer, KL and agreement of the next token, loops in long generations."""
    from openzaya.infer.quality import measure

    found = measure(original, quantised, text=text, num_tokens=tokens, num_generated=generate, seed=seed)
    print(json.dumps(found.to_dict()) if as_json else found.to_text())


app.command(epilog="Example: openzaya serve runs/nano/04-sft/model --port 8000")(serve)


@app.command(epilog="Example: openzaya report runs/smoke")
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory, one stage of it, or a journal of RSA runs.")],
) -> None:
    """Write a page with tables, plots and samples, from the run's files alone: of a journal, its view."""
    from openzaya.eval.report import write_report
    from openzaya.ttc.view import is_journal, write_journal_view

    if is_journal(directory):
        print(write_journal_view(directory))
        return
    paths = write_report(directory)
    print(f"{paths.html}\n{paths.markdown}")


# --- the machine ------------------------------------------------------------------------------------


@app.command(epilog="Example: openzaya doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what runs on it and how fast. Exit code 1 where something is set up wrongly."""
    from openzaya.machine.doctor import diagnose, diagnosis_text
    from openzaya.machine.facts import look

    diagnosis = diagnose(look())
    print(json.dumps(diagnosis.to_dict()) if as_json else diagnosis_text(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: openzaya plan --model zaya1-8b --quantize int4 --context 32k --batch 16")
def plan(
    model: Annotated[str, typer.Option(help="A preset, a checkpoint directory or a hub id.")],
    quantize: Annotated[str | None, typer.Option(help="int8, int4 or a mixture (see convert).")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens a sequence, such as 32k; by default 8k.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    cache_dtype: Annotated[str, typer.Option(help="Keys and values: auto, float32, bfloat16 or int8.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say what memory, disk and time a model takes on this machine, and how fast it would be. Loads nothing."""
    from openzaya.machine.facts import look
    from openzaya.machine.plan import find_model, make_plan, plan_text
    from openzaya.machine.sizes import parse_tokens

    num_tokens = None if context is None else parse_tokens(context)
    source = find_model(model)
    made = make_plan(source, look(), quantise=quantize, context=num_tokens, batch=batch, cache_dtype=cache_dtype)
    print(json.dumps(made.to_dict()) if as_json else plan_text(made))


def _sampling(temperature: float, top_p: float, top_k: int, min_p: float, max_tokens: int, seed: int) -> SamplingParams:
    from openzaya.infer.sampling import SamplingParams
    from openzaya.initialize import validated

    if top_p == 0:
        raise ConfigError("top_p=0 keeps no token; give more than 0, or use --temperature 0 for greedy decoding")
    filters = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    return validated(SamplingParams, filters | {"temperature": temperature, "max_new_tokens": max_tokens, "seed": seed})


def _from_stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not {error.encoding} text (byte {error.start}); give text") from None


def _session(model: str, dtype: str, device: str, quantize: str | None) -> Any:
    from openzaya.infer.chat import ChatSession

    return ChatSession.load(model, dtype=dtype, device=device, quantize=quantize)


def _evaluation_text(result: dict[str, Any]) -> str:
    lines = [f"{'group':<14} {'n':>5}  {'greedy':>20}  {'avg@' + str(result['k']):>20}  {'pass@k':>20}  truncated"]
    for name, group in result["groups"].items():
        intervals = [_interval_text(group[key]) for key in ("greedy", "avg_at_k", "pass_at_k")]
        lines.append(f"{name:<14} {group['n']:>5}  {'  '.join(intervals)}  {group['truncation_rate']:.1%}")
    return "\n".join(lines)


def _interval_text(interval: list[float] | None) -> str:
    if interval is None:
        return f"{'no verdict':>22}"
    value, low, high = interval
    return f"{value:6.1%} [{low:5.1%}, {high:5.1%}]"


if __name__ == "__main__":
    main()
