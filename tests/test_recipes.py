"""Every recipe of the repository reads, its stages name stages before them, and no recipe trains the unseen family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openzaya.config import load_recipe
from openzaya.data.recipe import AggregationConfig, ProblemsConfig
from openzaya.eval.benchmarks import EvalConfig
from openzaya.model.config import preset
from openzaya.problems import NEVER_TRAINED, get_family
from openzaya.stages import STAGE_FILE, TokenizerConfig, stage_schema
from openzaya.train.recipe import TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.rglob("*.toml"))
PIPELINES = sorted({path.parent for path in FILES if STAGE_FILE.match(path.name)})


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


@pytest.mark.parametrize("folder", PIPELINES, ids=name_of)
def test_stages_name_earlier_stages_of_their_folder(folder: Path) -> None:
    kinds: dict[str, Any] = {}
    for path in sorted(folder.glob("*.toml")):
        if not STAGE_FILE.match(path.name):
            continue
        recipe = resolve(path)
        if isinstance(recipe, TrainConfig):
            if recipe.model.start_from is not None:
                assert isinstance(kinds.get(recipe.model.start_from), TrainConfig), f"{path}: {recipe.model.start_from}"
            tokenizer = recipe.tokenizer or recipe.model.start_from
            assert isinstance(kinds.get(tokenizer), TokenizerConfig if recipe.tokenizer else TrainConfig), path
        if isinstance(recipe, EvalConfig):
            assert isinstance(kinds.get(recipe.model), TrainConfig), f"{path}: {recipe.model}"
            assert recipe.split == "heldout"
        kinds[path.stem] = recipe
    assert {type(recipe) for recipe in kinds.values()} == {TokenizerConfig, TrainConfig, EvalConfig}


@pytest.mark.parametrize("folder", PIPELINES, ids=name_of)
def test_shapes_of_a_pipeline_fit_each_other(folder: Path) -> None:
    recipes = {path.stem: resolve(path) for path in sorted(folder.glob("*.toml")) if STAGE_FILE.match(path.name)}
    for name, recipe in recipes.items():
        if not isinstance(recipe, TrainConfig):
            continue
        first = recipe
        while first.model.start_from in recipes:
            first = recipes[first.model.start_from]
        model = preset(first.model.preset).with_changes(**first.model.changes).with_changes(**recipe.model.changes)
        assert recipe.context_length <= model.max_position_embeddings, name
        assert first.tokenizer is not None and recipes[first.tokenizer].vocab_size <= model.vocab_size, name
        optimizer = recipe.optimizer
        assert optimizer.warmup_steps + optimizer.decay_steps <= recipe.steps, (
            f"{name}: the decay begins in the warm-up"
        )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_unseen_family_is_in_no_training_data(path: Path) -> None:
    recipe = resolve(path)
    if isinstance(recipe, TrainConfig):
        for source in recipe.data.sources:
            if isinstance(source, ProblemsConfig | AggregationConfig):
                assert NEVER_TRAINED not in source.families
                assert all(get_family(family) for family in source.families)
    if isinstance(recipe, EvalConfig):
        assert NEVER_TRAINED in recipe.families, "the evaluation should ask it"
