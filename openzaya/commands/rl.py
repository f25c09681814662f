"""The verbs ``rl`` and ``calibrate``: one stage of RL, and where its environments should begin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openzaya.commands.options import Json, Overrides


def rl(
    recipe: Annotated[Path, typer.Argument(help="A recipe of kind rl (TOML).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Stage directory; by default runs/NAME.")] = None,
) -> None:
    """Run one stage of RL, or go on with it; names of earlier stages are looked up beside --out."""
    from openzaya.eval.report import write_report
    from openzaya.stages import run_stage

    directory = out or Path("runs") / recipe.stem
    run_stage(recipe, directory, overrides or [], kind="rl")
    print(f"model: {directory / 'model'}\nreport: {write_report(directory).html}")


def calibrate(
    recipe: Annotated[Path, typer.Argument(help="A recipe of kind rl or calibrate (TOML).")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for calibration.json and the report; by default runs/NAME-calibration."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the difficulty at which a model solves half, in each environment; stages are looked up beside --out."""
    import json

    from openzaya.config import load_recipe
    from openzaya.errors import ConfigError
    from openzaya.eval.calibration import calibration_text, run_calibration
    from openzaya.eval.report import write_report
    from openzaya.stages import stage_kind, stage_schema

    kind = stage_kind(recipe)
    if kind not in ("rl", "calibrate"):
        raise ConfigError(f"{recipe} is of kind '{kind}'; give a recipe of kind 'rl' or 'calibrate'")
    directory = out or Path("runs") / f"{recipe.stem}-calibration"
    if (directory / "metrics.jsonl").exists() and (directory / "checkpoints").exists():
        raise ConfigError(f"{directory} holds a stage that was trained; name another directory with --out")
    resolved = load_recipe(recipe, stage_schema(recipe), overrides or [])
    result = run_calibration(resolved, directory)
    report = write_report(directory).html
    print(json.dumps(result) if as_json else f"{calibration_text(result)}\nreport: {report}")
