"""What several verbs share: options by meaning, and the line that shows how far quantising has come.

Nothing heavy is imported here: ``openzaya --help`` must not wait for it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key.sub=value", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the most likely tokens up to this share.")]
TopK = Annotated[int, typer.Option(min=0, help="Keep the K most likely tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the most likely one.")]
Quantize = Annotated[str | None, typer.Option(help="Run with int8, int4 or mixed weights: int4,down=int8.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same result.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="A PyTorch device, such as cpu.")]
Model = Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")]


def quantising(done: int, total: int, seconds: float) -> None:
    rate = done / max(seconds, 1e-9)
    left = f"{(total - done) / max(rate, 1):.0f} s left" if done < total else f"took {seconds:.0f} s"
    end = "\n" if done == total or not sys.stderr.isatty() else ""
    begin = "\r" if sys.stderr.isatty() else ""
    text = f"quantised {done / 1e6:,.0f} of {total / 1e6:,.0f} M weights, {rate / 1e6:.0f} M/s, {left}"
    print(f"{begin}{text:<78}", end=end, file=sys.stderr, flush=True)
