"""A pipeline: numbered recipe files, run in order, each from what the stages before it left on the disk.

``recipes/nano/02-pretrain.toml`` runs in ``OUT/02-pretrain``. A stage says by its ``kind`` what it is (tokenizer,
train, eval); stages know each other's directories by name only, so each can be rerun alone. A finished stage is
skipped as long as its recipe has not changed, an interrupted one is resumed.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.config import Resolved, load_recipe
from openzaya.errors import ConfigError
from openzaya.runlog import RunLog, read_json, write_text_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAY_CHANGE = ("checkpoint_every", "keep_checkpoints", "threads")
"""Settings of a training stage that may differ when it is resumed."""
STAGE_FILE = re.compile(r"\d\d-[a-z0-9-]+\.toml\Z")


class TokenizerConfig(BaseModel):
    """A byte-pair encoding trained on plain text and generated problems."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tokenizer"] = "tokenizer"
    vocab_size: int = Field(1024, ge=267)
    text_paths: list[str] = ["python-stdlib"]
    text_characters: int = Field(2_000_000, ge=0)
    """Of plain text, taken evenly over the files."""
    problems_per_family: int = Field(400, ge=0)
    seed: int = 0


def run_pipeline(recipes: Path, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Run all stages of the folder ``recipes`` in ``out`` and write the report; returns the report's path.

    ``overrides`` are ``STAGE.key.sub=value``, for example ``02-pretrain.steps=100``.

    Raises:
        ConfigError: no stages, an override for no stage, or a stage whose recipe has changed since it was begun.
    """
    from openzaya.eval.report import write_report

    files = sorted(path for path in recipes.glob("*.toml") if STAGE_FILE.match(path.name))
    if not files:
        raise ConfigError(f"{recipes} holds no stage files such as 01-tokenizer.toml; name a folder of recipes")
    names = [path.stem for path in files]
    by_stage: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        stage, _, rest = override.partition(".")
        if stage not in by_stage:
            raise ConfigError(f"override '{override}' names no stage; begin with one of: {', '.join(names)}")
        by_stage[stage].append(rest)
    for path in files:
        run_stage(path, out / path.stem, by_stage[path.stem])
    return write_report(out).html


def run_stage(recipe_file: Path, directory: Path, overrides: Sequence[str] = (), *, kind: str | None = None) -> None:
    """Run, resume or skip one stage in ``directory``; ``kind`` refuses a recipe of another kind."""
    found = stage_kind(recipe_file)
    if kind is not None and found != kind:
        raise ConfigError(f"{recipe_file} is of kind '{found}', not '{kind}'; use 'openzaya run' or the right command")
    schema, run = _kinds()[found]
    recipe = load_recipe(recipe_file, schema, overrides)
    _refuse_another_recipe(directory, recipe)
    if is_finished(directory):
        print(f"{directory.name}: done already", file=sys.stderr)
        return
    directory.mkdir(parents=True, exist_ok=True)
    run(recipe, directory)


def _refuse_another_recipe(directory: Path, recipe: Resolved[Any]) -> None:
    """A stage is finished, and goes on from its checkpoints, with the recipe that it was begun with only."""
    finished, saved_file = is_finished(directory), directory / "resolved.toml"
    if not saved_file.is_file() or not (finished or any((directory / "checkpoints").glob("step-*.pt"))):
        return
    saved, wanted = saved_file.read_text(encoding="utf-8"), recipe.to_toml()
    if not finished:
        saved, wanted = (_without_bookkeeping(text) for text in (saved, wanted))
    if saved != wanted:
        raise ConfigError(
            f"{directory} was {'finished' if finished else 'begun'} with another recipe "
            f"({_first_difference(saved, wanted)}); "
            "remove that directory and those of the stages behind it, or choose another --out"
        )


def _without_bookkeeping(resolved_toml: str) -> str:
    """Without the settings that an interrupted stage may change."""
    return "\n".join(line for line in resolved_toml.splitlines() if line.partition(" ")[0] not in MAY_CHANGE)


def is_finished(directory: Path) -> bool:
    """Whether the stage in ``directory`` ran to its end."""
    status = read_json(directory / "status.json")
    return isinstance(status, dict) and status.get("state") == "done"


def stage_kind(recipe_file: Path) -> str:
    """The ``kind`` of a recipe, looked up through its bases."""
    path, seen = recipe_file, set()
    while path not in seen:
        seen.add(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read recipe {path}: {error.strerror}; check the path") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}; correct it there") from None
        if "kind" in values or not isinstance(values.get("base"), str):
            break
        path = path.parent / values["base"]
    found = values.get("kind")
    if found not in _kinds():
        raise ConfigError(f"{recipe_file}: kind={found!r}; set kind to one of: {', '.join(_kinds())}")
    return str(found)


def stage_schema(recipe_file: Path) -> type[BaseModel]:
    """The schema that ``recipe_file`` is checked against."""
    return _kinds()[stage_kind(recipe_file)][0]


def _kinds() -> dict[str, tuple[type[BaseModel], Callable[[Any, Path], None]]]:
    from openzaya.eval.benchmarks import EvalConfig
    from openzaya.eval.calibration import CalibrateConfig
    from openzaya.eval.cascade import CascadeConfig
    from openzaya.rl.recipe import RLConfig
    from openzaya.train.recipe import RewardModelConfig, TrainConfig

    return {
        "tokenizer": (TokenizerConfig, _run_tokenizer),
        "train": (TrainConfig, _run_train),
        "reward_model": (RewardModelConfig, _run_reward_model),
        "rl": (RLConfig, _run_rl),
        "eval": (EvalConfig, _run_eval),
        "cascade": (CascadeConfig, _run_cascade),
        "calibrate": (CalibrateConfig, _run_calibrate),
    }


def _first_difference(old: str, new: str) -> str:
    lines = zip(old.splitlines() + [""] * 999, new.splitlines(), strict=False)
    return next((f"'{before}' then, '{now}' now" for before, now in lines if before != now), "a value less now")


# --- the kinds --------------------------------------------------------------------------------------


def _run_tokenizer(recipe: Resolved[TokenizerConfig], directory: Path) -> None:
    from openzaya.data.tokenizer import save_tokenizer

    with RunLog(directory, total_steps=1, phase="tokenizer", resolved_toml=recipe.to_toml(), tensorboard=False) as log:
        tokenizer = make_tokenizer(recipe.value)
        save_tokenizer(tokenizer, directory / "tokenizer")
        log.set_final(vocab_size=len(tokenizer))


def make_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer that ``config`` describes."""
    from openzaya.data.tokenizer import train_tokenizer

    return train_tokenizer(_tokenizer_texts(config), config.vocab_size)


def _tokenizer_texts(config: TokenizerConfig) -> Iterator[str]:
    from openzaya.data.documents import find_files
    from openzaya.problems import TRAINED_FAMILIES, get_family, make_problem

    for name in TRAINED_FAMILIES:
        for index in range(config.problems_per_family):
            problem = make_problem(name, index % 8, config.seed, index, "train")
            solution = get_family(name).solve(problem)
            # With the roles' names, which the chat template writes into every conversation.
            yield f"user\n{problem.prompt}\nassistant\n{solution.trace}\n{solution.answer}"
    if config.text_characters == 0:
        return
    files = find_files(config.text_paths)
    share = config.text_characters // len(files) + 1
    for file in files:
        # The first group of a file is enough: the sample is to be even over files, not complete.
        remaining = share
        for record in file.read_group(0):
            text = record.value if isinstance(record.value, str) else str(record.value.get("text", ""))
            yield text[:remaining]
            remaining -= len(text)
            if remaining <= 0:
                break


def _run_train(recipe: Resolved[Any], directory: Path) -> None:
    from openzaya.train.loop import train

    train(recipe, directory)


def _run_reward_model(recipe: Resolved[Any], directory: Path) -> None:
    from openzaya.rl.reward_training import train_reward_model

    train_reward_model(recipe, directory)


def _run_rl(recipe: Resolved[Any], directory: Path) -> None:
    from openzaya.rl.loop import train_rl

    train_rl(recipe, directory)


def _run_eval(recipe: Resolved[Any], directory: Path) -> None:
    from openzaya.data.tokenizer import load_tokenizer
    from openzaya.eval.benchmarks import evaluate
    from openzaya.model import hf
    from openzaya.train.loop import stage_path

    config = recipe.value
    if not config.model:
        raise ConfigError("model is not set; name an earlier stage, a checkpoint directory or a hub id")
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    path = stage_path(config.model, directory.parent, "model")
    with RunLog(directory, total_steps=1, phase="eval", resolved_toml=recipe.to_toml(), tensorboard=False) as log:
        result, samples = evaluate(hf.load(path), load_tokenizer(path), config, progress=print_progress)
        write_evaluation(directory, result, samples)
        log.set_final(seconds=result["seconds"], generated_tokens=result["generated_tokens"])


def _run_cascade(recipe: Resolved[Any], directory: Path) -> None:
    from openzaya.eval.cascade import evaluate_cascade, print_progress, write_cascade
    from openzaya.model.hub import resolve
    from openzaya.train.loop import stage_path

    config = recipe.value
    paths = {}
    for name in [*config.models, *config.baselines]:
        path = resolve(stage_path(name, directory.parent, "model"))
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name}: {path} holds no checkpoint; let that stage finish first, or leave it out")
        paths[name] = str(path)
    with RunLog(directory, total_steps=1, phase="cascade", resolved_toml=recipe.to_toml(), tensorboard=False) as log:
        result, samples, problems = evaluate_cascade(config, paths, progress=print_progress)
        write_cascade(directory, result, samples, problems)
        log.set_final(seconds=result["seconds"], generated_tokens=result["generated_tokens"])


def _run_calibrate(recipe: Resolved[Any], directory: Path) -> None:
    from openzaya.eval.calibration import run_calibration

    run_calibration(recipe, directory)


def write_evaluation(directory: Path, result: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """``eval.json`` and ``samples.jsonl`` of one evaluation."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(directory / "eval.json", json.dumps(result, indent=2) + "\n")
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text_atomically(directory / "samples.jsonl", "".join(lines))


def print_progress(what: str, done: int, total: int) -> None:
    """One line a finished batch of an evaluation, on stderr."""
    print(f"eval: {what}, {done} of {total} problems", file=sys.stderr, flush=True)
