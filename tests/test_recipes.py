"""Every recipe of the repository reads, its stages name stages before them, and no recipe trains the unseen family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from openzaya.config import load_recipe
from openzaya.data.preference_recipe import ProblemPairsConfig
from openzaya.data.recipe import AggregationConfig, InstructionsConfig, ProblemsConfig
from openzaya.environments.instructions import InstructionsSpec
from openzaya.environments.registry import ProblemsSpec
from openzaya.eval.benchmarks import EvalConfig
from openzaya.eval.cascade import CascadeConfig
from openzaya.model.config import preset
from openzaya.problems import NEVER_TRAINED, get_family
from openzaya.rl.recipe import RLConfig
from openzaya.stages import STAGE_FILE, TokenizerConfig, stage_schema
from openzaya.train.recipe import RewardModelConfig, TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))
PIPELINES = sorted({path.parent for path in FILES if STAGE_FILE.match(path.name)})
BESIDE = {"nano-clean": "nano"}
"""Folders that run in the directory of another one, after it."""


def resolve(path: Path) -> Any:
    return load_recipe(path, stage_schema(path)).value


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def test_there_are_recipes() -> None:
    assert PIPELINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_reads_against_its_schema(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, stage_schema(path))
    written_out = tmp_path / path.name
    written_out.write_text(recipe.to_toml())
    assert resolve(written_out) == recipe.value


def stages(folder: Path) -> dict[str, Any]:
    """Recipes by stage, in the order in which they run; those of the folder that this one runs beside come first."""
    folders = [RECIPES / BESIDE[folder.name]] if folder.name in BESIDE else []
    files = [path for each in [*folders, folder] for path in sorted(each.glob("*.toml")) if STAGE_FILE.match(path.name)]
    assert len({path.stem for path in files}) == len(files), "two stages of one directory"
    return {path.stem: resolve(path) for path in files}


def is_policy(recipe: Any) -> bool:
    return isinstance(recipe, TrainConfig | RLConfig) and not isinstance(recipe, RewardModelConfig)


def first_of(name: str, recipes: dict[str, Any]) -> TrainConfig:
    """The stage whose fresh weights ``name`` goes back to."""
    recipe = recipes[name]
    while recipe.model.start_from in recipes:
        recipe = recipes[recipe.model.start_from]
    assert isinstance(recipe, TrainConfig)
    return recipe


@pytest.mark.parametrize("folder", PIPELINES, ids=name_of)
def test_stages_name_earlier_stages(folder: Path) -> None:
    before: dict[str, Any] = {}
    for name, recipe in stages(folder).items():
        if isinstance(recipe, TrainConfig | RLConfig):
            if recipe.model.start_from is not None:
                assert is_policy(before.get(recipe.model.start_from)), f"{name}: {recipe.model.start_from}"
            if recipe.tokenizer is not None and "/" not in recipe.tokenizer:
                assert isinstance(before.get(recipe.tokenizer), TokenizerConfig), f"{name}: {recipe.tokenizer}"
            assert recipe.tokenizer or recipe.model.start_from, f"{name}: no tokenizer"
        if isinstance(recipe, RLConfig) and recipe.behaviour is not None and recipe.behaviour.reward_model is not None:
            assert isinstance(before.get(recipe.behaviour.reward_model), RewardModelConfig), name
        if isinstance(recipe, EvalConfig):
            assert is_policy(before.get(recipe.model)), f"{name}: {recipe.model}"
            assert recipe.split == "heldout"
        if isinstance(recipe, CascadeConfig):
            for model in [*recipe.models, *recipe.baselines]:
                assert is_policy(before.get(model)), f"{name}: {model}"
        before[name] = recipe
    assert {TrainConfig, RewardModelConfig, RLConfig} <= {type(recipe) for recipe in before.values()}


@pytest.mark.parametrize("folder", PIPELINES, ids=name_of)
def test_shapes_of_a_pipeline_fit_each_other(folder: Path) -> None:
    recipes = stages(folder)
    for name, recipe in recipes.items():
        if not isinstance(recipe, TrainConfig | RLConfig):
            continue
        first = first_of(name, recipes)
        model = preset(first.model.preset).with_changes(**first.model.changes).with_changes(**recipe.model.changes)
        if first.tokenizer in recipes:
            assert recipes[first.tokenizer].vocab_size <= model.vocab_size, name
        window = recipe.window_tokens if isinstance(recipe, RLConfig) else recipe.context_length
        assert window <= model.max_position_embeddings, name
        if isinstance(recipe, RLConfig):
            assert recipe.rollout.max_new_tokens < window, f"{name}: no room for a prompt"
        optimizer = recipe.optimizer
        if optimizer.decay_steps:
            assert optimizer.warmup_steps + optimizer.decay_steps <= recipe.steps, f"{name}: decays while it warms up"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_unseen_family_is_in_no_training_data(path: Path) -> None:
    recipe = resolve(path)
    families: list[str] = []
    if isinstance(recipe, TrainConfig):
        generated = ProblemsConfig | AggregationConfig | InstructionsConfig | ProblemPairsConfig
        families = [name for source in recipe.data.sources if isinstance(source, generated) for name in source.families]
    if isinstance(recipe, RLConfig):
        for spec in [spec for source in recipe.sources for spec in source.environments]:
            if isinstance(spec, ProblemsSpec):
                families += [environment.name for environment in spec.make()]
            if isinstance(spec, InstructionsSpec):
                families += spec.families
    assert NEVER_TRAINED not in families
    assert all(get_family(family) for family in families)
    if isinstance(recipe, EvalConfig):
        assert NEVER_TRAINED in recipe.families, "the evaluation should ask it"


def test_the_clean_baseline_differs_from_sft_as_it_says() -> None:
    recipes = stages(RECIPES / "nano-clean")
    clean, sft = recipes["04-sft-clean"], recipes["04-sft"]
    for source in clean.data.sources:
        # Candidates of an aggregation prompt may be wrong; its target is right.
        assert source.wrong_share == 0 or source.kind == "aggregation"
        assert getattr(source, "ignore_share", 0) == 0 and getattr(source, "useless_share", 0) == 0
    unchanged = {"families", "weight", "seed", "difficulties", "difficulty_weights", "num_candidates", "num_forms"}
    of_sft = {source.name or source.kind: source for source in sft.data.sources if source.name != "useless-tails"}
    assert list(of_sft) == [source.name or source.kind for source in clean.data.sources]
    for source in clean.data.sources:
        twin = of_sft[source.name or source.kind]
        assert source.model_dump(include=unchanged) == twin.model_dump(include=unchanged), source.name
    assert clean.model == sft.model and clean.steps == 2 * sft.steps
    assert clean.optimizer.model_copy(update={"decay_steps": sft.optimizer.decay_steps}) == sft.optimizer


def test_both_tables_of_nano_ask_the_same_problems() -> None:
    recipes = stages(RECIPES / "nano-clean")
    first, second = recipes["11-cascade"], recipes["12-cascade"]
    assert first.questions() == second.questions() and first.instructions == second.instructions
    for model in set(first.models) & set(second.models):
        assert first.label(model) == second.label(model)


def test_another_seed_is_another_in_every_stage_that_trains() -> None:
    sys.path.insert(0, str(RECIPES.parent))
    from benchmarks.nano_seeds import seed_overrides

    folder = RECIPES / "nano"
    overrides = seed_overrides(folder, 2)
    for path in sorted(folder.glob("*.toml")):
        mine = [text.removeprefix(f"{path.stem}.") for text in overrides if text.startswith(f"{path.stem}.")]
        plain, moved = resolve(path), load_recipe(path, stage_schema(path), mine).value
        assert (plain != moved) == isinstance(plain, TrainConfig | RLConfig), path.name
        if isinstance(plain, TrainConfig):
            assert moved.data.seed == plain.data.seed + 2000
            assert [source.seed - 2000 for source in moved.data.sources] == [
                source.seed for source in plain.data.sources
            ]
        if isinstance(plain, RLConfig):
            assert moved.seed == plain.seed + 2000
